"""Value, bias and covariance of the ELBO classes as exact numbers, through each class's gradient.

Every K-tuple of latent values is replayed into the guide, and the class's loss is differentiated
as SVI would. Weighted by the tuples' probabilities, its mean and covariance are exact.
"""

from functools import partial

import numpy as np
import pytest

from tests.conformance import programs
from tests.conformance.objectives import (
    OBJECTIVES,
    assert_equal,
    check_bias,
    check_moments,
    check_value,
    evaluate,
    probabilities,
    program_for,
)
from tests.conformance.replay import Prescription, draws, evaluations, every_tuple
from tests.conftest import require_host
from tests.oracles import enumeration
from tests.oracles import multisample as oracle

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
CASES += [
    ("categorical", "vimco-alpha-K3"),
    ("mixed", "ovis-alpha-K2"),
    ("scaled", "iwae-alpha-K2"),
    ("subsampled_plate", "vimco-elbo-K2"),
    ("categorical", "rloo-K3"),
    ("mixed", "rloo-K2"),
    ("categorical", "tvo-elbo-K3"),
    ("categorical", "tvo-K3"),
    ("masked", "tvo-K2"),
    ("subsampled_plate", "tvo-K2"),
]
# Particles one after the other: Pyro's default, and a Python loop in NumPyro.
ONE_BY_ONE = [
    ("categorical", "ovis-mc-K2-S2"),
    ("plate", "vimco-geometric-K3"),
    ("mixed", "vimco-geometric-K2"),
    ("subsampled_plate", "ovis-gamma0.5-K2"),
    ("one_bit", "iwae-K1-R3"),
    ("auxiliary_site", "wake-sleep-K2"),
    ("annealed_latents", "tvo-K2"),
]


def check_everything(host, program, objective, particles):
    losses, gradients = evaluate(host, program, objective, particles)
    if OBJECTIVES[objective].is_bound:
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


@pytest.mark.parametrize(
    "options",
    [
        {"vectorize_particles": True},
        {"vectorize_particles": False},
        {"vectorize_particles": True, "chunk_size": 1},
        {"vectorize_particles": False, "chunk_size": 1},
    ],
    ids=["vectorised", "one-by-one", "vectorised-chunks", "one-by-one-chunks"],
)
def test_ordinary_draws_give_the_replayed_gradients(backend, options):
    """Without a replayer: each gradient is one of those enumerated, and all of these occur.

    So what was enumerated above is what SVI does, however the particles are drawn.
    """
    program, objective, num_seeds = "auxiliary_site", "vimco-geometric-K2", 100
    enumerated = evaluate(backend.host, program, objective).gradients
    distinct = np.unique(np.round(enumerated, 8), axis=0)

    drawn = draws(
        backend.host,
        OBJECTIVES[objective].build(backend.package, **options),
        program_for(program),
        num_seeds,
    )

    distance = np.abs(drawn[:, None] - distinct).max(axis=2)
    assert distance.min(axis=1).max() < 1e-7
    assert set(distance.argmin(axis=1)) == set(range(len(distinct)))


@pytest.mark.parametrize("program", ["mixed", "subsampled_plate"])
def test_chunks_have_the_gradient_of_the_whole(backend, program):
    """The same random numbers, and to rounding the same gradient; auxiliary draws included."""
    # Vectorised, Pyro's one generator fills site after site: chunks draw in another order.
    objective = partial(
        backend.package.OVIS,
        3,
        num_auxiliary=3,
        num_replicates=2,
        vectorize_particles=backend.host == "numpyro",
    )
    whole = draws(backend.host, objective(), program_for(program), 2)
    chunks = draws(backend.host, objective(chunk_size=4), program_for(program), 2)  # 4 + 2 of 6
    assert_equal(chunks, whole)
