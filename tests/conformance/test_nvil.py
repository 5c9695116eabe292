"""NVIL's baselines: the signal and its running moments by the oracle, the bias by enumeration."""

from functools import partial

import numpy as np
import pytest

from tests.conformance.objectives import assert_equal, program_for
from tests.conformance.replay import evaluations, every_tuple
from tests.oracles import enumeration
from tests.oracles import multisample as oracle

MEAN, VARIANCE = -1.3, 4.0


def state_of(backend, mean=MEAN, variance=VARIANCE, num_updates=7.0):
    return backend.estimators.NVILState(*map(backend.array, (mean, variance, num_updates)))


def hard_log_weights():
    log_weights = 3 * np.random.default_rng(0).normal(size=(4, 5))
    log_weights[1, 1] = -np.inf
    log_weights[:, 2] = -np.inf
    log_weights[0, 3] = 800.0
    return log_weights


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("variance", [VARIANCE, 0.25], ids="variance{}".format)
def test_signal(backend, variance, normalize):
    log_weights = hard_log_weights()
    actual = backend.estimators.nvil_learning_signal(
        backend.array(log_weights),
        state_of(backend, variance=variance),
        baseline=backend.array(np.array(0.4)),
        normalize_variance=normalize,
    )
    desired = oracle.nvil_learning_signal(
        log_weights, MEAN, variance, baseline=0.4, normalize=normalize
    )
    np.testing.assert_allclose(backend.numpy(actual), desired, rtol=1e-12, atol=1e-12)


def test_signal_is_detached(backend):
    def signal(log_weights, baseline):
        return backend.estimators.nvil_learning_signal(
            log_weights, state_of(backend), baseline=baseline
        )

    gradients = backend.gradients(signal, hard_log_weights()[:, :2], np.array([0.4, 0.1]))
    for gradient in gradients:
        assert_equal(gradient, 0.0)


def test_running_moments(backend):
    rng = np.random.default_rng(0)
    state = backend.estimators.initial_nvil_state()
    mean, variance = 0.0, 0.0
    for step in range(3):
        log_weights, baseline = rng.normal(size=(4, 6)) + step, rng.normal(size=6)
        log_weights[:, 2] = -np.inf  # does not count
        state = backend.estimators.update_nvil_state(
            state, backend.array(log_weights), baseline=backend.array(baseline), decay=0.7
        )
        mean, variance = oracle.nvil_moments(mean, variance, step == 0, log_weights, baseline, 0.7)
        assert_equal(backend.numpy(state.mean), mean)
        assert_equal(backend.numpy(state.variance), variance)
    assert state.num_updates == 3


def objective_at(backend, state, baseline=None, **options):
    """The class with the moments that many steps have left."""

    def build(**host_arguments):
        objective = backend.package.NVIL(3, baseline=baseline, **options, **host_arguments)
        objective._state = lambda _: state
        return objective

    return build


@pytest.mark.parametrize("normalize", [True, False])
def test_direction_is_unbiased(backend, normalize):
    """The guide's gradient is the exact one over max(1, s), whatever the baselines."""
    program = program_for("plate")
    baseline = backend.array(np.array([0.3, -0.7]))
    build = objective_at(backend, state_of(backend), lambda: baseline, normalize_variance=normalize)
    actual = evaluations(backend.host, build, program, every_tuple(program, 3))

    mean = enumeration.tuple_probabilities(program.problem, 3) @ actual.gradients
    desired = enumeration.exact_gradient(program.problem, 3)
    in_guide = np.arange(len(desired)) >= list(program.problem.params).index("logits")
    assert_equal(mean, np.where(in_guide & normalize, desired / np.sqrt(VARIANCE), desired))
    assert np.abs(desired[in_guide]).max() > 0.01


def test_dividing_only_the_bound_would_be_biased(backend):
    """As the paper's (L - c)/s - v is for several particles; for one they agree on average."""
    problem = program_for("categorical").problem

    def undivided(log_weights):
        v = oracle.normalized_weights(log_weights)
        signal = oracle.nvil_learning_signal(log_weights, MEAN, VARIANCE)
        return signal + v / np.sqrt(VARIANCE) - v

    def direction(signal, K):
        expected = enumeration.expected_score(problem, K, signal)
        return expected / np.linalg.norm(expected)

    ours = partial(oracle.nvil_learning_signal, mean=MEAN, variance=VARIANCE)
    assert_equal(direction(undivided, 1), direction(ours, 1))
    assert np.abs(direction(undivided, 3) - direction(ours, 3)).max() > 0.01


@pytest.mark.parametrize("particles", ["vmap", "loop"])
def test_without_baselines_it_is_the_plain_score_function(backend, particles):
    program = program_for("mixed")
    draws = every_tuple(program, 2)
    draws = draws._replace(values={site: value[:6] for site, value in draws.values.items()})
    first = backend.estimators.initial_nvil_state()

    def nvil(**host_arguments):
        objective = backend.package.NVIL(2, **host_arguments)
        objective._state = lambda _: first
        return objective

    iwae = partial(backend.package.IWAE, 2)
    ours, plain = (
        evaluations(backend.host, build, program, draws, particles=particles)
        for build in (nvil, iwae)
    )
    assert_equal(ours.gradients, plain.gradients)
    assert_equal(ours.losses, plain.losses)


@pytest.mark.parametrize("shape", [(2, 1), (3,), (1, 2)])
def test_a_baseline_of_the_wrong_shape_is_refused(backend, shape):
    with pytest.raises(ValueError, match=r"broadcasts to the batch shape \(2,\).*\[\.\.\., 0\]"):
        backend.estimators.nvil_learning_signal(
            backend.array(np.zeros((3, 2))),
            state_of(backend),
            baseline=backend.array(np.zeros(shape)),
        )


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"decay": 1.0}, ValueError, "0 <= decay < 1, got 1.0"),
        ({"baseline": 0.3}, TypeError, "(?s)baseline.*0.3"),
        ({"alpha": 0.5}, TypeError, "alpha"),
    ],
)
def test_options_are_checked(backend, options, error, match):
    with pytest.raises(error, match=match):
        backend.package.NVIL(3, **options)
