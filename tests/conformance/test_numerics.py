"""float32, and memory: what broke reference implementations of these estimators.

The truth is the float64 oracle, evaluated at the float32 log-weights.
"""

from functools import cache

import numpy as np
import pytest

from tests.oracles import multisample as oracle

EPS = float(np.finfo(np.float32).eps)

SIGNALS = {
    "reinforce": ("reinforce_learning_signal", {}),
    "vimco-geometric": ("vimco_learning_signal", {"leave_one_out": "geometric"}),
    "vimco-arithmetic": ("vimco_learning_signal", {"leave_one_out": "arithmetic"}),
    "ovis-gamma0": ("ovis_gamma_learning_signal", {"gamma": 0.0}),
    "ovis-gamma1": ("ovis_gamma_learning_signal", {"gamma": 1.0}),
    "wake-phi": ("wake_phi_learning_signal", {}),
    "dreg": ("dreg_weights", {}),
    "reinforce-leave-one-out": ("reinforce_leave_one_out_learning_signal", {}),
    "thermodynamic": ("thermodynamic_learning_signal", {"partition": [0.0, 0.1]}),
    "renyi-weights": ("renyi_weights", {"alpha": 0.5}),
    "renyi-geometric": (
        "renyi_learning_signal",
        {"alpha": 0.5, "control_variate": "geometric"},
    ),
    "renyi-asymptotic": ("renyi_learning_signal", {"alpha": 0.5}),
    "renyi-asymptotic-1": ("renyi_learning_signal", {"alpha": 1.0}),
    "wake-phi-dreg": ("wake_phi_dreg_weights", {}),
}
LEAVE_ONE_OUT = [name for name in SIGNALS if name.startswith(("vimco", "ovis"))]


def spread_over_a_thousand(rng, K):
    return rng.uniform(-1000, 1000, K)


def one_dominates(rng, K):
    log_weights = rng.normal(size=K)
    log_weights[0] += 60  # 1 - v underflows in float32
    return log_weights


def two_dominate(rng, K):
    log_weights = rng.normal(size=K) - 60
    log_weights[:2] = 500
    return log_weights


def nearly_dominates(rng, K):
    log_weights = rng.normal(size=K)
    log_weights[0] += 12  # 1 - v has two or three digits left
    return log_weights


