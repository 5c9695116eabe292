"""Layer 1 against the NumPy oracle: values, gradients where there are any, zero where not.

Every kind of log-weights goes through one compiled function.
"""

from functools import partial

import numpy as np
import pytest

from tests.oracles import multisample as oracle

ATOL = 1e-10

# name -> the arguments after the log-weights
SIGNALS = {
    "reinforce": ("reinforce_learning_signal", {}),
    "vimco-geometric": ("vimco_learning_signal", {"leave_one_out": "geometric"}),
    "vimco-arithmetic": ("vimco_learning_signal", {"leave_one_out": "arithmetic"}),
    "ovis-gamma0": ("ovis_gamma_learning_signal", {"gamma": 0.0}),
    "ovis-gamma0.5": ("ovis_gamma_learning_signal", {"gamma": 0.5}),
    "ovis-gamma1": ("ovis_gamma_learning_signal", {"gamma": 1.0}),
    "wake-phi": ("wake_phi_learning_signal", {}),
    "reinforce-leave-one-out": ("reinforce_leave_one_out_learning_signal", {}),
    **{
        f"thermodynamic-{name}-J{len(partition)}": (
            f"thermodynamic_{name}",
            {"partition": partition},
        )
        for name in ("weights", "learning_signal")
        for partition in ([0.0], [0.0, 0.1, 0.6])
    },
    "dreg": ("dreg_weights", {}),
    "dreg-alpha": ("dreg_weights", {"alpha": 0.3}),
    "renyi-weights": ("renyi_weights", {"alpha": 0.3}),
    "renyi-weights-1": ("renyi_weights", {"alpha": 1.0}),
    **{
        f"renyi-{control_variate}-{alpha}": (
            "renyi_learning_signal",
            {"alpha": alpha, "control_variate": control_variate},
        )
        for control_variate in ("none", "geometric", "arithmetic", "asymptotic")
        for alpha in (0.0, 0.3, 1.0)
    },
    "wake-phi-dreg": ("wake_phi_dreg_weights", {}),
}
BOUNDS = {
    "iwae": ("iwae_bound", {}),
    "renyi-0": ("renyi_bound", {"alpha": 0.0}),
    "renyi-0.5": ("renyi_bound", {"alpha": 0.5}),
    "renyi-1": ("renyi_bound", {"alpha": 1.0}),
    "renyi-2": ("renyi_bound", {"alpha": 2.0}),
    "renyi-negative": ("renyi_bound", {"alpha": -1.0}),
}
STATISTICS = {
    "thermodynamic-bound": ("thermodynamic_bound", {"partition": [0.0, 0.1, 0.6]}),
    "normalized-weights": ("normalized_weights", {}),
    "effective-sample-size": ("effective_sample_size", {}),
}


def random_weights(rng, shape):
    return rng.normal(size=shape)


def tied_weights(rng, shape):
    """Every particle shares its weight with another, the largest included."""
    return np.round(rng.normal(size=shape))


def equal_weights(rng, shape):
    return np.broadcast_to(rng.normal(size=shape[1:]), shape).copy()


def spread_weights(rng, shape):
    return rng.uniform(-1000, 1000, size=shape)


def dominated_weights(rng, shape):
    """One particle holds all but 1e-12 of the weight: 1 - v has four digits left."""
    log_weights = rng.normal(size=shape)
    log_weights[1] += 28
    return log_weights


def some_zero_weights(rng, shape):
    log_weights = rng.normal(size=shape)
    log_weights[0] = -np.inf
    return log_weights


def single_nonzero_weight(rng, shape):
    log_weights = np.full(shape, -np.inf)
    log_weights[-1] = rng.normal(size=shape[1:])
    return log_weights


def all_zero_weights(rng, shape):
    return np.full(shape, -np.inf)


def mixed_zero_weights(rng, shape):
    """Different batch elements have different numbers of zero weights, from none to all."""
    log_weights = rng.normal(size=shape)
    log_weights[rng.uniform(size=shape) < 0.5] = -np.inf
    return log_weights


FINITE = [random_weights, tied_weights, equal_weights, spread_weights, dominated_weights]
WITH_ZEROS = [some_zero_weights, single_nonzero_weight, all_zero_weights, mixed_zero_weights]

every_shape = pytest.mark.parametrize(
    "shape", [(2,), (7, 2, 3)], ids=lambda shape: "x".join(map(str, shape))
)


def every_kind(shape):
    """The name of each kind, and log-weights of it."""
    for make in FINITE + WITH_ZEROS:
        yield make.__name__, make(np.random.default_rng(0), shape)


def assert_matches(actual, desired, kind=""):
    np.testing.assert_allclose(actual, desired, rtol=1e-12, atol=ATOL, err_msg=kind)


@pytest.mark.usefixtures("strict_promotion")
@every_shape
@pytest.mark.parametrize("name", [*SIGNALS, *BOUNDS, *STATISTICS])
def test_value(backend, name, shape):
    function, options = {**SIGNALS, **BOUNDS, **STATISTICS}[name]
    value = backend.as_a_whole(partial(getattr(backend.estimators, function), **options))
    for kind, log_weights in every_kind(shape):
        actual = backend.numpy(value(backend.array(log_weights)))
        assert_matches(actual, getattr(oracle, function)(log_weights, **options), kind)


