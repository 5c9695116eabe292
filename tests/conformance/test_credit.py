"""``RLOO(credit="downstream")``: mean and covariance as exact numbers, and where it is the whole.

The programs are as in ``programs.py``, each with its credits by definition: for every draw its
log-density, and the terms of the log-weight that depend on it.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.conformance.backends import backend_for
from tests.conformance.objectives import assert_equal, program_for
from tests.conformance.programs import LOG_NOISE, NOISE, Program, X, bits, states_of
from tests.conformance.replay import draws, evaluations, every_tuple
from tests.conftest import require_host
from tests.oracles import enumeration
from tests.oracles.enumeration import Densities, Problem, log_bernoulli, log_normal
from tests.oracles.multisample import reinforce_leave_one_out_learning_signal, renyi_weights

K = 2


class Case(NamedTuple):
    program: Program
    credits: Callable


def global_and_local() -> Case:
    """A discrete latent outside of the plate, on which the locals depend in the model only."""

    def credits(params, state, subsample):
        g, z = state["g"], state["z"]
        log_q_g = log_bernoulli(params["global_logit"], g)
        log_q_z = log_bernoulli(params["logits"], z)
        log_p_z = log_bernoulli(params["weight"] * g, z)
        of_g = log_bernoulli(0.5, g) + np.sum(log_p_z) - log_q_g
        of_z = log_p_z + log_normal(X, z, 0.7) - log_q_z
        return [(log_q_g, of_g), *zip(log_q_z, of_z, strict=True)]

    return Case(program_for("global_and_local"), credits)


def two_layers(seen: Callable = lambda a: a, normal: Any = None) -> Case:
    """Of the second layer the first one's prior is no consequence; of the first all is.

    ``seen`` is how the programs look at the first bit, which it leaves as it is, and ``normal``
    the distribution of what is observed of the second.
    """
    params = {"logit": np.array(0.4), "slope": np.array(1.2), "weight": np.array(0.8)}

    def model(ppl):
        weight = ppl.param("weight", params["weight"])
        a = ppl.sample("a", ppl.Bernoulli(logits=ppl.array(0.5)))
        ppl.sample("y", ppl.Normal(2.0 * a, 0.9), obs=ppl.array(-0.3))
        b = ppl.sample("b", ppl.Bernoulli(logits=weight * seen(a) - 0.2))
        ppl.sample("x", (normal or ppl.Normal)(1.0 * b, 0.7), obs=ppl.array(0.9))

    def guide(ppl):
        a = ppl.sample("a", ppl.Bernoulli(logits=ppl.param("logit", params["logit"])))
        slope = ppl.param("slope", params["slope"])
        ppl.sample("b", ppl.Bernoulli(logits=slope * seen(a) - 0.5))

    def terms(params, state):
        a, b = state["a"], state["b"]
        first = log_bernoulli(0.5, a) + log_normal(-0.3, 2.0 * a, 0.9)
        second = log_bernoulli(params["weight"] * a - 0.2, b) + log_normal(0.9, b, 0.7)
        log_q_a = log_bernoulli(params["logit"], a)
        return first, second, log_q_a, log_bernoulli(params["slope"] * a - 0.5, b)

    def densities(params, state, subsample):
        first, second, log_q_a, log_q_b = terms(params, state)
        return Densities(first + second, log_q_a + log_q_b, log_q_a + log_q_b)

    def credits(params, state, subsample):
        first, second, log_q_a, log_q_b = terms(params, state)
        of_b = second - log_q_b
        return [(log_q_a, first - log_q_a + of_b), (log_q_b, of_b)]

    problem = Problem(params, states_of(a=(0, 1), b=(0, 1)), densities)
    return Case(Program(model, guide, problem), credits)


def subsampled_locals(size: int = 2) -> Case:
    """A reparameterised latent outside of a plate, of whose three data ``size`` are drawn."""
    params = {
        "loc": np.array(0.3),
        "weight": np.array(0.8),
        "logits": np.array([0.4, -0.9, 0.2]),
    }
    x, scale = np.array([0.9, -0.4, 0.3]), 3 / size

    def model(ppl):
        weight = ppl.param("weight", params["weight"])
        y = ppl.sample("y", ppl.Normal(ppl.array(0.0), 1.0))
        with ppl.plate("data", 3, subsample_size=size, dim=-1) as index:
            z = ppl.sample("z", ppl.Bernoulli(logits=weight * y))
            ppl.sample("x", ppl.Normal(1.0 * z + y, 0.7), obs=ppl.array(x)[index])

    def guide(ppl):
        logits = ppl.param("logits", params["logits"])
        y = ppl.sample("y", ppl.Normal(ppl.param("loc", params["loc"]), 0.8))
        with ppl.plate("data", 3, subsample_size=size, dim=-1) as index:
            ppl.sample("z", ppl.Bernoulli(logits=logits[index] + 0.6 * y))

    def terms(params, state, subsample):
        z, y = state["z"], params["loc"] + state["y"] * 0.8
        log_p = log_bernoulli(params["weight"] * y, z) + log_normal(x[subsample], z + y, 0.7)
        return y, log_p, log_bernoulli(params["logits"][subsample] + 0.6 * y, z)

    def densities(params, state, subsample):
        y, log_p, log_q = terms(params, state, subsample)
        return Densities(
            log_normal(y, 0.0, 1.0) + scale * np.sum(log_p),
            log_normal(y, params["loc"], 0.8) + scale * np.sum(log_q),
            np.sum(log_q),
        )

    def credits(params, state, subsample):
        _, log_p, log_q = terms(params, state, subsample)
        return list(zip(log_q, scale * (log_p - log_q), strict=True))

    everything = np.arange(3)
    problem = Problem(
        params,
        states_of(y=NOISE, z=bits(size)),
        densities,
        subsamples=[np.delete(everything, i) for i in everything] if size == 2 else [everything],
        log_noise=LOG_NOISE,
    )
    program = Program(model, guide, problem, noise_sites=("y",), subsampled_plate="data")
    return Case(program, credits)


def through_a_global() -> Case:
    """Out of the plate and into it again: by way of g, each z matters to all of the data."""
    params = {"logits": np.array([0.4, -0.9]), "slope": np.array(1.2), "weight": np.array(0.8)}

    def model(ppl):
        weight = ppl.param("weight", params["weight"])
        g = ppl.sample("g", ppl.Bernoulli(logits=ppl.array(0.3)))
        with ppl.plate("data", 2, dim=-1):
            z = ppl.sample("z", ppl.Bernoulli(logits=ppl.array(-0.4)))
            ppl.sample("x", ppl.Normal(1.0 * z + weight * g, 0.7), obs=ppl.array(X))

    def guide(ppl):
        logits, slope = ppl.param("logits", params["logits"]), ppl.param("slope", params["slope"])
        with ppl.plate("data", 2, dim=-1):
            z = ppl.sample("z", ppl.Bernoulli(logits=logits))
        ppl.sample("g", ppl.Bernoulli(logits=slope * (z[..., :1] + z[..., 1:]) - 0.7))

    def terms(params, state):
        z, g = state["z"], state["g"]
        log_p_x = log_normal(X, z + params["weight"] * g, 0.7)
        log_q_g = log_bernoulli(params["slope"] * z.sum() - 0.7, g)
        of_g = log_bernoulli(0.3, g) + np.sum(log_p_x) - log_q_g
        return log_bernoulli(-0.4, z), log_bernoulli(params["logits"], z), log_q_g, of_g

    def densities(params, state, subsample):
        log_p_z, log_q_z, log_q_g, of_g = terms(params, state)
        log_q = np.sum(log_q_z) + log_q_g
        return Densities(of_g + log_q_g + np.sum(log_p_z), log_q, log_q)

    def credits(params, state, subsample):
        log_p_z, log_q_z, log_q_g, of_g = terms(params, state)
        return [(log_q_g, of_g), *zip(log_q_z, log_p_z - log_q_z + of_g, strict=True)]

    problem = Problem(params, states_of(z=bits(2), g=(0, 1)), densities)
    return Case(Program(model, guide, problem), credits)


CASES = {
    case.__name__: case
    for case in (global_and_local, two_layers, subsampled_locals, through_a_global)
}


@cache
def case_for(name) -> Case:
    return CASES[name]()


def gradients(host, program, particles="vmap", **options):
    loss = partial(backend_for(host).package.RLOO, K, **options)
    return evaluations(host, loss, program, every_tuple(program, K), particles=particles)


def bound(log_weights):
    return np.mean(log_weights, axis=0)


@pytest.mark.parametrize(
    ("name", "particles"),
    [*((name, "vmap") for name in CASES), ("two_layers", "loop"), ("subsampled_locals", "loop")],
)
def test_mean_and_covariance(backend, name, particles):
    program, credits = case_for(name)
    problem = program.problem
    probabilities = enumeration.tuple_probabilities(problem, K)
    losses, values = gradients(backend.host, program, particles, credit="downstream")
    actual = enumeration.moments(values, probabilities)

    expected = enumeration.expected_bound(problem, problem.params, K, bound)
    assert_equal(-losses @ probabilities, expected, "value")
    assert_equal(actual.mean, enumeration.exact_gradient(problem, K, bound), "mean")
    by_oracle = enumeration.credited_gradients(problem, K, credits)
    desired = enumeration.moments(by_oracle, probabilities)
    assert_equal(actual.covariance, desired.covariance, "covariance")
    if name != "through_a_global":
        whole = moments_of_whole(problem, probabilities)
        assert actual.variance < 0.95 * whole.variance


def moments_of_whole(problem, probabilities):
    weights = partial(renyi_weights, alpha=1.0)
    signal = reinforce_leave_one_out_learning_signal
    return enumeration.moments(
        enumeration.estimator_gradients(problem, K, signal, weights), probabilities
    )


@pytest.mark.parametrize(
    ("program", "options"),
    [
        ("plate", {}),
        ("discrete_then_reparameterised", {}),
        ("discrete_then_reparameterised", {"reparam": "dreg"}),
        ("reparameterised", {"reparam": "score"}),
        ("subsampled_plate", {"chunk_size": 1}),
        ("masked", {}),
        ("scaled_per_element", {}),
        ("annealed_latents", {}),
        ("categorical", {"num_replicates": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_is_the_whole_where_all_is_downstream(backend, program, options):
    options = {"vectorize_particles": backend.host == "numpyro", **options}
    whole, downstream = (
        draws(
            backend.host,
            backend.package.RLOO(3, credit=credit, **options),
            program_for(program),
            4,
        )
        for credit in ("whole", "downstream")
    )
    assert_equal(downstream, whole)


def test_reparam_and_credit_are_independent(backend):
    """What the credit changes in the gradient is the same with each reparam."""
    changes = []
    for reparam in ("pathwise", "dreg"):
        whole, downstream = (
            draws(
                backend.host,
                backend.package.RLOO(3, credit=credit, reparam=reparam),
                program_for("mixed"),
                2,
            )
            for credit in ("whole", "downstream")
        )
        changes.append(downstream - whole)
    assert np.abs(changes[0]).max() > 1e-3
    assert_equal(*changes)


def test_subsampling_is_unbiased_for_all_data(backend):
    """N/B multiplies a local cost once."""
    program, _ = case_for("subsampled_locals")
    values = gradients(backend.host, program, credit="downstream").gradients
    mean = enumeration.tuple_probabilities(program.problem, K) @ values
    assert_equal(mean, enumeration.exact_gradient(subsampled_locals(3).program.problem, 1, bound))


def test_sequential_plate():
    require_host("pyro")  # NumPyro's plates are no loops
    program = program_for("sequential_plate")
    whole, downstream = (
        gradients("pyro", program, "loop", credit=credit) for credit in ("whole", "downstream")
    )
    assert_equal(downstream.gradients, whole.gradients)
    assert_equal(downstream.losses, whole.losses)


def by_branch(a):
    return 1.0 if a == 1 else 0.0


def written(a):
    import torch

    values = torch.zeros(2, dtype=a.dtype)
    values[1] = a
    return values[1]


def logged(a):
    return 1.0 * a + 0.0 * a.mean().item()


@pytest.mark.parametrize(
    ("seen", "particles"), [(by_branch, "loop"), (written, "loop"), (logged, "vmap")]
)
def test_what_the_host_loses_sight_of_counts_for_all_that_follows(seen, particles):
    """For each particle by itself."""
    require_host("pyro")
    check_mean("pyro", two_layers(seen), particles)


def called_back(a):
    import jax

    return jax.pure_callback(lambda a: 1.0 * a, a * 1.0, a, vmap_method="sequential")


def test_tracers_alone_leave_the_program():
    """Python sees no value of a draw, and what comes back from the host depends on what went."""
    require_host("numpyro")
    check_mean("numpyro", two_layers(called_back), "vmap")
    from jax.errors import TracerBoolConversionError

    with pytest.raises(TracerBoolConversionError):
        gradients("numpyro", two_layers(by_branch).program, "loop", credit="downstream")


def test_what_a_log_probability_hides():
    """It is computed after all draws."""
    require_host("pyro")
    import pyro.distributions as dist

    class Hiding(dist.Normal):
        def log_prob(self, value):
            return dist.Normal(self.loc.item(), self.scale.item()).log_prob(value)

    check_mean("pyro", two_layers(normal=Hiding), "loop")


def check_mean(host, case, particles):
    problem = case.program.problem
    _, values = gradients(host, case.program, particles, credit="downstream")
    mean = enumeration.tuple_probabilities(problem, K) @ values
    assert_equal(mean, enumeration.exact_gradient(problem, K, bound), "mean")


def test_refuses_another_credit(backend):
    with pytest.raises(ValueError, match=r"whole.*downstream.*got 'none'"):
        backend.package.RLOO(2, credit="none")
