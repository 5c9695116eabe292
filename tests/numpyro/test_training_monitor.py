"""The figures of a training run are those of its own steps, and measuring changes none of them."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import lax, random
from numpyro import optim
from numpyro.infer import SVI, Trace_ELBO

from numpyro_gradest import IWAE, NVIL, OVIS, TrainingMetrics, TrainingMonitor
from numpyro_gradest.diagnostics.training_monitor import _norm
from numpyro_gradest.infer._discrete_sites import state_name
from tests.oracles import multisample as oracle

STEP_SIZE = 1e-3
NUM_STEPS = 12


def model():
    scale = numpyro.param("scale", 1.2, constraint=dist.constraints.positive)
    z = numpyro.sample("z", dist.Bernoulli(0.3))
    numpyro.sample("x", dist.Normal(3.0 * z, scale), obs=2.0)


def guide():
    numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logit", 0.4)))


def log_weights_of(params):
    """The log-weights of the two states."""
    logit, scale = float(params["logit"]), float(params["scale"])
    log_q = -np.logaddexp(0.0, np.array([logit, -logit]))
    error = (2.0 - 3.0 * np.arange(2)) / scale
    log_p = np.log([0.7, 0.3]) - error**2 / 2 - np.log(scale) - np.log(2 * np.pi) / 2
    return log_p - log_q


def monitored(loss, optimizer=None, guide=guide):
    svi = SVI(model, guide, optimizer or optim.SGD(STEP_SIZE), loss)
    return svi, TrainingMonitor(svi), svi.init(random.key(3))


def test_figures_are_those_of_the_step():
    svi, monitor, state = monitored(OVIS(3))
    update, seen = jax.jit(monitor.update), set()
    for _ in range(NUM_STEPS):
        before = svi.optim.get_params(state.optim_state)
        log_weights = log_weights_of(svi.get_params(state))
        state, metrics = update(state)
        after = svi.optim.get_params(state.optim_state)

        moves = [(before[name] - after[name]) / STEP_SIZE for name in before]
        np.testing.assert_allclose(metrics.gradient_norm, np.linalg.norm(moves), rtol=1e-6)
        candidates = [log_weights[[0] * (3 - ones) + [1] * ones] for ones in range(4)]
        errors = [abs(oracle.iwae_bound(one) - metrics.bound) for one in candidates]
        ones = int(np.argmin(errors))
        assert errors[ones] < 1e-6
        size = oracle.effective_sample_size(candidates[ones])
        np.testing.assert_allclose(metrics.effective_sample_size, size, rtol=1e-6)
        seen.add(ones)
    assert len(seen) > 1  # not every step had particles that are all alike


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_a_monitored_run_is_the_run_itself(chunk_size):
    svi, monitor, state = monitored(IWAE(3, num_replicates=2, chunk_size=chunk_size))
    last, metrics = lax.scan(lambda state, _: monitor.update(state), state, length=NUM_STEPS)
    monitor.record(metrics)
    plain = svi.run(random.key(3), NUM_STEPS, progress_bar=False)
    np.testing.assert_array_equal(monitor.to_dict()["bound"], -plain.losses)
    assert jax.tree.all(jax.tree.map(np.array_equal, svi.get_params(last), plain.params))
    assert last.mutable_state is None


@pytest.mark.filterwarnings("ignore:\\s*ArviZ is undergoing")
def test_steps_and_stacks_of_steps_make_one_history():
    _, monitor, state = monitored(OVIS(2))
    state, first = jax.jit(monitor.update)(state)
    monitor.record(first)
    state, rest = lax.scan(lambda state, _: monitor.update(state), state, length=3)
    monitor.record(rest)
    columns = monitor.to_dict()
    assert list(columns) == ["bound", "effective_sample_size", "gradient_norm"]
    assert all(column.shape == (4,) for column in columns.values())
    assert monitor.to_frame().shape == (4, 3)
    np.testing.assert_array_equal(columns["bound"], [first.bound, *rest.bound])
    dataset = monitor.to_arviz()
    assert dict(dataset.sizes) == {"chain": 1, "draw": 4}
    np.testing.assert_array_equal(dataset["bound"][0], columns["bound"])


def test_state_of_the_loss_is_kept_and_nothing_added():
    loss = NVIL(2)
    _, monitor, state = monitored(loss, guide=loss.with_baseline(guide))
    update = jax.jit(monitor.update)
    for _ in range(2):
        state, metrics = update(state)
    assert set(state.mutable_state) == {"nvil"}
    assert state.mutable_state["nvil"]["num_updates"] == 2
    assert 1 <= metrics.effective_sample_size <= 2


@pytest.mark.filterwarnings("ignore:.*does not support models with discrete")
def test_losses_of_the_host():
    _, monitor, state = monitored(Trace_ELBO())
    _, metrics = jax.jit(monitor.update)(state)
    monitor.record(metrics)
    assert list(monitor.to_dict()) == ["bound", "gradient_norm"]
    assert np.isfinite(monitor.to_frame()).all(axis=None)


def test_what_adaptive_imle_keeps_is_no_gradient():
    gradients = {"logit": jnp.array([3.0, 4.0]), state_name("z"): jnp.array([50.0])}
    assert _norm(gradients) == 5.0


def test_nothing_recorded():
    _, monitor, _ = monitored(OVIS(2))
    assert monitor.to_dict() == {}
    monitor.write_scalars(None)


class Writer:
    def __init__(self):
        self.scalars = []

    def add_scalar(self, tag, scalar_value, global_step):
        self.scalars.append((tag, scalar_value, global_step))


def test_each_step_is_written_once():
    _, monitor, state = monitored(OVIS(2))
    writer = Writer()
    update = jax.jit(monitor.update)
    for _ in range(3):
        state, metrics = update(state)
        monitor.record(metrics)
        monitor.write_scalars(writer, prefix="train/")
    expected = monitor.to_dict()
    assert [step for _, _, step in writer.scalars] == [0] * 3 + [1] * 3 + [2] * 3
    for tag, value, step in writer.scalars:
        assert isinstance(value, float)
        assert value == expected[tag.removeprefix("train/")][step]


def test_without_arviz(monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match="pip install arviz"):
        monitored(OVIS(2))[1].to_arviz()


def test_refusals():
    with pytest.raises(TypeError, match="needs the SVI that trains, got OVIS"):
        TrainingMonitor(OVIS(2))
    _, monitor, state = monitored(OVIS(2))

    def step(state, _):
        state, metrics = monitor.update(state)
        monitor.record(metrics)
        return state, None

    with pytest.raises(TypeError, match="Return them from the function"):
        lax.scan(step, state, length=2)
    with pytest.raises(ValueError, match=r"got \(2, 3\)"):
        monitor.record(TrainingMetrics(*3 * [jnp.zeros((2, 3))]))


@pytest.mark.filterwarnings("ignore:.*does not support models with discrete")
def test_an_optimizer_without_gradients_is_refused():
    _, monitor, state = monitored(Trace_ELBO(), optim.Minimize())
    with pytest.raises(TypeError, match="got Minimize"):
        jax.eval_shape(monitor.update, state)
