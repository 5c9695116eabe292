"""DisARM: the law of its pairs, its learning signal, and its gradient through the class, exactly.

The joint law of an antithetic pair is known, so every tuple of pairs can be replayed into the
guide, as the tuples of draws are for the other objectives.
"""

from functools import cache, partial
from itertools import product
from typing import NamedTuple

import numpy as np
import pytest

from tests.conformance.backends import backend_for
from tests.conformance.objectives import assert_equal, moments_by_oracle, program_for
from tests.conformance.replay import Prescription, draws, evaluations
from tests.oracles import enumeration
from tests.oracles import multisample as oracle

LOGITS = np.array([-800.0, -3.0, 0.0, 0.4, 800.0])


# --- layer 1 -------------------------------------------------------------------------------------


def test_pairs_have_the_law_of_one_uniform(backend):
    joint = np.array([oracle.antithetic_joint(logit) for logit in LOGITS])  # [logit, b, b~]
    for value in (0, 1):
        values = np.full(len(LOGITS), value)
        probs = backend.estimators.antithetic_probs(*map(backend.array, (values, LOGITS)))
        of_value = joint[:, value].sum(axis=1)
        assert_equal(of_value * backend.numpy(probs), joint[:, value, 1])


def test_score(backend):
    for value, partner in product((0, 1), repeat=2):
        values, partners = (np.full(len(LOGITS), one) for one in (value, partner))
        actual = backend.estimators.antithetic_score(
            *map(backend.array, (values, partners, LOGITS))
        )
        desired = [oracle.antithetic_score(value, partner, logit) for logit in LOGITS]
        assert_equal(backend.numpy(actual), desired)


def test_pairs_are_detached(backend):
    values, partners = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    for function in (
        lambda at: backend.estimators.antithetic_probs(backend.array(values), at),
        lambda at: backend.estimators.antithetic_score(*map(backend.array, (values, partners)), at),
    ):
        assert_equal(backend.gradients(function, np.array([0.3, -0.7]))[0], 0.0)


def hard_log_weights(K):
    """Random, equal, dominated, far apart, and with weights of zero, next to each other."""
    first, partner = 2 * np.random.default_rng(0).normal(size=(2, K, 10))
    first[:, 1] = partner[:, 1] = 0.7
    first[0, 2] += 28
    partner[0, 3] += 800
    first[:, 4:6] -= 1000
    partner[:, 5] -= 1000
    first[0, 6] = -np.inf
    partner[0, 7] = -np.inf
    first[1:, 8] = partner[1:, 8] = -np.inf
    first[:, 9] = partner[:, 9] = -np.inf
    return first, partner


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize("K", [1, 3])
def test_signal(backend, K):
    first, partner = hard_log_weights(K)
    actual = backend.estimators.disarm_learning_signal(*map(backend.array, (first, partner)))
    desired = oracle.disarm_learning_signal(first, partner)
    np.testing.assert_allclose(backend.numpy(actual), desired, rtol=1e-11, atol=1e-12)


def test_signal_in_float32(backend):
    arrays = [one.astype(np.float32) for one in hard_log_weights(5)]
    actual = backend.numpy(backend.estimators.disarm_learning_signal(*map(backend.array, arrays)))
    assert actual.dtype == np.float32
    desired = oracle.disarm_learning_signal(*arrays)
    np.testing.assert_allclose(actual, desired, rtol=1e-4, atol=1e-6)


def test_signal_is_detached(backend):
    gradients = backend.gradients(
        backend.estimators.disarm_learning_signal, *np.random.default_rng(0).normal(size=(2, 3, 4))
    )
    for gradient in gradients:
        assert_equal(gradient, 0.0)


def test_signal_needs_a_partner_for_each_particle(backend):
    arrays = map(backend.array, (np.zeros((3, 2)), np.zeros((2, 2))))
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(2, 2\).*same shape"):
        backend.estimators.disarm_learning_signal(*arrays)


def test_memory_is_linear_in_the_particles(backend):
    K = 64
    arrays = map(backend.array, np.zeros((2, K, 3)))
    size = backend.largest_intermediate(backend.estimators.disarm_learning_signal, *arrays)
    assert size < K * K


# --- the class, by every tuple of pairs ----------------------------------------------------------


def of_bit(params, state, subsample):
    return state["z"], params["logit"]


def of_plate(params, state, subsample):
    logits = params["logits"] if subsample is None else params["logits"][subsample]
    return state["z"][:, None], logits[:, None]


def of_vector(params, state, subsample):
    return state["z"], params["logits"]


def of_both_levels(params, state, subsample):
    logits = np.append(params["global_logit"], params["logits"])
    return np.append(state["g"], state["z"]), logits


def of_noise(params, state, subsample):
    y = params["loc"] + state["y"] * np.exp(params["log_scale"])
    return state["z"], params["slope"] * y - 0.3