def tied(rng, K):
    return np.repeat([-300.0, -301.0], [K - K // 2, K // 2])


def equal(rng, K):
    return np.full(K, -543.21)


def some_zero(rng, K):
    log_weights = rng.normal(size=K) - 500
    log_weights[K // 2 :] = -np.inf
    return log_weights


def one_nonzero(rng, K):
    log_weights = np.full(K, -np.inf)
    log_weights[0] = -700.0
    return log_weights


def all_zero(rng, K):
    return np.full(K, -np.inf)


HARD = [
    spread_over_a_thousand,
    one_dominates,
    two_dominate,
    nearly_dominates,
    tied,
    equal,
    some_zero,
    one_nonzero,
    all_zero,
]
every_size = pytest.mark.parametrize("num_particles", [2, 50], ids="K{}".format)


def hard_log_weights(num_particles):
    """``[K, cases]`` in float32: every hard case is one column of the batch."""
    columns = [make(np.random.default_rng(0), num_particles) for make in HARD]
    return np.stack(columns, axis=1).astype(np.float32)


def roundings(count, *log_weights, floor=1.0):
    """So many roundings of numbers as large as the log-weights' spread, for each column."""
    log_weights = np.concatenate(log_weights)
    finite = np.isfinite(log_weights)
    highest = np.max(log_weights, axis=0, where=finite, initial=-np.inf)
    lowest = np.min(log_weights, axis=0, where=finite, initial=np.inf)
    spread = np.where(finite.any(axis=0), highest - lowest, 0.0)
    return count * EPS * (floor + spread)


def assert_close(actual, desired, tolerance):
    """Absolute tolerance per column; a failure names the case."""
    assert actual.dtype == np.float32
    assert np.isfinite(actual).all()
    error = np.abs(actual - desired).max(axis=0)
    wrong = {
        make.__name__: f"error {e:.2g}, allowed {t:.2g}"
        for make, e, t in zip(HARD, error, np.broadcast_to(tolerance, error.shape), strict=True)
        if e > t
    }
    assert not wrong


@every_size
@pytest.mark.parametrize("name", SIGNALS)
def test_signal_in_float32(backend, name, num_particles):
    function, options = SIGNALS[name]
    log_weights = hard_log_weights(num_particles)

    actual = getattr(backend.estimators, function)(backend.array(log_weights), **options)

    desired = getattr(oracle, function)(log_weights, **options)
    # Only the plain score function contains L itself, hundreds of nats; in all others log-weights
    # enter through their differences.
    size = 1.0 + (np.abs(desired).max(axis=0) if name == "reinforce" else 0.0)
    assert_close(backend.numpy(actual), desired, roundings(4, log_weights, floor=size))


AUXILIARY = [-900.0, 0.0, 900.0, -np.inf]


def auxiliary_log_weights(auxiliary):
    """``[S, cases]`` in float32, for S=2."""
    return np.broadcast_to(np.array([[auxiliary], [0.5]], np.float32), (2, len(HARD)))


@every_size
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("auxiliary", AUXILIARY)
def test_ovis_mc_in_float32(backend, num_particles, auxiliary, alpha):
    log_weights = hard_log_weights(num_particles)
    draws = auxiliary_log_weights(auxiliary)

    actual = backend.estimators.ovis_mc_learning_signal(
        backend.array(log_weights), backend.array(draws), alpha=alpha
    )

    desired = oracle.ovis_mc_learning_signal(log_weights, draws, alpha=alpha)
    assert_close(backend.numpy(actual), desired, roundings(4, log_weights, draws))


@every_size
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_bound_in_float32(backend, alpha, num_particles):
    log_weights = hard_log_weights(num_particles)

    actual = backend.numpy(backend.estimators.renyi_bound(backend.array(log_weights), alpha=alpha))

    assert actual.dtype == np.float32
    desired = oracle.renyi_bound(log_weights, alpha=alpha)
    np.testing.assert_allclose(actual, desired, rtol=4 * EPS, atol=4 * EPS)


@every_size
@pytest.mark.parametrize("name", SIGNALS)
def test_gradients_in_float32_are_finite(backend, name, num_particles):
    function, options = SIGNALS[name]
    estimators = backend.estimators
    log_weights = hard_log_weights(num_particles)
    log_q = np.full_like(log_weights, -3.0)

    def surrogate(log_p, log_q):
        return estimators.linear_surrogate(
            log_p,
            0 * log_q,
            log_q,
            weights=estimators.normalized_weights(log_p - log_q),
            learning_signal=getattr(estimators, function)(log_p - log_q, **options),
        )

    gradients = backend.gradients(surrogate, log_weights + log_q, log_q)

    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("auxiliary", AUXILIARY)
def test_gradients_of_ovis_mc_in_float32_are_those_of_its_signal(backend, auxiliary, alpha):
    """Whatever its steps would have for derivatives at such weights, none gets out."""
    log_weights, draws = hard_log_weights(50), auxiliary_log_weights(auxiliary)
    log_q = np.full_like(log_weights, -3.0)

    def surrogate(log_q):
        weights = backend.array(log_weights) - log_q - 3.0
        signal = backend.estimators.ovis_mc_learning_signal(
            weights, backend.array(draws), alpha=alpha
        )
        return signal * log_q

    (gradient,) = backend.gradients(surrogate, log_q)

    desired = oracle.ovis_mc_learning_signal(log_weights, draws, alpha=alpha)
    assert_close(gradient, desired, roundings(4, log_weights, draws))


@every_size
def test_gradient_of_the_bound_in_float32(backend, num_particles):
    log_weights = hard_log_weights(num_particles)

    (gradient,) = backend.gradients(backend.estimators.iwae_bound, log_weights)

    # The host's logsumexp differentiates to exp(lw - L), which rounds L.
    largest = np.max(np.abs(log_weights), where=np.isfinite(log_weights), initial=1.0)
    assert_close(gradient, oracle.normalized_weights(log_weights), 4 * EPS * largest)


@cache
def thousand_log_weights(offset):
    """Log-weights around the offset, and the oracle's OVIS signal (a million operations)."""
    rng = np.random.default_rng(0)
    log_weights = (offset + 2 * rng.normal(size=1000)).astype(np.float32)
    return log_weights, oracle.ovis_gamma_learning_signal(log_weights, gamma=0.0)


@pytest.mark.parametrize("offset", [-500.0, 0.0, 500.0], ids="offset{:+.0f}".format)
def test_ovis_of_a_thousand_large_log_weights(backend, offset):
    # As a difference of terms of size |L| this has an error of 1360 % in float32. The signal is
    # about v^2 / 2, between 1e-15 and 1e-3, and right in every entry to 4e-5 of it.
    log_weights, desired = thousand_log_weights(offset)

    actual = backend.numpy(
        backend.estimators.ovis_gamma_learning_signal(backend.array(log_weights), gamma=0.0)
    )

    np.testing.assert_allclose(actual, desired, rtol=4e-5, atol=1e-16)  # atol: of the oracle


@pytest.mark.parametrize("name", SIGNALS)
def test_no_tensor_over_pairs_of_particles(backend, name):
    function, options = SIGNALS[name]
    num_particles = 200
    log_weights = backend.array(np.random.default_rng(0).normal(size=num_particles))

    largest = backend.largest_intermediate(
        lambda lw: getattr(backend.estimators, function)(lw, **options), log_weights
    )

    assert largest <= 2 * num_particles


def test_ovis_mc_needs_no_more_than_particles_times_draws(backend):
    num_particles, num_auxiliary = 200, 7
    rng = np.random.default_rng(0)
    log_weights, auxiliary = rng.normal(size=num_particles), rng.normal(size=num_auxiliary)

    largest = backend.largest_intermediate(
        backend.estimators.ovis_mc_learning_signal,
        backend.array(log_weights),
        backend.array(auxiliary),
    )

    assert num_particles * num_auxiliary <= largest <= 2 * num_particles * num_auxiliary


def test_largest_intermediate_sees_a_pairwise_tensor(backend):
    # The two tests above prove nothing if the measurement is blind.
    log_weights = backend.array(np.zeros(200))
    largest = backend.largest_intermediate(
        lambda lw: (lw[:, None] - lw[None, :]).sum(), log_weights
    )
    assert largest >= 200**2
