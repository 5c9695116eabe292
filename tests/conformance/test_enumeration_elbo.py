"""Bias and variance of the ELBO classes as exact numbers, through each class's own gradient.

Every K-tuple of latent values is replayed into the guide, and the class's loss is differentiated
as SVI would. Weighted by the tuples' probabilities, its mean and covariance are exact.
"""

from functools import cache, partial

import numpy as np
import pytest

from tests.conformance import programs
from tests.conformance.backends import backend_for
from tests.conformance.replay import Prescription, draws, evaluations, every_tuple
from tests.conftest import require_host
from tests.oracles import enumeration
from tests.oracles import multisample as oracle


class Objective:
    """An ELBO class with its options, and the oracle of its learning signal."""

    def __init__(self, name, signal, *, num_particles, bias=0.0, **options):
        self.name = name
        self.num_particles = num_particles
        self.num_auxiliary = options.get("num_auxiliary", 0)
        self.num_replicates = options.get("num_replicates", 1)
        self.signal = signal
        # The multiple of E[sum_k v_k h_k] that is added to the bound's gradient; None where it is
        # not the gradient of a bound at all.
        self.gamma = bias
        self.options = options

    @property
    def num_draws(self):
        return self.num_replicates * (self.num_particles + self.num_auxiliary)

    def build(self, package, **host_arguments):
        return getattr(package, self.name)(self.num_particles, **self.options, **host_arguments)


def iwae(K, **options):
    return Objective("IWAE", oracle.reinforce_learning_signal, num_particles=K, **options)


def vimco(K, leave_one_out, **options):
    bias = None if options.get("reparam") == "score" else 0.0  # see discrete_then_scored
    signal = partial(oracle.vimco_learning_signal, leave_one_out=leave_one_out)
    return Objective(
        "VIMCO", signal, num_particles=K, bias=bias, leave_one_out=leave_one_out, **options
    )


def ovis(K, gamma, **options):
    signal = partial(oracle.ovis_gamma_learning_signal, gamma=gamma)
    return Objective("OVIS", signal, num_particles=K, bias=gamma, gamma=gamma, **options)


def ovis_mc(K, S, **options):
    return Objective(
        "OVIS", oracle.ovis_mc_learning_signal, num_particles=K, num_auxiliary=S, **options
    )