PLATES = ["scaled", "scaled_per_element", "annealed_latents", "masked", "subsampled_plate"]
# program -> (params, state, subsample) -> all bits and their log-odds, ``[*batch, bits]``
BITS = {
    "one_bit": of_bit,
    "bit_vector": of_vector,
    "plate": of_plate,
    "nested_plates": of_plate,
    **dict.fromkeys(PLATES, of_plate),
    "global_and_local": of_both_levels,
    "reparameterised_then_discrete": of_noise,
    "discrete_then_reparameterised": of_bit,
}


class Pairs(NamedTuple):
    """Every tuple of K pairs of states: ``[T, K, 2]`` indices, and how likely it is."""

    indices: np.ndarray
    subsamples: list
    probabilities: np.ndarray


@cache
def every_pair(program, K):
    """Of the states that share their noise."""
    problem, noise_sites = program_for(program).problem, program_for(program).noise_sites
    indices, subsamples, probabilities = [], [], []
    for subsample in problem.subsamples:
        pairs, chances = [], []
        for i, j in product(range(len(problem.states)), repeat=2):
            first, partner = problem.states[i], problem.states[j]
            if any(first[site] != partner[site] for site in noise_sites):
                continue
            bits, logits = np.broadcast_arrays(*BITS[program](problem.params, first, subsample))
            others = np.broadcast_to(
                BITS[program](problem.params, partner, subsample)[0], bits.shape
            )
            joint = [
                oracle.antithetic_joint(logit)[b, other]
                for b, other, logit in zip(bits.flat, others.flat, logits.flat, strict=True)
            ]
            pairs.append((i, j))
            chances.append(np.exp(problem.log_noise) * np.prod(joint))
        for chosen in product(range(len(pairs)), repeat=K):
            indices.append([pairs[c] for c in chosen])
            subsamples.append(subsample)
            probabilities.append(np.prod([chances[c] for c in chosen]) / len(problem.subsamples))
    return Pairs(np.array(indices), subsamples, np.array(probabilities))


@cache
def gradients_by_oracle(program, K):
    """By definition: half the derivative of either bound at its draws, and DisARM's of the rest."""
    problem = program_for(program).problem
    pairs = every_pair(program, K)
    tables = {}
    for subsample in problem.subsamples:

        def densities(params, subsample=subsample):
            return np.stack(
                [np.stack(d[:3]) for d in enumeration._all_densities(problem, params, subsample)]
            )

        def bits_and_logits(params, subsample=subsample):
            """``[2, states, *batch, bits]``"""
            each = [
                np.stack(np.broadcast_arrays(*BITS[program](params, state, subsample)))
                for state in problem.states
            ]
            return np.stack(each, axis=1).reshape(2, len(each), *problem.batch_shape, -1)

        bits, log_odds = bits_and_logits(problem.params)
        tables[id(subsample)] = (
            densities(problem.params),
            enumeration.complex_step_gradient(densities, problem.params),
            bits,
            log_odds,
            enumeration.complex_step_gradient(lambda p: bits_and_logits(p)[1], problem.params),
        )
    gradients = []
    for indices, subsample in zip(pairs.indices, pairs.subsamples, strict=True):
        values, slopes, bits, log_odds, odds_slopes = tables[id(subsample)]
        total = 0.0
        log_weights = (values[:, 0] - values[:, 1])[indices]  # [K, 2, *batch]
        for side in (0, 1):
            weights = oracle.normalized_weights(log_weights[:, side])
            for k, state in enumerate(indices[:, side]):
                slope_p, slope_q, slope_score = (slopes[:, state, i] for i in range(3))
                # The score of the draw has mean zero.
                total = total + (weights[k] * (slope_p - slope_q) + slope_score / K) / 2
        signal = oracle.disarm_learning_signal(log_weights[:, 0], log_weights[:, 1])
        for k, (state, partner) in enumerate(indices):
            score = np.vectorize(oracle.antithetic_score)(
                bits[state], bits[partner], log_odds[state]
            )
            total = total + signal[k] * (score * odds_slopes[:, state]).sum(axis=-1)
        total = problem.scale * total
        gradients.append(total.reshape(len(total), -1).sum(axis=1))
    return np.array(gradients)


@cache
def evaluate(host, program, K, particles="vmap"):
    """The class's loss and gradient at every tuple of pairs."""
    return evaluate_at(host, program_for(program), every_pair(program, K), K, particles)


def evaluate_at(host, program, pairs, K, particles="vmap"):
    problem = program.problem
    # Vectorised, Pyro draws all first and then all partners; else each pair comes together.
    order = (0, 2, 1) if host == "pyro" and particles == "vmap" else (0, 1, 2)
    indices = pairs.indices.transpose(order).reshape(len(pairs.indices), -1)
    values = {
        site: np.array([state[site] for state in problem.states])[indices]
        for site in problem.states[0]
    }
    plate = program.subsampled_plate
    subsamples = {plate: np.array(pairs.subsamples)} if plate else None
    return evaluations(
        host,
        partial(backend_for(host).package.DisARM, K),
        program,
        Prescription(values, program.noise_sites, subsamples),
        particles=particles,
        **({"visits": 2} if host == "numpyro" else {}),
    )


