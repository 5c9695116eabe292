"""The thermodynamic objective: its limit, its bias as K grows, and its partitions."""

from functools import partial

import numpy as np
import pytest

from tests.conformance.objectives import assert_equal, program_for
from tests.conformance.replay import evaluations, every_tuple
from tests.oracles import enumeration
from tests.oracles import multisample as oracle

PARTITION = [0.0, 0.2, 0.5]


def densities_of(problem, params):
    """log p and log q of every state of one latent."""
    every = [problem.densities(params, state, None) for state in problem.states]
    return np.array([one.log_p for one in every]), np.array([one.log_q for one in every])


def thermodynamic_objective(problem, params, partition):
    """By its definition, from the normalised path densities: no particle and no weight."""
    log_p, log_q = densities_of(problem, params)
    total = 0.0
    for left, right in zip(partition, [*partition[1:], 1.0], strict=True):
        unnormalised = np.exp((1 - left) * log_q + left * log_p)
        expectation = np.sum(unnormalised * (log_p - log_q)) / np.sum(unnormalised)
        total = total + (right - left) * expectation
    return total


def exact_gradient(problem, partition):
    return enumeration.complex_step_gradient(
        lambda params: thermodynamic_objective(problem, params, partition), problem.params
    )


def expected_gradient(backend, num_particles, partition):
    program = program_for("one_bit")
    objective = partial(backend.package.TVO, num_particles, partition=partition)
    draws = every_tuple(program, num_particles)
    actual = evaluations(backend.host, objective, program, draws)
    probabilities = enumeration.tuple_probabilities(program.problem, num_particles)
    return probabilities @ actual.gradients, -probabilities @ actual.losses


def test_bias_vanishes_as_one_over_the_number_of_particles(backend):
    """Exact for each K: what doubling K leaves of the bias of the gradient and of the value."""
    problem = program_for("one_bit").problem
    sizes = (2, 4, 8)
    gradients, values = zip(*(expected_gradient(backend, K, PARTITION) for K in sizes), strict=True)
    for actual, limit in [
        (np.array(gradients), exact_gradient(problem, PARTITION)),
        (np.array(values)[:, None], thermodynamic_objective(problem, problem.params, PARTITION)),
    ]:
        bias = np.abs(actual - limit).max(axis=1)
        assert bias[0] > 1e-3  # there is one
        assert bias[1] < 0.6 * bias[0]
        assert bias[2] < 0.55 * bias[1]


def test_one_interval_is_the_elbo(backend):
    gradient, value = expected_gradient(backend, 2, [0.0])
    problem = program_for("one_bit").problem
    elbo = partial(enumeration.renyi_log_mean_exp, alpha=1.0)
    assert_equal(gradient, enumeration.exact_gradient(problem, 2, elbo))
    assert_equal(value, enumeration.expected_bound(problem, problem.params, 2, elbo))


def test_finer_partitions_are_tighter(backend):
    problem = program_for("one_bit").problem
    log_p, _ = densities_of(problem, problem.params)
    evidence = np.log(np.sum(np.exp(log_p)))
    values = [
        thermodynamic_objective(
            problem,
            problem.params,
            backend.estimators.thermodynamic_partition(J, schedule="linear"),
        )
        for J in (1, 2, 10, 100)
    ]
    assert (np.diff(values) > 0).all()
    assert values[-1] < evidence < values[-1] + 0.01


@pytest.mark.parametrize("num_partitions", [1, 2, 5])
def test_adaptive_partition_shares_the_rise(backend, num_partitions):
    log_weights = 2 * np.random.default_rng(0).normal(size=(6, 4))
    partition = backend.numpy(
        backend.estimators.moment_matching_partition(
            backend.array(log_weights), num_partitions=num_partitions
        )
    )

    def integrand(beta):
        weights = oracle.normalized_weights(beta * log_weights)
        return np.mean(np.sum(weights * log_weights, axis=0))

    rises = np.diff([integrand(beta) for beta in [*partition, 1.0]])
    assert partition[0] == 0
    np.testing.assert_allclose(rises, rises[0], rtol=1e-6)


@pytest.mark.usefixtures("user_defaults")
def test_partition_is_as_precise_as_the_log_weights(backend):
    """Whatever the default dtype: 0.2 would be off by 3e-9 in float32."""
    log_weights = backend.array(2 * np.random.default_rng(0).normal(size=(6, 4)))
    actual = backend.estimators.thermodynamic_bound(log_weights, partition=PARTITION)
    log_weights = backend.numpy(log_weights)  # in float32 in JAX, which has no other then
    np.testing.assert_allclose(
        backend.numpy(actual),
        oracle.thermodynamic_bound(log_weights, partition=PARTITION),
        rtol=10 * np.finfo(log_weights.dtype).eps,
    )


@pytest.mark.parametrize("fill", [-3.0, -np.inf])
def test_adaptive_partition_of_weights_that_say_nothing(backend, fill):
    partition = backend.estimators.moment_matching_partition(
        backend.array(np.full((3, 2), fill)), num_partitions=4
    )
    assert_equal(backend.numpy(partition), [0.0, 0.25, 0.5, 0.75])


def test_adaptive_partition_in_the_objective(backend):
    """At each tuple the gradient is that of the partition found there, taken as it is."""
    program, K = program_for("categorical"), 3
    log_p, log_q = densities_of(program.problem, program.problem.params)
    draws = every_tuple(program, K)
    adaptive = evaluations(
        backend.host,
        partial(backend.package.TVO, K, partition="adaptive", num_partitions=3),
        program,
        draws,
    )
    for t in (1, 5, 16):
        log_weights = (log_p - log_q)[draws.values["z"][t]]
        found = backend.estimators.moment_matching_partition(
            backend.array(log_weights), num_partitions=3
        )
        fixed = evaluations(
            backend.host,
            partial(backend.package.TVO, K, partition=[float(end) for end in found]),
            program,
            draws._replace(values={"z": draws.values["z"][t : t + 1]}),
        )
        assert_equal(adaptive.gradients[t], fixed.gradients[0])
        assert_equal(adaptive.losses[t], fixed.losses[0])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"partition": [0.1, 0.5]}, "increases from 0"),
        ({"partition": [0.0, 0.5, 0.4]}, "increases from 0"),
        ({"partition": [0.0, 1.0]}, "stays below 1"),
        ({"partition": [0.0, float("nan")]}, "increases from 0"),
        ({"partition": []}, "increases from 0"),
        ({"partition": "cubic"}, "cubic"),
        ({"num_partitions": 0}, "num_partitions >= 1"),
    ],
)
def test_bad_partitions_are_refused(backend, options, match):
    with pytest.raises(ValueError, match=match):
        backend.package.TVO(3, **options)


def test_no_other_treatment_of_sites_is_offered(backend):
    with pytest.raises(TypeError, match="reparam"):
        backend.package.TVO(3, reparam="pathwise")
    with pytest.raises(ValueError, match="num_particles >= 2"):
        backend.package.TVO(1)