def wake_sleep(K, **options):
    return Objective(
        "ReweightedWakeSleep",
        oracle.wake_phi_learning_signal,
        num_particles=K,
        bias=None,
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
    "ovis-gamma0.5-K2": ovis(2, 0.5),
    "ovis-mc-K2-S1": ovis_mc(2, 1),
    "wake-sleep-K2": wake_sleep(2),
    "iwae-K1-R3": iwae(1, num_replicates=3),
    "vimco-geometric-K2-R2": vimco(2, "geometric", num_replicates=2),
    "ovis-mc-K2-S1-R2": ovis_mc(2, 1, num_replicates=2),
    "vimco-geometric-K2-score": vimco(2, "geometric", reparam="score"),
}
# The first nine are every estimator there is.
CASES = [("categorical", objective) for objective in list(OBJECTIVES)[:9]]
CASES += [
    ("one_bit", objective)
    for objective in ["iwae-K1", "iwae-K1-R3", "vimco-geometric-K2-R2", "ovis-mc-K2-S1-R2"]
]
CASES += [
    (program, objective)
    for program in ["discrete_then_reparameterised", "reparameterised_then_discrete", "plate"]
    for objective in ["iwae-K2", "vimco-geometric-K3", "ovis-gamma0.5-K2", "ovis-mc-K2-S1"]
]
CASES += [
    (program, "vimco-geometric-K2")
    for program in [
        "mixed",
        "reparameterised",
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
]
CASES += [
    (program, objective)
    for program in ["scaled", "annealed_latents", "masked", "subsampled_plate"]
    for objective in ["iwae-K2", "ovis-gamma0.5-K2"]
]
CASES += [
    (program, "wake-sleep-K2")
    for program in ["auxiliary_site", "plate", "scaled", "subsampled_plate", "discrete_then_scored"]
]
CASES += [("discrete_then_scored", "vimco-geometric-K2-score")]
# Particles one after the other: Pyro's default, and a Python loop in NumPyro.
ONE_BY_ONE = [
    ("categorical", "ovis-mc-K2-S2"),
    ("plate", "vimco-geometric-K3"),
    ("mixed", "vimco-geometric-K2"),
    ("subsampled_plate", "ovis-gamma0.5-K2"),
    ("one_bit", "iwae-K1-R3"),
    ("auxiliary_site", "wake-sleep-K2"),
]


@cache
def program_for(name):
    return getattr(programs, name)()


@cache
def evaluate(host, program, objective, particles="vmap"):
    """The class's loss and gradient at every tuple."""
    objective = OBJECTIVES[objective]
    return evaluations(
        host,
        partial(objective.build, backend_for(host).package),
        program_for(program),
        every_tuple(program_for(program), objective.num_draws),
        particles=particles,
    )


@cache
def probabilities(program, objective):
    return enumeration.tuple_probabilities(
        program_for(program).problem, OBJECTIVES[objective].num_draws
    )


def moments_by_oracle(program, objective):
    objective_ = OBJECTIVES[objective]
    gradients = enumeration.estimator_gradients(
        program_for(program).problem,
        objective_.num_particles,
        objective_.signal,
        oracle.normalized_weights,
        num_auxiliary=objective_.num_auxiliary,
        num_replicates=objective_.num_replicates,
    )
    return enumeration.moments(gradients, probabilities(program, objective))


def assert_equal(actual, desired, what=""):
    np.testing.assert_allclose(actual, desired, rtol=0, atol=1e-10, err_msg=what)


def check_bias(gradients, program, objective):
    """Unbiased for the bound; or biased by exactly gamma times the wake-phi gradient."""
    mean = probabilities(program, objective) @ gradients
    problem, K = program_for(program).problem, OBJECTIVES[objective].num_particles
    bias = mean - enumeration.exact_gradient(problem, K)
    gamma = OBJECTIVES[objective].gamma
    expected = 0.0
    if gamma:
        wake_phi = oracle.wake_phi_learning_signal
        expected = gamma * enumeration.expected_score(problem, K, wake_phi)
    assert_equal(bias, expected, "bias")


def check_moments(gradients, program, objective):
    """Exact mean and covariance, those of the estimator as it is defined."""
    actual = enumeration.moments(gradients, probabilities(program, objective))
    desired = moments_by_oracle(program, objective)
    assert_equal(actual.mean, desired.mean, "mean")
    assert_equal(actual.covariance, desired.covariance, "covariance")


def check_value(losses, program, objective):
    """The loss is minus the bound; tuples without weight are not part of the objective."""
    problem = program_for(program).problem
    bound = enumeration.expected_bound(problem, problem.params, OBJECTIVES[objective].num_particles)
    losses = np.where(np.isposinf(losses), 0.0, losses)
    assert_equal(-losses @ probabilities(program, objective), bound, "value")


def check_everything(host, program, objective, particles):
    losses, gradients = evaluate(host, program, objective, particles)
    check_value(losses, program, objective)
    if OBJECTIVES[objective].gamma is not None:
        check_bias(gradients, program, objective)
    check_moments(gradients, program, objective)


def each_case(cases):
    return pytest.mark.parametrize(
        ("program", "objective"), cases, ids=["-".join(case) for case in cases]
    )


@each_case(CASES)
def test_value_bias_and_covariance(backend, program, objective):
    check_everything(backend.host, program, objective, "vmap")


@each_case(ONE_BY_ONE)
def test_particles_one_by_one(backend, program, objective):
    check_everything(backend.host, program, objective, "loop")


@pytest.mark.parametrize("objective", ["vimco-geometric-K2", "ovis-gamma0.5-K2"])
def test_sequential_plate(objective):
    require_host("pyro")  # NumPyro's plates are no loops
    check_everything("pyro", "sequential_plate", objective, "loop")


@pytest.mark.filterwarnings("ignore:Every particle has zero weight:UserWarning")
@pytest.mark.parametrize(
    "objective", ["iwae-K3", "vimco-geometric-K3", "ovis-gamma0.5-K3", "ovis-mc-K2-S2"]
)
def test_impossible_state(backend, objective):
    # The expected bound is -inf, so there is no gradient to be unbiased for (test_enumeration.py
    # has what can be said of the bias). But every gradient is finite, and the one defined.
    losses, gradients = evaluate(backend.host, "impossible_state", objective)
    check_value(losses, "impossible_state", objective)
    check_moments(gradients, "impossible_state", objective)


def test_subsampling_is_unbiased_for_all_data(backend):
    _, gradients = evaluate(backend.host, "subsampled_plate", "iwae-K2")
    mean = probabilities("subsampled_plate", "iwae-K2") @ gradients
    all_data = program_for("subsampled_plate").full_problem
    assert_equal(mean, enumeration.exact_gradient(all_data, 2))


@pytest.mark.parametrize("insomnia", [0.0, 0.25], ids="insomnia{}".format)
def test_sleep_phi(backend, insomnia):
    """lambda times wake-phi plus (1 - lambda) times sleep-phi, over all draws and dreams."""
    program, K = program_for("dreaming"), 2
    problem, dreams = program.problem, programs.dream_states()
    awake = every_tuple(program, K).values["z"]  # [T, K]
    num_tuples, num_dreams = len(awake), len(dreams)
    of_dream = {site: np.array([dream[site] for dream in dreams]) for site in ("z", "x")}
    z = np.concatenate(
        [np.repeat(awake, num_dreams, axis=0), np.tile(of_dream["z"], num_tuples)[:, None]], axis=1
    )
    x = np.repeat(np.tile(of_dream["x"], num_tuples)[:, None], K + 1, axis=1)

    actual = evaluations(
        backend.host,
        partial(
            backend.package.ReweightedWakeSleep,
            K,
            insomnia=insomnia,
            num_sleep_particles=1,
            dream_inputs=lambda dream, x: (dream["x"],),
        ),
        program,
        Prescription({"z": z, "x": x}),
        arguments=(1,),
    )

    wake_probability = enumeration.tuple_probabilities(problem, K)
    dream_probability = np.exp([programs.log_p_of_dream(problem.params, dream) for dream in dreams])
    wake = enumeration.moments(
        enumeration.estimator_gradients(
            problem,
            K,
            lambda lw: insomnia * oracle.wake_phi_learning_signal(lw),
            oracle.normalized_weights,
        ),
        wake_probability,
    )
    sleep = enumeration.moments(
        enumeration.complex_step_gradient(
            lambda params: np.array([programs.log_q_of_dream(params, dream) for dream in dreams]),
            problem.params,
        ).T,
        dream_probability,
    )
    actual = enumeration.moments(
        actual.gradients, np.outer(wake_probability, dream_probability).ravel()
    )
    assert_equal(actual.mean, wake.mean + (1 - insomnia) * sleep.mean, "mean")
    # Draws and dreams are independent of each other.
    covariance = wake.covariance + (1 - insomnia) ** 2 * sleep.covariance
    assert_equal(actual.covariance, covariance, "covariance")


@pytest.mark.parametrize("vectorize_particles", [True, False], ids=["vectorised", "one-by-one"])
def test_ordinary_draws_give_the_replayed_gradients(backend, vectorize_particles):
    """Without a replayer: each gradient is one of those enumerated, and all of these occur.

    So what was enumerated above is what SVI does, however the particles are drawn.
    """
    objective, num_seeds = "vimco-geometric-K2", 60
    program = program_for("categorical")
    enumerated = evaluate(backend.host, "categorical", objective).gradients
    distinct = np.unique(np.round(enumerated, 8), axis=0)

    drawn = draws(
        backend.host,
        OBJECTIVES[objective].build(backend.package, vectorize_particles=vectorize_particles),
        program,
        num_seeds,
    )

    distance = np.abs(drawn[:, None] - distinct).max(axis=2)
    assert distance.min(axis=1).max() < 1e-7
    assert set(distance.argmin(axis=1)) == set(range(len(distinct)))