CASES = [("one_bit", 1), ("one_bit", 3), ("bit_vector", 1), ("bit_vector", 2)]
CASES += [("reparameterised_then_discrete", 2)]
CASES += [(program, 1) for program in BITS if program not in ("one_bit", "bit_vector")]


def check(host, program, K, particles="vmap"):
    losses, gradients = evaluate(host, program, K, particles)
    problem, probabilities = program_for(program).problem, every_pair(program, K).probabilities
    assert_equal(
        -losses @ probabilities, enumeration.expected_bound(problem, problem.params, K), "value"
    )
    actual = enumeration.moments(gradients, probabilities)
    assert_equal(actual.mean, enumeration.exact_gradient(problem, K), "bias")
    desired = enumeration.moments(gradients_by_oracle(program, K), probabilities)
    assert_equal(actual.covariance, desired.covariance, "covariance")


@pytest.mark.parametrize(("program", "K"), CASES, ids=[f"{name}-K{K}" for name, K in CASES])
def test_value_bias_and_covariance(backend, program, K):
    check(backend.host, program, K)


@pytest.mark.parametrize("program", ["one_bit", "discrete_then_reparameterised"])
def test_particles_one_by_one(backend, program):
    check(backend.host, program, 2, "loop")


def test_subsampling_is_unbiased_for_all_data(backend):
    mean = (
        every_pair("subsampled_plate", 1).probabilities
        @ evaluate(backend.host, "subsampled_plate", 1).gradients
    )
    all_data = program_for("subsampled_plate").full_problem
    assert_equal(mean, enumeration.exact_gradient(all_data, 1))


@pytest.mark.parametrize("program", ["one_bit", "bit_vector"])
def test_less_variance_than_leave_one_out_with_two_draws(backend, program):
    """At equal cost; of the guide's gradient, which is all that differs."""
    problem = program_for(program).problem
    in_guide = np.arange(len(enumeration.flatten(problem.params))) >= 1  # the model has one
    pairs = enumeration.moments(
        evaluate(backend.host, program, 1).gradients, every_pair(program, 1).probabilities
    )
    independent = moments_by_oracle(program, "rloo-K2")
    ours, theirs = (np.diag(one.covariance)[in_guide].sum() for one in (pairs, independent))
    assert_equal(pairs.mean, independent.mean)
    assert ours < 0.95 * theirs


def test_gradient_vanishes_at_the_posterior(backend):
    """With every tuple of pairs, not only on average."""
    program, K = program_for("one_bit"), 2
    problem = program.problem
    log_p = [problem.densities(problem.params, state, None).log_p for state in problem.states]
    params = problem.params | {"logit": log_p[1] - log_p[0]}
    at_posterior = program._replace(problem=problem._replace(params=params))
    gradients = evaluate_at(backend.host, at_posterior, every_pair("one_bit", K), K).gradients
    assert list(params) == ["weight", "logit"]
    assert_equal(gradients[:, 1], 0.0)
    assert np.abs(gradients[:, 0]).max() > 0.1


@pytest.mark.parametrize("vectorize", [True, False])
def test_ordinary_draws_give_the_replayed_gradients(backend, vectorize):
    """Each gradient is one of those enumerated, and all of these occur as often as they should."""
    program, K, num_seeds = "bit_vector", 1, 100
    enumerated = np.round(evaluate(backend.host, program, K).gradients, 8)
    distinct, which = np.unique(enumerated, axis=0, return_inverse=True)
    chances = np.bincount(which, weights=every_pair(program, K).probabilities)

    objective = backend.package.DisARM(K, vectorize_particles=vectorize)
    drawn = draws(backend.host, objective, program_for(program), num_seeds)

    distance = np.abs(drawn[:, None] - distinct).max(axis=2)
    assert distance.min(axis=1).max() < 1e-7
    counts = np.bincount(distance.argmin(axis=1), minlength=len(distinct))
    deviation = np.sqrt(num_seeds * chances * (1 - chances))
    assert (np.abs(counts - num_seeds * chances) <= 5 * deviation).all()


def test_chunks_have_the_gradient_of_the_whole(backend):
    # Vectorised, Pyro's one generator fills site after site: chunks draw in another order.
    objective = partial(backend.package.DisARM, 2, vectorize_particles=backend.host == "numpyro")
    program = program_for("bit_vector")
    whole = draws(backend.host, objective(), program, 2)
    chunks = draws(backend.host, objective(chunk_size=1), program, 2)
    assert_equal(chunks, whole)


# --- what it is not for --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "match"),
    [
        ("categorical", "'z' draws from Categorical.*VIMCO"),
        ("reparameterised", "the guide has none.*IWAE"),
        ("auxiliary_site", "'z' depend on.*VIMCO"),
        ("mixed", "'b' depend on.*RLOO"),
    ],
)
def test_refuses_other_guides(backend, program, match):
    with pytest.raises(ValueError, match=match):
        draws(backend.host, backend.package.DisARM(2), program_for(program), 20)


@pytest.mark.parametrize("options", [{"reparam": "score"}, {"alpha": 0.5}])
def test_offers_no_other_treatment(backend, options):
    with pytest.raises(TypeError, match=next(iter(options))):
        backend.package.DisARM(2, **options)
