"""Doubly reparameterised gradients: expectations as exact numbers, and the gradient at each draw.

Integration by parts needs a density, so that here the noise is Gaussian and expectations are taken
by Gauss-Hermite quadrature, all K-tuples of nodes at once: each is an element of a plate, whose
scale is the weight of the tuple. Discrete sites are enumerated in the same way.
"""

from functools import cache, partial
from typing import NamedTuple

import numpy as np
import pytest

from tests.conformance.backends import backend_for
from tests.conformance.objectives import assert_equal
from tests.conformance.programs import Program, mixed, one_bit, reparameterised
from tests.conformance.replay import Prescription, draws, evaluations
from tests.oracles import multisample as oracle
from tests.oracles.enumeration import (
    Problem,
    complex_step_gradient,
    log_bernoulli,
    log_normal,
)


def nodes(number):
    """Points and weights of the standard normal."""
    points, weights = np.polynomial.hermite_e.hermegauss(number)
    return points, weights / weights.sum()


class Quadrature(NamedTuple):
    """A model and a guide in a plate of all K-tuples of draws, and these."""

    program: Program
    prescription: Prescription


def quadrature(make, params, states, probabilities, noise_sites, num_particles) -> Quadrature:
    """``states``: site -> what it is in each of M states of one particle."""
    indices = np.indices((len(probabilities),) * num_particles).reshape(num_particles, -1)
    weights = probabilities[indices].prod(axis=0)
    values = {site: np.asarray(value)[indices][None] for site, value in states.items()}
    model, guide = make(len(weights), weights)
    program = Program(model, guide, Problem(params, [], None), noise_sites)
    return Quadrature(program, Prescription(values, noise_sites))


def in_plate(num_tuples, weights, program):
    def plated(ppl):
        with ppl.plate("tuples", num_tuples, dim=-1), ppl.using(("scale", weights)):
            program(ppl)

    return plated


# --- programs ------------------------------------------------------------------------------------

GAUSSIAN = {"weight": np.array(0.8), "loc": np.array(0.1), "log_scale": np.array(-0.2)}


def gaussian(num_particles, num_nodes) -> Quadrature:
    def make(num_tuples, weights):
        def model(ppl):
            y = ppl.sample("y", ppl.Normal(ppl.array(0.0), 1.0))
            weight = ppl.param("weight", GAUSSIAN["weight"])
            x = ppl.array(np.full(num_tuples, 0.6))
            ppl.sample("x", ppl.Normal(weight * y, 1.2), obs=x)

        def guide(ppl):
            loc, log_scale = (ppl.param(name, GAUSSIAN[name]) for name in ("loc", "log_scale"))
            ppl.sample("y", ppl.Normal(loc, ppl.exp(log_scale)))

        return (in_plate(num_tuples, weights, program) for program in (model, guide))

    points, probabilities = nodes(num_nodes)
    return quadrature(make, GAUSSIAN, {"y": points}, probabilities, ("y",), num_particles)


TWO_LAYERS = {
    "weight": np.array(0.7),
    "loc": np.array(0.2),
    "log_scale": np.array(-0.1),
    "slope": np.array(0.6),
    "log_width": np.array(-0.2),
}


def two_layers(num_particles, num_nodes) -> Quadrature:
    """The second site's mean and width, and so its density and value, depend on the first."""

    def make(num_tuples, weights):
        def model(ppl):
            weight = ppl.param("weight", TWO_LAYERS["weight"])
            y = ppl.sample("y", ppl.Normal(ppl.array(0.0), 1.0))
            u = ppl.sample("u", ppl.Normal(weight * y, 0.8))
            ppl.sample("x", ppl.Normal(u + 0.3 * y, 1.5), obs=ppl.array(np.full(num_tuples, 0.6)))

        def guide(ppl):
            loc, log_scale, slope, log_width = (
                ppl.param(name, TWO_LAYERS[name])
                for name in ("loc", "log_scale", "slope", "log_width")
            )
            y = ppl.sample("y", ppl.Normal(loc, ppl.exp(log_scale)))
            ppl.sample("u", ppl.Normal(slope * y, ppl.exp(log_width + 0.1 * y)))

        return (in_plate(num_tuples, weights, program) for program in (model, guide))

    points, weights = nodes(num_nodes)
    y, u = np.meshgrid(points, points, indexing="ij")
    states = {"y": y.ravel(), "u": u.ravel()}
    probabilities = np.outer(weights, weights).ravel()
    return quadrature(make, TWO_LAYERS, states, probabilities, ("y", "u"), num_particles)