@pytest.mark.usefixtures("strict_promotion")
@every_shape
@pytest.mark.parametrize(
    ("num_auxiliary", "make_auxiliary"),
    [(1, random_weights), (4, spread_weights), (3, mixed_zero_weights)],
    ids=["S1-random", "S4-spread", "S3-mixed_zero"],
)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_value_of_ovis_mc(backend, make_auxiliary, num_auxiliary, shape, alpha):
    value = backend.as_a_whole(partial(backend.estimators.ovis_mc_learning_signal, alpha=alpha))
    auxiliary = make_auxiliary(np.random.default_rng(1), (num_auxiliary, *shape[1:]))
    for kind, log_weights in every_kind(shape):
        actual = backend.numpy(value(backend.array(log_weights), backend.array(auxiliary)))
        desired = oracle.ovis_mc_learning_signal(log_weights, auxiliary, alpha=alpha)
        assert_matches(actual, desired, kind)


@pytest.mark.parametrize("name", [*SIGNALS, *STATISTICS])
def test_coefficients_are_detached(backend, name):
    # A signal that keeps its history is differentiated a second time by whoever multiplies
    # log q with it: the commonest wrong VIMCO.
    function, options = {**SIGNALS, **STATISTICS}[name]
    log_weights = np.random.default_rng(0).normal(size=(3, 2))

    (gradient,) = backend.gradients(
        lambda lw: getattr(backend.estimators, function)(lw, **options), log_weights
    )

    np.testing.assert_array_equal(gradient, 0.0)


def test_ovis_mc_is_detached(backend):
    rng = np.random.default_rng(0)
    gradients = backend.gradients(
        backend.estimators.ovis_mc_learning_signal, rng.normal(size=(3, 2)), rng.normal(size=(4, 2))
    )
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0.0)


def gradients_of_every_kind(backend, bound, shape):
    """The name of each kind, the log-weights, and the derivative of a bound in them.

    All at once, side by side in a new last axis: each column has a bound of its own.
    """
    kinds, log_weights = zip(*every_kind(shape), strict=True)
    (gradient,) = backend.gradients(bound, np.stack(log_weights, axis=-1))
    return zip(kinds, log_weights, np.moveaxis(gradient, -1, 0), strict=True)


@every_shape
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, -1.0])
def test_gradient_of_the_bounds(backend, alpha, shape):
    bound = partial(backend.estimators.renyi_bound, alpha=alpha)
    for kind, log_weights, gradient in gradients_of_every_kind(backend, bound, shape):
        # d/d lw_k of log(mean w^(1-alpha)) / (1-alpha) is the normalised weight of w_k^(1-alpha).
        with np.errstate(invalid="ignore"):  # 0 * -inf at alpha = 1
            tempered = np.where(alpha == 1, 0.0, (1 - alpha) * log_weights)
        assert_matches(gradient, oracle.normalized_weights(tempered), kind)


def test_gradient_of_the_iwae_bound(backend):
    bound = backend.estimators.iwae_bound
    for kind, log_weights, gradient in gradients_of_every_kind(backend, bound, (3, 4)):
        assert_matches(gradient, oracle.normalized_weights(log_weights), kind)

    alone = np.random.default_rng(0).normal(size=3)
    (gradient,) = backend.gradients(bound, alone)
    assert_matches(gradient, oracle.normalized_weights(alone))


@pytest.fixture
def functional():
    """Arguments of the linear functional: log-probabilities, then coefficients."""
    rng = np.random.default_rng(0)
    log_probs = dict(
        zip(["log_p", "log_q_path", "log_q_score"], rng.normal(size=(3, 5, 2)), strict=True)
    )
    coefficients = dict(
        zip(["weights", "learning_signal"], rng.normal(size=(2, 5, 2)), strict=True)
    )
    return log_probs, coefficients


def surrogate_of(backend):
    def surrogate(log_p, log_q_path, log_q_score, weights, learning_signal):
        return backend.estimators.linear_surrogate(
            log_p, log_q_path, log_q_score, weights=weights, learning_signal=learning_signal
        )

    return surrogate


def test_surrogate_value(backend, functional):
    log_probs, coefficients = functional
    arguments = [backend.array(x) for x in [*log_probs.values(), *coefficients.values()]]

    actual = surrogate_of(backend)(*arguments)

    assert_matches(backend.numpy(actual), oracle.linear_surrogate(**log_probs, **coefficients))


def test_gradient_of_the_surrogate_is_its_coefficients(backend, functional):
    log_probs, coefficients = functional
    weights, signal = coefficients.values()

    gradients = backend.gradients(
        surrogate_of(backend), *log_probs.values(), *coefficients.values()
    )

    # The coefficients themselves are detached, whatever their history.
    for actual, desired in zip(
        gradients, [weights, -weights, signal, 0 * weights, 0 * signal], strict=True
    ):
        assert_matches(actual, desired)


def test_surrogate_drops_terms_with_coefficient_zero(backend, functional):
    log_probs, coefficients = functional
    log_probs["log_p"][0] = -np.inf
    log_probs["log_q_score"][1] = -np.inf
    coefficients["weights"][0] = 0.0
    coefficients["learning_signal"][1] = 0.0
    everything = [*log_probs.values(), *coefficients.values()]

    value = surrogate_of(backend)(*(backend.array(x) for x in everything))
    gradients = backend.gradients(surrogate_of(backend), *everything)

    assert_matches(backend.numpy(value), oracle.linear_surrogate(**log_probs, **coefficients))
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    np.testing.assert_array_equal(gradients[0][0], 0.0)
    np.testing.assert_array_equal(gradients[2][1], 0.0)
