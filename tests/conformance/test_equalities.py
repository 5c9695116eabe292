"""Identities between estimators, and between ours and the host's own ELBO.

Where two estimators are equal, they are equal at every tuple of particles, not only on average.
"""

from functools import partial

import numpy as np
import pytest

from tests.conformance.objectives import assert_equal, evaluate, program_for
from tests.conformance.replay import evaluations, every_tuple
from tests.oracles import enumeration

PROGRAM = "categorical"
K = 3


@pytest.fixture
def log_weights():
    return 2 * np.random.default_rng(0).normal(size=(5, 4))


def signal(backend, name, log_weights, *auxiliary, **options):
    arrays = map(backend.array, (log_weights, *auxiliary))
    return backend.numpy(getattr(backend.estimators, name)(*arrays, **options))


def gradients(backend, objective, program=PROGRAM):
    """The class's gradient at every tuple."""
    return evaluate(backend.host, program, objective).gradients


def sum_of_scores(program=PROGRAM):
    """sum_k h_k at every tuple, by the oracle."""
    return enumeration.estimator_gradients(
        program_for(program).problem, K, np.ones_like, np.zeros_like
    )


# --- layer 1 -------------------------------------------------------------------------------------


def test_ovis_is_arithmetic_vimco_minus_a_constant(backend, log_weights):
    ovis = signal(backend, "ovis_gamma_learning_signal", log_weights, gamma=0.0)
    vimco = signal(backend, "vimco_learning_signal", log_weights, leave_one_out="arithmetic")
    assert_equal(ovis, vimco - np.log1p(-1 / len(log_weights)))


def test_gamma_adds_wake_phi_and_a_constant(backend, log_weights):
    plain = signal(backend, "ovis_gamma_learning_signal", log_weights, gamma=0.0)
    mixed = signal(backend, "ovis_gamma_learning_signal", log_weights, gamma=0.3)
    wake_phi = signal(backend, "wake_phi_learning_signal", log_weights)
    assert_equal(mixed - plain, 0.3 * (wake_phi + np.log1p(-1 / len(log_weights))))


def test_the_two_means_of_one_other_particle_are_the_same(backend, log_weights):
    geometric, arithmetic = (
        signal(backend, "vimco_learning_signal", log_weights[:2], leave_one_out=mean)
        for mean in ("geometric", "arithmetic")
    )
    assert_equal(geometric, arithmetic)


def test_renyi_bound_ends_at_the_iwae_bound_and_the_elbo(backend, log_weights):
    iwae = signal(backend, "iwae_bound", log_weights)
    assert_equal(signal(backend, "renyi_bound", log_weights, alpha=0.0), iwae)
    elbo = log_weights.mean(axis=0)
    assert_equal(signal(backend, "renyi_bound", log_weights, alpha=1.0), elbo)
    near = signal(backend, "renyi_bound", log_weights, alpha=1 - 1e-6)
    np.testing.assert_allclose(near, elbo, atol=1e-5)


CONTROL_VARIATES = {
    "none": "reinforce",
    "geometric": "vimco-geometric",
    "arithmetic": "vimco-arithmetic",
    "asymptotic": "ovis-gamma0",
}


@pytest.mark.parametrize("control_variate", CONTROL_VARIATES)
def test_order_zero_is_the_importance_weighted_bound_bit_for_bit(
    backend, log_weights, control_variate
):
    function, options = (SIGNALS | {"ovis-gamma0": ("ovis_gamma_learning_signal", {})})[
        CONTROL_VARIATES[control_variate]
    ]
    np.testing.assert_array_equal(
        signal(
            backend,
            "renyi_learning_signal",
            log_weights,
            alpha=0.0,
            control_variate=control_variate,
        ),
        signal(backend, function, log_weights, **options),
    )
    np.testing.assert_array_equal(
        signal(backend, "renyi_weights", log_weights, alpha=0.0),
        signal(backend, "normalized_weights", log_weights),
    )


@pytest.mark.parametrize("control_variate", CONTROL_VARIATES)
def test_order_one_is_the_limit(backend, log_weights, control_variate):
    """The ELBO, with the log-weights of the other particles for a baseline."""
    options = {"control_variate": control_variate}
    near, at = (
        signal(backend, "renyi_learning_signal", log_weights, alpha=alpha, **options)
        for alpha in (1 - 1e-6, 1.0)
    )
    np.testing.assert_allclose(near, at, atol=1e-5)
    if control_variate in ("geometric", "arithmetic"):
        K = len(log_weights)
        others = (log_weights.sum(axis=0) - log_weights) / (K - 1)
        assert_equal(at, (log_weights - others - 1) / K)


def test_doubly_reparameterised_elbo_is_stl(backend, log_weights):
    """At order one the path has the weights of the bound: the ELBO sticks the landing."""
    weights = signal(backend, "dreg_weights", log_weights, alpha=1.0)
    assert_equal(weights, signal(backend, "renyi_weights", log_weights, alpha=1.0))
    assert_equal(weights, 1 / len(log_weights))


def test_one_thermodynamic_interval_is_leave_one_out_reinforce(backend, log_weights):
    """Up to the derivative of log q in its own cost, -1/K, which has mean zero."""
    rloo = signal(backend, "reinforce_leave_one_out_learning_signal", log_weights)
    tvo = signal(backend, "thermodynamic_learning_signal", log_weights, partition=[0.0])
    assert_equal(tvo, rloo - 1 / len(log_weights))
    elbo = signal(backend, "renyi_bound", log_weights, alpha=1.0)
    assert_equal(signal(backend, "thermodynamic_bound", log_weights, partition=[0.0]), elbo)