DISCRETE_AROUND = {
    "weight": np.array(0.8),
    "logit": np.array(0.4),
    "loc": np.array([0.3, -0.2]),
    "log_scale": np.array(-0.1),
    "slope": np.array(0.9),
}


def discrete_around(num_particles, num_nodes) -> Quadrature:
    """A bit, a Gaussian that depends on it, and a bit that depends on both."""

    def make(num_tuples, weights):
        def model(ppl):
            weight = ppl.param("weight", DISCRETE_AROUND["weight"])
            a = ppl.sample("a", ppl.Bernoulli(logits=ppl.array(0.5)))
            y = ppl.sample("y", ppl.Normal(0.5 * a, 1.0))
            b = ppl.sample("b", ppl.Bernoulli(logits=weight * y))
            x = ppl.array(np.full(num_tuples, 0.6))
            ppl.sample("x", ppl.Normal(weight * y + 0.8 * b, 1.5), obs=x)

        def guide(ppl):
            logit, loc, log_scale, slope = (
                ppl.param(name, DISCRETE_AROUND[name])
                for name in ("logit", "loc", "log_scale", "slope")
            )
            a = ppl.sample("a", ppl.Bernoulli(logits=logit))
            y = ppl.sample("y", ppl.Normal(ppl.choose(loc, a), ppl.exp(log_scale)))
            ppl.sample("b", ppl.Bernoulli(logits=slope * y - 0.5 * a))

        return (in_plate(num_tuples, weights, program) for program in (model, guide))

    points, weights = nodes(num_nodes)
    a, y, b = (
        axis.ravel() for axis in np.meshgrid([0, 1], np.arange(num_nodes), [0, 1], indexing="ij")
    )
    params = DISCRETE_AROUND
    drawn = params["loc"][a] + np.exp(params["log_scale"]) * points[y]
    log_probability = log_bernoulli(params["logit"], a)
    log_probability = log_probability + log_bernoulli(params["slope"] * drawn - 0.5 * a, b)
    states = {"a": a, "y": points[y], "b": b}
    probabilities = np.exp(log_probability) * weights[y]
    return quadrature(make, params, states, probabilities, ("y",), num_particles)


QUADRATURES = {
    "gaussian": partial(gaussian, 3, 24),
    "gaussian-K1": partial(gaussian, 1, 40),
    "two-layers": partial(two_layers, 2, 14),
    "two-layers-K1": partial(two_layers, 1, 14),
    "discrete-around": partial(discrete_around, 2, 24),
    "discrete-around-K1": partial(discrete_around, 1, 40),
}
# It falls with the number of nodes (two layers, 10 to 22 nodes: 7e-5, 5e-6, 1e-6, 2e-7).
QUADRATURE_ERROR = 1e-5
IN_GUIDE = ("loc", "log_scale", "slope", "log_width", "logit")


@cache
def expectation(host, name, case, reparam, options=()):
    """The expected gradient of an objective, by parameter."""
    program, prescription = QUADRATURES[case]()
    num_particles = prescription.values["y"].shape[1]
    objective = partial(
        getattr(backend_for(host).package, name), num_particles, reparam=reparam, **dict(options)
    )
    gradient = evaluations(host, objective, program, prescription).gradients[0]
    return split(gradient, program.problem.params)


def split(gradient, params):
    ends = np.cumsum([np.size(value) for value in params.values()])[:-1]
    return dict(zip(params, np.split(gradient, ends, axis=-1), strict=True))


# --- expectations --------------------------------------------------------------------------------

CASES = [
    ("gaussian", "IWAE", ()),
    ("two-layers", "IWAE", ()),
    ("discrete-around", "IWAE", ()),
    ("discrete-around", "VIMCO", ()),
    ("discrete-around", "OVIS", (("gamma", 0.5),)),
    ("discrete-around-K1", "IWAE", ()),
    ("gaussian", "IWAE", (("alpha", 0.4),)),
    ("discrete-around", "VIMCO", (("alpha", 1.0),)),
]


@pytest.mark.parametrize(("case", "name", "options"), CASES)
def test_dreg_has_the_expectation_of_the_pathwise_gradient(backend, case, name, options):
    dreg, pathwise = (
        expectation(backend.host, name, case, reparam, options) for reparam in ("dreg", "pathwise")
    )
    for param, desired in pathwise.items():
        # To the error of the quadrature, which the model's own parameters do not have.
        np.testing.assert_allclose(
            dreg[param], desired, rtol=0, atol=QUADRATURE_ERROR, err_msg=param
        )
    assert_equal(dreg["weight"], pathwise["weight"])


