"""MIWAE, PIWAE and CIWAE: averages of bounds, pooled for the model, or mixed with the ELBO."""

from functools import cache, partial

import numpy as np
import pytest

from tests.conformance.backends import backend_for
from tests.conformance.objectives import assert_equal, program_for
from tests.conformance.replay import evaluations, every_tuple
from tests.oracles import enumeration
from tests.oracles import multisample as oracle

OF_MODEL = {"prior", "emission", "weight"}


@cache
def evaluate(host, program, objective, K, **options):
    build = partial(getattr(backend_for(host).package, objective), K, **options)
    num_draws = K * options.get("num_replicates", 1)
    return evaluations(
        host, build, program_for(program), every_tuple(program_for(program), num_draws)
    )


@cache
def gradients_by_oracle(program, K, num_replicates, control_variate, alpha=0.0):
    return enumeration.estimator_gradients(
        program_for(program).problem,
        K,
        partial(oracle.renyi_learning_signal, alpha=alpha, control_variate=control_variate),
        partial(oracle.renyi_weights, alpha=alpha),
        num_replicates=num_replicates,
    )


def is_of_model(program):
    """Which of the flattened parameters are the model's."""
    params = program_for(program).problem.params
    return np.concatenate([np.full(np.size(params[name]), name in OF_MODEL) for name in params])


def check(actual, program, num_draws, gradients, gradient, value):
    """Mean, covariance and value, over every tuple."""
    problem = program_for(program).problem
    probabilities = enumeration.tuple_probabilities(problem, num_draws)
    moments = enumeration.moments(actual.gradients, probabilities)
    desired = enumeration.moments(gradients, probabilities)
    assert_equal(moments.mean, gradient, "bias")
    assert_equal(moments.covariance, desired.covariance, "covariance")
    assert_equal(-actual.losses @ probabilities, value, "value")


@pytest.mark.parametrize(
    ("program", "objective", "control_variate"),
    [
        ("categorical", "IWAE", "none"),
        ("mixed", "VIMCO", "geometric"),
        ("plate", "OVIS", "asymptotic"),
    ],
)
def test_elbo_weight(backend, program, objective, control_variate):
    K, weight = 2, 0.3
    problem = program_for(program).problem
    bounds = [partial(enumeration.renyi_log_mean_exp, alpha=alpha) for alpha in (0.0, 1.0)]

    def mixed(of_bound, of_elbo):
        return (1 - weight) * of_bound + weight * of_elbo

    check(
        evaluate(backend.host, program, objective, K, elbo_weight=weight),
        program,
        K,
        mixed(*(gradients_by_oracle(program, K, 1, control_variate, a) for a in (0.0, 1.0))),
        mixed(*(enumeration.exact_gradient(problem, K, bound) for bound in bounds)),
        mixed(*(enumeration.expected_bound(problem, problem.params, K, bound) for bound in bounds)),
    )


@pytest.mark.parametrize(
    ("program", "objective", "K", "control_variate"),
    [
        ("categorical", "VIMCO", 2, "geometric"),
        ("reparameterised", "IWAE", 2, "none"),
        ("mixed", "IWAE", 1, "none"),
    ],
)
@pytest.mark.parametrize("pool", [False, True], ids=["miwae", "piwae"])
def test_replicates(backend, program, objective, K, control_variate, pool):
    num_replicates = 2
    num_draws = K * num_replicates
    problem, of_model = program_for(program).problem, is_of_model(program)
    assert 0 < of_model.sum() < len(of_model)

    def chosen(pooled, average):
        return np.where(of_model & pool, pooled, average)

    check(
        evaluate(
            backend.host,
            program,
            objective,
            K,
            num_replicates=num_replicates,
            pool_replicates=pool,
        ),
        program,
        num_draws,
        chosen(
            gradients_by_oracle(program, num_draws, 1, control_variate),
            gradients_by_oracle(program, K, num_replicates, control_variate),
        ),
        chosen(*(enumeration.exact_gradient(problem, size) for size in (num_draws, K))),
        enumeration.expected_bound(problem, problem.params, num_draws if pool else K),
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"elbo_weight": 1.0}, {"alpha": 1.0}),
        ({"num_replicates": 1, "pool_replicates": True}, {}),
        ({"reparam": "dreg", "elbo_weight": 1.0}, {"reparam": "stl", "alpha": 1.0}),
    ],
    ids=["ciwae-is-the-elbo", "piwae-is-iwae", "dreg"],
)
def test_ends(backend, one, other):
    """At every tuple, and in value too."""
    ours, known = (evaluate(backend.host, "reparameterised", "IWAE", 2, **o) for o in (one, other))
    assert_equal(ours.gradients, known.gradients)
    assert_equal(ours.losses, known.losses)


def test_pooled_replicates_with_doubly_reparameterised_draws(backend):
    """The model's gradient is that of one bound, the guide's what it is without the pool."""
    program, options = "reparameterised", {"num_replicates": 2}
    pathwise, dreg = (
        evaluate(backend.host, program, "IWAE", 2, **options, **more)
        for more in ({"pool_replicates": True}, {"reparam": "dreg"})
    )
    both = evaluate(
        backend.host, program, "IWAE", 2, **options, reparam="dreg", pool_replicates=True
    )
    assert_equal(both.losses, pathwise.losses)
    assert_equal(both.gradients, np.where(is_of_model(program), pathwise.gradients, dreg.gradients))


@pytest.mark.parametrize(
    ("objective", "options", "match"),
    [
        ("IWAE", {"elbo_weight": 1.5}, "0 <= elbo_weight <= 1, got 1.5"),
        ("OVIS", {"elbo_weight": 0.5, "gamma": 0.5}, "elbo_weight=0.5 with gamma=0.5"),
    ],
)
def test_options_are_checked(backend, objective, options, match):
    with pytest.raises(ValueError, match=match):
        getattr(backend.package, objective)(3, **options)