def test_leave_one_out_reinforce_is_vimco_of_order_one(backend, log_weights):
    options = {"alpha": 1.0, "control_variate": "geometric"}
    vimco = signal(backend, "renyi_learning_signal", log_weights, **options)
    rloo = signal(backend, "reinforce_leave_one_out_learning_signal", log_weights)
    assert_equal(rloo, vimco + 1 / len(log_weights))


def test_auxiliary_draws_equal_to_the_particle_leave_minus_nothing(backend):
    # If the only auxiliary draw is as likely as each particle, it predicts L - v_k exactly.
    equal = np.full((4, 2), -1.7)
    assert_equal(signal(backend, "ovis_mc_learning_signal", equal, equal[:1]), 0.0)


SIGNALS = {
    "reinforce": ("reinforce_learning_signal", {}),
    "vimco-geometric": ("vimco_learning_signal", {}),
    "vimco-arithmetic": ("vimco_learning_signal", {"leave_one_out": "arithmetic"}),
    "ovis": ("ovis_gamma_learning_signal", {"gamma": 0.5}),
    "wake-phi": ("wake_phi_learning_signal", {}),
}


@pytest.mark.parametrize("name", SIGNALS)
def test_order_of_particles_does_not_matter(backend, name, log_weights):
    function, options = SIGNALS[name]
    order = np.array([3, 0, 4, 1, 2])
    shuffled = signal(backend, function, log_weights[order], **options)
    assert_equal(shuffled, signal(backend, function, log_weights, **options)[order])


@pytest.mark.parametrize("name", [name for name in SIGNALS if name != "reinforce"])
def test_evidence_does_not_enter_a_leave_one_out_signal(backend, name, log_weights):
    # Adding a constant to log p shifts the bound and its control variate alike.
    function, options = SIGNALS[name]
    shifted = signal(backend, function, log_weights + 123.0, **options)
    assert_equal(shifted, signal(backend, function, log_weights, **options))


def test_batch_elements_do_not_see_each_other(backend, log_weights):
    for function, options in SIGNALS.values():
        together = signal(backend, function, log_weights, **options)
        alone = [signal(backend, function, column, **options) for column in log_weights.T]
        assert_equal(together, np.stack(alone, axis=1))


# --- through the ELBO classes --------------------------------------------------------------------


def test_ovis_gradient_is_that_of_arithmetic_vimco_minus_a_score(backend):
    difference = gradients(backend, "ovis-gamma0-K3") - gradients(backend, "vimco-arithmetic-K3")
    assert_equal(difference, -np.log1p(-1 / K) * sum_of_scores())


def test_gamma_one_minus_gamma_zero_is_the_wake_phi_gradient(backend):
    difference = gradients(backend, "ovis-gamma1-K3") - gradients(backend, "ovis-gamma0-K3")
    wake_phi = difference - np.log1p(-1 / K) * sum_of_scores()
    # The guide's part of wake-sleep is wake-phi alone; the model's part is that of all bounds.
    of_guide = np.flatnonzero(np.abs(sum_of_scores()).max(axis=0))
    wake_sleep = gradients(backend, "wake-sleep-K3")
    assert_equal(wake_phi[:, of_guide], wake_sleep[:, of_guide])
    of_model = np.setdiff1d(np.arange(wake_sleep.shape[1]), of_guide)
    assert_equal(gradients(backend, "iwae-K3")[:, of_model], wake_sleep[:, of_model])


def test_without_discrete_sites_all_bounds_have_the_pathwise_gradient(backend):
    iwae, vimco = (
        gradients(backend, objective, "reparameterised")
        for objective in ("iwae-K2", "vimco-geometric-K2")
    )
    assert_equal(vimco, iwae)


def test_wake_sleep_value_is_that_of_the_bound(backend):
    bound, wake_sleep = (
        evaluate(backend.host, PROGRAM, objective).losses
        for objective in ("iwae-K3", "wake-sleep-K3")
    )
    assert_equal(wake_sleep, bound)


@pytest.fixture
def host_elbo(backend):
    """The host's own ELBO for discrete sites."""
    if backend.host == "pyro":
        from pyro.infer import Trace_ELBO

        return Trace_ELBO
    from numpyro.infer import TraceGraph_ELBO

    return lambda vectorize_particles: TraceGraph_ELBO()


@pytest.mark.parametrize("program", ["one_bit", "plate", "scaled", "subsampled_plate", "masked"])
def test_one_particle_is_the_elbo_of_the_host(backend, host_elbo, program):
    """The same value at every state, and the same gradient on average."""
    problem, draws = program_for(program).problem, every_tuple(program_for(program), 1)
    iwae = partial(backend.package.IWAE, 1)
    ours = evaluations(backend.host, iwae, program_for(program), draws)
    theirs = evaluations(backend.host, host_elbo, program_for(program), draws)
    assert_equal(ours.losses, theirs.losses)
    if backend.host == "numpyro" and program in ("scaled", "subsampled_plate"):
        # TraceGraph_ELBO (numpyro 0.22) multiplies a scaled cost by a scaled log q, so that a
        # discrete guide site gets the square of N/B. Ours is held to the exact gradient.
        return
    probabilities = enumeration.tuple_probabilities(problem, 1)
    assert_equal(probabilities @ ours.gradients, probabilities @ theirs.gradients)


def test_replicates_average_independent_bounds(backend):
    """K = 1 with many replicates is the ELBO with many particles."""
    of_one = evaluate(backend.host, "one_bit", "iwae-K1")
    of_three = evaluate(backend.host, "one_bit", "iwae-K1-R3")
    tuples = np.array(enumeration.tuples(program_for("one_bit").problem, 3))
    assert_equal(of_three.losses, of_one.losses[tuples].mean(axis=1))
    assert_equal(of_three.gradients, of_one.gradients[tuples].mean(axis=1))
