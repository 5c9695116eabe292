"""Bias and variance of the ELBO classes as exact numbers, through each class's own gradient.

Every K-tuple of latent values is replayed into the guide, and the class's loss is differentiated
as SVI would. Weighted by the tuples' probabilities, its mean and covariance are exact.
"""

from functools import cache, partial

import numpy as np
import pytest

from tests.conformance import programs
from tests.conformance.backends import backend_for
from tests.conformance.replay import evaluations, every_tuple
from tests.oracles import enumeration
from tests.oracles import multisample as oracle


class Objective:
    """An ELBO class with its options, and the oracle of its learning signal."""

    def __init__(self, name, signal, *, num_particles, biased=0.0, **options):
        self.name = name
        self.num_particles = num_particles
        self.num_auxiliary = options.get("num_auxiliary", 0)
        self.num_replicates = options.get("num_replicates", 1)
        self.signal = signal
        self.biased = biased  # the multiple of E[sum_k v_k h_k] that it adds; None: no bound's
        self.options = options

    @property
    def num_draws(self):
        return self.num_replicates * (self.num_particles + self.num_auxiliary)

    def build(self, package, **host_arguments):
        return getattr(package, self.name)(self.num_particles, **self.options, **host_arguments)


def iwae(K, **options):
    return Objective("IWAE", oracle.reinforce_learning_signal, num_particles=K, **options)


def vimco(K, leave_one_out, **options):
    signal = partial(oracle.vimco_learning_signal, leave_one_out=leave_one_out)
    return Objective("VIMCO", signal, num_particles=K, leave_one_out=leave_one_out, **options)


def ovis(K, gamma, **options):
    signal = partial(oracle.ovis_gamma_learning_signal, gamma=gamma)
    return Objective("OVIS", signal, num_particles=K, biased=gamma, gamma=gamma, **options)


def ovis_mc(K, S, **options):
    return Objective(
        "OVIS", oracle.ovis_mc_learning_signal, num_particles=K, num_auxiliary=S, **options
    )


def wake_sleep(K, **options):
    return Objective(
        "ReweightedWakeSleep",
        oracle.wake_phi_learning_signal,
        num_particles=K,
        biased=None,
        **options,
    )


OBJECTIVES = {
    "iwae-K3": iwae(3),
    "vimco-geometric-K3": vimco(3, "geometric"),
    "vimco-arithmetic-K3": vimco(3, "arithmetic"),
    "ovis-gamma0-K3": ovis(3, 0.0),
    "ovis-gamma0.5-K3": ovis(3, 0.5),
    "ovis-gamma1-K3": ovis(3, 1.0),
    "ovis-mc-K3-S1": ovis_mc(3, 1),
    "ovis-mc-K2-S2": ovis_mc(2, 2),
    "wake-sleep-K3": wake_sleep(3),
    "iwae-K1": iwae(1),
    "iwae-K2": iwae(2),
    "vimco-geometric-K2": vimco(2, "geometric"),
    "ovis-gamma0-K2": ovis(2, 0.0),
    "ovis-gamma0.5-K2": ovis(2, 0.5),
    "ovis-mc-K2-S1": ovis_mc(2, 1),
    "wake-sleep-K2": wake_sleep(2),
    "iwae-K1-R3": iwae(1, num_replicates=3),
    "vimco-geometric-K2-R2": vimco(2, "geometric", num_replicates=2),
    "ovis-mc-K2-S1-R2": ovis_mc(2, 1, num_replicates=2),
}