@pytest.mark.parametrize("case", ["gaussian", "two-layers", "discrete-around"])
def test_wake_phi_has_the_same_expectation_doubly_reparameterised(backend, case):
    dreg, score = (
        expectation(backend.host, "ReweightedWakeSleep", case, reparam)
        for reparam in ("dreg", "score")
    )
    for param, desired in score.items():
        np.testing.assert_allclose(
            dreg[param], desired, rtol=0, atol=QUADRATURE_ERROR, err_msg=param
        )
        assert np.abs(desired).max() > 1e-3  # not the agreement of two zeros


@pytest.mark.parametrize("case", ["gaussian-K1", "two-layers-K1", "discrete-around-K1"])
def test_stl_is_unbiased_for_one_particle(backend, case):
    stl, pathwise = (
        expectation(backend.host, "IWAE", case, reparam) for reparam in ("stl", "pathwise")
    )
    for param, desired in pathwise.items():
        np.testing.assert_allclose(stl[param], desired, rtol=0, atol=1e-9, err_msg=param)


@pytest.mark.parametrize("case", ["gaussian", "two-layers"])
def test_stl_is_biased_by_the_wake_phi_gradient_for_more(backend, case):
    """What it leaves out is E[sum_k v_k h_k], which is what wake-phi consists of."""
    stl, pathwise = (
        expectation(backend.host, "IWAE", case, reparam) for reparam in ("stl", "pathwise")
    )
    wake_phi = expectation(backend.host, "ReweightedWakeSleep", case, "score")
    for param in set(stl) & set(IN_GUIDE):
        bias = stl[param] - pathwise[param]
        assert_equal(bias, wake_phi[param])
        assert np.abs(bias).max() > 0.01
    assert_equal(stl["weight"], pathwise["weight"])


# --- at each draw --------------------------------------------------------------------------------


def two_layers_by_hand(noise, reparam):
    """The gradient as it is defined, of one K-tuple of noise ``[K]`` per site.

    Derivatives are complex steps: in the parameters at fixed draws, and in the parameters that
    the draws are made with at fixed densities.
    """

    def drawn(params):
        y = params["loc"] + np.exp(params["log_scale"]) * noise["y"]
        return y, params["slope"] * y + np.exp(params["log_width"] + 0.1 * y) * noise["u"]

    def log_p(params, y, u):
        log_p = log_normal(y, 0.0, 1.0) + log_normal(u, params["weight"] * y, 0.8)
        return log_p + log_normal(0.6, u + 0.3 * y, 1.5)

    def log_q(params, y, u):
        width = np.exp(params["log_width"] + 0.1 * y)
        log_q = log_normal(y, params["loc"], np.exp(params["log_scale"]))
        return log_q + log_normal(u, params["slope"] * y, width)

    start = TWO_LAYERS
    here = drawn(start)
    v = oracle.normalized_weights(log_p(start, *here) - log_q(start, *here))
    explicit = complex_step_gradient(lambda params: log_p(params, *here), start)
    along_path = complex_step_gradient(
        lambda params: log_p(start, *drawn(params)) - log_q(start, *drawn(params)), start
    )
    return explicit @ v + along_path @ (v**2 if reparam == "dreg" else v)


@pytest.mark.parametrize("reparam", ["dreg", "stl"])
@pytest.mark.parametrize("particles", ["vmap", "loop"])
def test_gradient_at_each_draw(backend, reparam, particles):
    """Two layers of noise, of which the first reaches the second's value and its density."""
    rng = np.random.default_rng(0)
    noise = {site: rng.normal(size=(4, 3, 1)) for site in ("y", "u")}  # 4 tuples of 3 particles
    program = two_layers(1, 1).program
    actual = evaluations(
        backend.host,
        partial(backend.package.IWAE, 3, reparam=reparam),
        program,
        Prescription(noise, ("y", "u")),
        particles=particles,
    )
    for t, gradient in enumerate(actual.gradients):
        one = {site: value[t, :, 0] for site, value in noise.items()}
        assert_equal(gradient, two_layers_by_hand(one, reparam))


