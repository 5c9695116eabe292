"""The figures of a training run are those of its own steps, and measuring changes none of them."""

import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer import ReweightedWakeSleep as HostWakeSleep

from pyro_gradest import IWAE, NVIL, OVIS, TrainingMonitor
from tests.oracles import multisample as oracle

STEP_SIZE = 1e-3
NUM_STEPS = 12


def model():
    scale = pyro.param("scale", torch.tensor(1.2), constraint=dist.constraints.positive)
    z = pyro.sample("z", dist.Bernoulli(0.3))
    pyro.sample("x", dist.Normal(3.0 * z, scale), obs=torch.tensor(2.0))


def guide():
    logit = pyro.param("logit", torch.tensor(0.4))
    pyro.sample("z", dist.Bernoulli(logits=logit))


def log_weights_of_states():
    """The log-weights of the two states."""
    logit, scale = pyro.param("logit").item(), pyro.param("scale").item()
    log_q = -np.logaddexp(0.0, np.array([logit, -logit]))
    error = (2.0 - 3.0 * np.arange(2)) / scale
    log_p = np.log([0.7, 0.3]) - error**2 / 2 - np.log(scale) - np.log(2 * np.pi) / 2
    return log_p - log_q


def unconstrained():
    return {name: leaf.item() for name, leaf in pyro.get_param_store().named_parameters()}


def svi_of(loss):
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    return SVI(model, guide, pyro.optim.SGD({"lr": STEP_SIZE}), loss)


def test_figures_are_those_of_the_step():
    svi, seen = svi_of(OVIS(3)), set()
    monitor = TrainingMonitor(svi)
    svi.evaluate_loss()  # so that the parameters are there before the first step
    for step in range(NUM_STEPS):
        log_weights, before = log_weights_of_states(), unconstrained()
        loss = monitor.step()
        after = unconstrained()
        bound, size, norm = (column[step] for column in monitor.to_dict().values())

        assert bound == -loss
        moves = [(before[name] - after[name]) / STEP_SIZE for name in before]
        np.testing.assert_allclose(norm, np.linalg.norm(moves), rtol=1e-6)
        candidates = [log_weights[[0] * (3 - ones) + [1] * ones] for ones in range(4)]
        errors = [abs(oracle.iwae_bound(one) - bound) for one in candidates]
        ones = int(np.argmin(errors))
        assert errors[ones] < 1e-6
        np.testing.assert_allclose(size, oracle.effective_sample_size(candidates[ones]), rtol=1e-6)
        seen.add(ones)
    assert len(seen) > 1  # not every step had particles that are all alike


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_a_monitored_run_is_the_run_itself(chunk_size):
    loss = IWAE(3, num_replicates=2, chunk_size=chunk_size)
    svi = svi_of(loss)
    losses, values = [svi.step() for _ in range(NUM_STEPS)], unconstrained()
    monitor = TrainingMonitor(svi_of(loss))
    assert [monitor.step() for _ in range(NUM_STEPS)] == losses
    assert unconstrained() == values
    np.testing.assert_array_equal(monitor.to_dict()["bound"], -np.array(losses))


def test_figures_in_a_frame():
    monitor = TrainingMonitor(svi_of(NVIL(2)))
    for _ in range(4):
        monitor.step()
    frame = monitor.to_frame()
    assert list(frame) == ["bound", "effective_sample_size", "gradient_norm"]
    assert frame.shape == (4, 3)
    assert frame["effective_sample_size"].between(1, 2 + 1e-9).all()


@pytest.mark.parametrize("loss", [Trace_ELBO(), HostWakeSleep(2), Trace_ELBO().differentiable_loss])
def test_losses_of_the_host(loss):
    monitor = TrainingMonitor(svi_of(loss))
    first = monitor.step()
    columns = monitor.to_dict()
    assert list(columns) == ["bound", "gradient_norm"]
    assert columns["bound"][0] == -np.ravel(first)[0]
    assert columns["gradient_norm"][0] > 0


def test_a_model_without_parameters():
    def draw():
        pyro.sample("z", dist.Bernoulli(0.3))

    monitor = TrainingMonitor(SVI(draw, draw, pyro.optim.SGD({"lr": STEP_SIZE}), OVIS(2)))
    monitor.step()
    assert monitor.to_dict()["gradient_norm"] == [0.0]


def test_nothing_recorded():
    monitor = TrainingMonitor(svi_of(OVIS(2)))
    assert monitor.to_dict() == {}
    monitor.write_scalars(None)


class Writer:
    def __init__(self):
        self.scalars = []

    def add_scalar(self, tag, scalar_value, global_step):
        self.scalars.append((tag, scalar_value, global_step))


def test_each_step_is_written_once():
    monitor, writer = TrainingMonitor(svi_of(OVIS(2))), Writer()
    for _ in range(3):
        monitor.step()
        monitor.write_scalars(writer, prefix="train/")
    expected = monitor.to_dict()
    assert [step for _, _, step in writer.scalars] == [0] * 3 + [1] * 3 + [2] * 3
    for tag, value, step in writer.scalars:
        assert isinstance(value, float)
        assert value == expected[tag.removeprefix("train/")][step]


@pytest.mark.filterwarnings("ignore:\\s*ArviZ is undergoing")
def test_arviz():
    monitor = TrainingMonitor(svi_of(OVIS(2)))
    losses = [monitor.step() for _ in range(4)]
    dataset = monitor.to_arviz()
    assert dict(dataset.sizes) == {"chain": 1, "draw": 4}
    np.testing.assert_array_equal(dataset["bound"][0], -np.array(losses))


def test_without_arviz(monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match="pip install arviz"):
        TrainingMonitor(svi_of(OVIS(2))).to_arviz()


def test_what_is_no_svi_is_refused():
    with pytest.raises(TypeError, match="needs the SVI that trains, got OVIS"):
        TrainingMonitor(OVIS(2))