# Every objective on the categorical site; the others see what is special about them through a few.
CASES = [("categorical", objective) for objective in OBJECTIVES if objective != "ovis-mc-K2-S1-R2"]
CASES += [
    (program, objective)
    for program in ["discrete_then_reparameterised", "reparameterised_then_discrete", "plate"]
    for objective in ["iwae-K2", "vimco-geometric-K3", "ovis-gamma0.5-K2", "ovis-mc-K2-S1"]
]
CASES += [("mixed", objective) for objective in ["vimco-geometric-K2", "ovis-gamma0-K2"]]
CASES += [
    (program, objective)
    for program in [
        "auxiliary_site",
        "global_and_local",
        "nested_plates",
        "scaled",
        "scaled_per_element",
        "tempered_likelihood",
        "annealed_latents",
        "masked",
        "masked_observation",
        "subsampled_plate",
    ]
    for objective in ["iwae-K2", "ovis-gamma0.5-K2"]
]
CASES += [
    (program, "wake-sleep-K2")
    for program in ["auxiliary_site", "plate", "scaled", "subsampled_plate"]
]
CASES += [("plate", "ovis-mc-K2-S1-R2")]
IMPOSSIBLE = [
    ("impossible_state", objective)
    for objective in ["iwae-K3", "vimco-geometric-K3", "ovis-gamma0.5-K3", "ovis-mc-K2-S2"]
]


@cache
def program_for(name):
    return getattr(programs, name)()


@cache
def evaluate(host, particles, program, objective):
    """The class's loss and gradient at every tuple."""
    program, objective = program_for(program), OBJECTIVES[objective]
    return evaluations(
        host,
        partial(objective.build, backend_for(host).package),
        program,
        every_tuple(program, objective.num_draws),
        particles=particles,
    )


@cache
def probabilities(program, num_draws):
    return enumeration.tuple_probabilities(program_for(program).problem, num_draws)


@cache
def moments_by_oracle(program, objective):
    objective = OBJECTIVES[objective]
    gradients = enumeration.estimator_gradients(
        program_for(program).problem,
        objective.num_particles,
        objective.signal,
        oracle.normalized_weights,
        num_auxiliary=objective.num_auxiliary,
        num_replicates=objective.num_replicates,
    )
    return enumeration.moments(gradients, probabilities(program, objective.num_draws))


def moments_of(host, particles, program, objective):
    gradients = evaluate(host, particles, program, objective).gradients
    return enumeration.moments(gradients, probabilities(program, OBJECTIVES[objective].num_draws))


@cache
def exact_gradient(program, num_particles):
    return enumeration.exact_gradient(program_for(program).problem, num_particles)


def assert_equal(actual, desired):
    np.testing.assert_allclose(actual, desired, rtol=0, atol=1e-10)


def each_case(cases):
    return pytest.mark.parametrize(
        ("program", "objective"), cases, ids=["-".join(case) for case in cases]
    )


how = pytest.mark.parametrize("particles", ["vmap", "loop"])


@how
@each_case([case for case in CASES if OBJECTIVES[case[1]].biased is not None])
def test_bias(backend, particles, program, objective):
    """Unbiased, or biased by exactly gamma times the wake-phi gradient."""
    actual = moments_of(backend.host, particles, program, objective).mean
    objective = OBJECTIVES[objective]
    bias = actual - exact_gradient(program, objective.num_particles)
    wake_phi = enumeration.expected_score(
        program_for(program).problem, objective.num_particles, oracle.wake_phi_learning_signal
    )
    assert_equal(bias, objective.biased * wake_phi)


@how
@each_case(CASES + IMPOSSIBLE)
def test_mean_and_covariance_equal_the_oracle(backend, particles, program, objective):
    actual = moments_of(backend.host, particles, program, objective)
    desired = moments_by_oracle(program, objective)
    assert_equal(actual.mean, desired.mean)
    assert_equal(actual.covariance, desired.covariance)


@how
@each_case(CASES + IMPOSSIBLE)
def test_expected_loss_is_minus_the_expected_bound(backend, particles, program, objective):
    problem = program_for(program).problem
    losses = evaluate(backend.host, particles, program, objective).losses
    losses = np.where(np.isposinf(losses), 0.0, losses)  # no weight: not part of the objective
    num_draws = OBJECTIVES[objective].num_draws
    expected = enumeration.expected_bound(
        problem, problem.params, OBJECTIVES[objective].num_particles
    )
    assert_equal(-losses @ probabilities(program, num_draws), expected)


@how
def test_subsampling_is_unbiased_for_all_data(backend, particles):
    actual = moments_of(backend.host, particles, "subsampled_plate", "iwae-K2").mean
    all_data = program_for("subsampled_plate").full_problem
    assert_equal(actual, enumeration.exact_gradient(all_data, 2))