@pytest.mark.parametrize("name", ["IWAE", "ReweightedWakeSleep"])
def test_no_noise_where_the_guide_is_the_posterior(backend, name):
    """The gradient of the guide is zero at every draw, not on average; that of the model is not."""
    precision = 1 + 0.8**2 / 1.2**2
    mean = 0.8 * 0.6 / 1.2**2 / precision
    optimum = GAUSSIAN | {"loc": np.array(mean), "log_scale": np.array(-np.log(precision) / 2)}
    program = gaussian(1, 1).program
    program = program._replace(problem=program.problem._replace(params=optimum))
    noise = np.random.default_rng(0).normal(size=(4, 3, 1))
    gradients = split(
        evaluations(
            backend.host,
            partial(getattr(backend.package, name), 3, reparam="dreg"),
            program,
            Prescription({"y": noise}, ("y",)),
        ).gradients,
        optimum,
    )
    assert_equal(gradients["loc"], 0.0)
    assert_equal(gradients["log_scale"], 0.0)
    assert np.abs(gradients["weight"]).max() > 0.01


def scaled_latent(num_tuples=1, scale=0.4) -> Program:
    """KL annealing: draws are made whatever the scale of their log-probabilities."""

    def model(ppl):
        weight = ppl.param("weight", GAUSSIAN["weight"])
        with ppl.using(("scale", scale)):
            y = ppl.sample("y", ppl.Normal(ppl.array(0.0), 1.0))
        ppl.sample("x", ppl.Normal(weight * y, 1.2), obs=ppl.array(0.6))

    def guide(ppl):
        loc, log_scale = (ppl.param(name, GAUSSIAN[name]) for name in ("loc", "log_scale"))
        with ppl.using(("scale", scale)):
            ppl.sample("y", ppl.Normal(loc, ppl.exp(log_scale)))

    return Program(model, guide, Problem(GAUSSIAN, [], None), ("y",))


def masked_latent() -> Program:
    """A mask hides the draw from the weights, not the draw."""
    program = scaled_latent(scale=1.0)

    def masked(program):
        def of(ppl):
            with ppl.using(("mask", ppl.array(np.array(False)))):
                program(ppl)

        return of

    def model(ppl):
        y = ppl.sample("y", ppl.Normal(ppl.array(0.0), 1.0))
        weight = ppl.param("weight", GAUSSIAN["weight"])
        ppl.sample("x", ppl.Normal(weight * y, 1.2), obs=ppl.array(0.6))

    return program._replace(model=model, guide=masked(program.guide))


@pytest.mark.parametrize("make", [scaled_latent, masked_latent])
def test_a_draw_happens_whatever_its_scale_and_mask(backend, make):
    points, weights = nodes(18)
    noise = np.stack(np.meshgrid(points, points, indexing="ij"), axis=-1).reshape(-1, 2)
    dreg, pathwise = (
        np.outer(weights, weights).ravel()
        @ evaluations(
            backend.host,
            partial(backend.package.IWAE, 2, reparam=reparam),
            make(),
            Prescription({"y": noise}, ("y",)),
        ).gradients
        for reparam in ("dreg", "pathwise")
    )
    np.testing.assert_allclose(dreg, pathwise, rtol=0, atol=3 * QUADRATURE_ERROR)
    assert np.abs(pathwise).min() > 1e-3


@pytest.mark.parametrize("reparam", ["dreg", "stl"])
def test_gradient_of_the_model_is_that_of_the_pathwise_gradient(backend, reparam):
    program = reparameterised()
    pathwise, other = (
        draws(backend.host, backend.package.IWAE(3, reparam=choice), program, 3)
        for choice in ("pathwise", reparam)
    )
    of_model = list(program.problem.params).index("weight")
    assert_equal(other[:, of_model], pathwise[:, of_model])
    assert np.abs(other - pathwise).max() > 1e-3


@pytest.mark.parametrize("reparam", ["dreg", "stl"])
def test_chunks_have_the_gradient_of_the_whole(backend, reparam):
    objective = partial(
        backend.package.OVIS,
        3,
        num_replicates=2,
        reparam=reparam,
        # Vectorised, Pyro's one generator fills site after site: chunks draw in another order.
        vectorize_particles=backend.host == "numpyro",
    )
    whole, chunks = (
        draws(backend.host, objective(**options), mixed(), 2) for options in ({}, {"chunk_size": 4})
    )
    assert_equal(chunks, whole)


@pytest.mark.parametrize("reparam", ["dreg", "stl"])
def test_a_guide_without_reparameterised_sites_is_refused(backend, reparam):
    with pytest.raises(ValueError, match=rf"reparam=\"{reparam}\".*has none.*'z'.*Use the default"):
        draws(backend.host, backend.package.VIMCO(2, reparam=reparam), one_bit(), 1)
