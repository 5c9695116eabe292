"""Every kind of site that a model or a guide may hold."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro import factor, param, plate, sample
from numpyro.contrib.control_flow import cond, scan

from numpyro_gradest import IWAE, OVIS, ReweightedWakeSleep
from tests.conformance.backends import QUICK_TO_COMPILE
from tests.numpyro.definition import (
    Case,
    as_arrays,
    assert_follows_definition,
    log_bernoulli,
    log_normal,
)
from tests.oracles import multisample as oracle

quickly = partial(jax.jit, compiler_options=QUICK_TO_COMPILE)


def loss_and_gradient(objective, model, guide, params, seed=0):
    def loss(params):
        return objective.loss(random.key(seed), params, model, guide)

    return quickly(jax.value_and_grad(loss))(as_arrays(params))


def assert_same(actual, desired):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), actual, desired)


def bernoulli_model():
    z = sample("z", dist.Bernoulli(logits=param("weight", 0.8)))
    sample("x", dist.Normal(z, 0.7), obs=0.9)


def bernoulli_guide():
    sample("z", dist.Bernoulli(logits=param("logit", 0.4)))


BERNOULLI = Case(
    bernoulli_model,
    bernoulli_guide,
    lambda params, draws: (
        log_bernoulli(params["weight"], draws["z"]) + log_normal(0.9, draws["z"], 0.7)
    ),
    lambda params, draws: log_bernoulli(params["logit"], draws["z"]),
    {"weight": 0.8, "logit": 0.4},
)


# --- factors, auxiliary sites, missing parts -----------------------------------------------------


def factor_in_the_model():
    def model():
        bernoulli_model()
        factor("bonus", 0.3 * param("weight", 0.8))

    def log_p(params, draws):
        return BERNOULLI.log_p(params, draws) + 0.3 * params["weight"]

    return BERNOULLI._replace(model=model, log_p=log_p)


def factor_in_the_guide():
    """It belongs to log q, which it takes away from the weight."""

    def guide():
        bernoulli_guide()
        factor("correction", 0.3 * param("logit", 0.4))

    def log_q(params, draws):
        return BERNOULLI.log_q(params, draws) + 0.3 * params["logit"]

    return BERNOULLI._replace(guide=guide, log_q=log_q, log_drawn=BERNOULLI.log_q)


def auxiliary_site():
    def guide():
        logit = param("logit", 0.4)
        a = sample("a", dist.Bernoulli(logits=logit), infer={"is_auxiliary": True})
        sample("z", dist.Bernoulli(logits=logit * a - 0.3))

    def log_q(params, draws):
        log_q_a = log_bernoulli(params["logit"], draws["a"])
        return log_q_a + log_bernoulli(params["logit"] * draws["a"] - 0.3, draws["z"])

    return BERNOULLI._replace(guide=guide, log_q=log_q)


def guide_without_parameters():
    def guide():
        sample("z", dist.Bernoulli(0.3))

    def log_q(params, draws):
        return jnp.log(jnp.where(draws["z"] == 1, 0.3, 0.7))

    return BERNOULLI._replace(guide=guide, log_q=log_q, params={"weight": 0.8})


def model_without_parameters():
    def model():
        z = sample("z", dist.Bernoulli(0.3))
        sample("x", dist.Normal(z, 0.7), obs=0.9)

    def log_p(params, draws):
        log_prior = jnp.log(jnp.where(draws["z"] == 1, 0.3, 0.7))
        return log_prior + log_normal(0.9, draws["z"], 0.7)

    return BERNOULLI._replace(model=model, log_p=log_p, params={"logit": 0.4})


def no_parameters():
    case = model_without_parameters()._replace(guide=guide_without_parameters().guide)
    return case._replace(log_q=guide_without_parameters().log_q, params={})


# --- control flow --------------------------------------------------------------------------------

STEPS = jnp.array([0.9, -0.4, 0.1])


def chain(transition, reparameterised):
    """A Markov chain in ``scan``, in model and guide; draws depend on the draws before."""

    def model():
        weight = param("weight", 0.8)

        def step(z, x):
            z = sample("z", transition(z, weight))
            sample("x", dist.Normal(z, 0.7), obs=x)
            return 1.0 * z, None

        scan(step, 0.0, STEPS)

    def guide():
        drift = param("drift", 0.3)

        def step(z, x):
            return 1.0 * sample("z", transition(z, drift * x)), None

        scan(step, 0.0, STEPS)

    def log_prob(z, drift):
        previous = jnp.concatenate([jnp.zeros(1), z[:-1]])
        if reparameterised:
            return log_normal(z, previous + drift, 1.0)
        return log_bernoulli(previous + drift, z)

    def log_p(params, draws):
        log_likelihood = log_normal(STEPS, draws["z"], 0.7).sum()
        return log_likelihood + log_prob(draws["z"], params["weight"]).sum()

    def log_q(params, draws):
        return log_prob(draws["z"], params["drift"] * STEPS).sum()

    return Case(model, guide, log_p, log_q, {"weight": 0.8, "drift": 0.3})


def discrete_chain():
    return chain(lambda z, drift: dist.Bernoulli(logits=z + drift), reparameterised=False)


def continuous_chain():
    """With ``reparam="score"``: no gradient may pass through the state that scan carries."""
    return chain(lambda z, drift: dist.Normal(z + drift, 1.0), reparameterised=True)


def branches():
    """In ``cond`` a site is drawn by either branch; what follows sees the guide's draw."""

    def model():
        z = sample("z", dist.Bernoulli(logits=param("weight", 0.8)))
        y = cond(
            z > 0,
            lambda _: sample("y", dist.Normal(1.0, 1.0)),
            lambda _: sample("y", dist.Normal(-1.0, 1.0)),
            None,
        )
        sample("x", dist.Normal(param("weight", 0.8) * y, 0.7), obs=0.9)

    def guide():
        shift = param("logit", 0.4)
        z = sample("z", dist.Bernoulli(logits=shift))
        cond(
            z > 0,
            lambda _: sample("y", dist.Normal(shift, 0.5)),
            lambda _: sample("y", dist.Normal(-shift, 0.5)),
            None,
        )

    def log_p(params, draws):
        z, y = draws["z"], draws["y"]
        log_likelihood = log_normal(0.9, params["weight"] * y, 0.7)
        log_prior = log_bernoulli(params["weight"], z) + log_normal(y, 2 * z - 1, 1.0)
        return log_prior + log_likelihood

    def log_q(params, draws):
        z, y = draws["z"], draws["y"]
        return log_bernoulli(params["logit"], z) + log_normal(y, (2 * z - 1) * params["logit"], 0.5)

    return Case(model, guide, log_p, log_q, {"weight": 0.8, "logit": 0.4})


def drawn_by_a_lognormal():
    """A transformed distribution, whose cached intermediates may not bring a gradient back."""

    def model():
        z = sample("z", dist.Gamma(2.0, param("rate", 1.5)))
        sample("x", dist.Normal(z, 0.7), obs=0.9)

    def guide():
        sample("z", dist.LogNormal(param("loc", 0.3), 0.5))

    def log_p(params, draws):
        z, rate = draws["z"], params["rate"]
        return 2 * jnp.log(rate) + jnp.log(z) - rate * z + log_normal(0.9, z, 0.7)

    def log_q(params, draws):
        return log_normal(jnp.log(draws["z"]), params["loc"], 0.5) - jnp.log(draws["z"])

    return Case(model, guide, log_p, log_q, {"rate": 1.5, "loc": 0.3})


CASES = [
    factor_in_the_model,
    factor_in_the_guide,
    auxiliary_site,
    guide_without_parameters,
    model_without_parameters,
    no_parameters,
    discrete_chain,
    continuous_chain,
    branches,
    drawn_by_a_lognormal,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_loss_and_gradient_follow_the_definition(case):
    assert_follows_definition(case(), partial(OVIS, 2, reparam="score"))


@pytest.mark.parametrize("case", [continuous_chain, drawn_by_a_lognormal])
def test_wake_sleep_differentiates_through_no_draw(case):
    assert_follows_definition(
        case(), partial(ReweightedWakeSleep, 2), oracle.wake_phi_learning_signal
    )


def test_model_without_latents():
    def model():
        sample("x", dist.Normal(param("weight", 0.8), 0.7), obs=0.9)

    loss, gradient = loss_and_gradient(OVIS(3), model, lambda: None, {"weight": 0.8})
    np.testing.assert_allclose(loss, -log_normal(0.9, 0.8, 0.7))
    np.testing.assert_allclose(gradient["weight"], (0.8 - 0.9) / 0.7**2)


def test_programs_without_sites():
    assert loss_and_gradient(OVIS(3), lambda: None, lambda: None, {})[0] == 0


# --- reparameterised sites -----------------------------------------------------------------------


def gaussian_model():
    with plate("data", 3):
        z = sample("z", dist.Normal(0.0, 1.0))
        sample("x", dist.Normal(param("weight", 0.8) * z, 0.7), obs=STEPS)


def loc_and_scale():
    loc = param("loc", jnp.array([0.3, -0.5, 0.1]))
    return loc, param("scale", jnp.array([0.5, 0.8, 1.1]))


def normal():
    return dist.Normal(*loc_and_scale())


def expanded_and_masked():
    return dist.Normal(*loc_and_scale()).expand([3]).mask(True)


def affine():
    loc, scale = loc_and_scale()
    base = dist.Normal(jnp.zeros(3), 1.0)
    return dist.TransformedDistribution(base, dist.transforms.AffineTransform(loc, scale))


GAUSSIAN = {
    "weight": 0.8,
    "loc": np.array([0.3, -0.5, 0.1]),
    "scale": np.array([0.5, 0.8, 1.1]),
}


def gaussian_guide(q):
    def guide():
        with plate("data", 3):
            sample("z", q())

    return guide


@pytest.mark.parametrize("q", [normal, expanded_and_masked, affine], ids=lambda q: q.__name__)
def test_pathwise_gradient_is_that_of_the_bound(q):
    """Autodiff of the bound written out, at the noise that the guide's draws came from."""
    num_particles, params = 4, as_arrays(GAUSSIAN)
    actual = loss_and_gradient(IWAE(num_particles), gaussian_model, gaussian_guide(q), params)

    # The draws at loc 0 and scale 1 are the noise itself.
    noise = []
    unit = params | {"loc": jnp.zeros(3), "scale": jnp.ones(3)}

    def record():
        with plate("data", 3):
            noise.append(sample("z", dist.Normal(*loc_and_scale())))

    def loop(fn, keys):
        return jax.tree.map(lambda *x: jnp.stack(x), *[fn(key) for key in keys])

    objective = IWAE(num_particles, vectorize_particles=loop)
    objective.loss(random.key(0), unit, gaussian_model, record)

    def loss(params):
        z = params["loc"] + jnp.stack(noise) * params["scale"]
        log_p = log_normal(z, 0.0, 1.0) + log_normal(STEPS, params["weight"] * z, 0.7)
        log_weights = log_p - log_normal(z, params["loc"], params["scale"])
        return -(jax.nn.logsumexp(log_weights, axis=0) - jnp.log(num_particles)).sum()

    assert_same(actual, jax.value_and_grad(loss)(params))


def test_one_particle_of_a_vector_site_equals_a_plate_of_scalars():
    """``Independent`` sums over events; all else stays."""

    def guide():
        sample("z", dist.Normal(*loc_and_scale()).to_event(1))

    def model():
        z = sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        sample("x", dist.Normal(param("weight", 0.8) * z, 0.7).to_event(1), obs=STEPS)

    one_weight = loss_and_gradient(IWAE(1), model, guide, GAUSSIAN)
    by_datum = loss_and_gradient(IWAE(1), gaussian_model, gaussian_guide(normal), GAUSSIAN)
    assert_same(one_weight, by_datum)


def delta(value):
    return dist.Delta(value).expand([3]).mask(True)


def shifted_delta(value):
    return dist.TransformedDistribution(
        dist.Delta(value), dist.transforms.AffineTransform(0.0, 1.0)
    )


@pytest.mark.parametrize("reparam", ["pathwise", "score"])
@pytest.mark.parametrize("q", [delta, shifted_delta], ids=lambda q: q.__name__)
def test_a_point_mass_is_a_parameter_not_a_draw(q, reparam):
    """A Delta guide does maximum a posteriori, whichever way draws are differentiated."""

    def guide():
        with plate("data", 3):
            sample("z", q(param("loc", STEPS)))

    def loss(params):
        z = params["loc"]
        log_likelihood = log_normal(STEPS, params["weight"] * z, 0.7)
        return -(log_normal(z, 0.0, 1.0) + log_likelihood).sum()

    params = as_arrays({"weight": 0.8, "loc": np.array([0.3, -0.5, 0.1])})
    actual = loss_and_gradient(IWAE(2, reparam=reparam), gaussian_model, guide, params)
    assert_same(actual, jax.value_and_grad(loss)(params))


def test_the_density_of_a_point_mass_counts():
    def guide():
        with plate("data", 3):
            sample("z", dist.Delta(param("loc", STEPS), log_density=0.25))

    params = as_arrays({"weight": 0.8, "loc": np.array([0.3, -0.5, 0.1])})
    loss, _ = loss_and_gradient(IWAE(2), gaussian_model, guide, params)
    z = params["loc"]
    log_p = log_normal(z, 0.0, 1.0) + log_normal(STEPS, 0.8 * z, 0.7)
    np.testing.assert_allclose(loss, -(log_p - 0.25).sum())


# --- numerics ------------------------------------------------------------------------------------


def test_no_weight_at_all_gives_no_gradient_and_says_so():
    def model():
        bernoulli_model()
        factor("impossible", -jnp.inf)

    def loss(params):
        return OVIS(3).loss(random.key(0), params, model, bernoulli_guide)

    params = as_arrays(BERNOULLI.params)
    with pytest.warns(UserWarning, match="zero weight"):
        value, gradient = jax.value_and_grad(loss)(params)
    assert value == np.inf
    assert_same(gradient, jax.tree.map(jnp.zeros_like, params))


def test_no_weight_for_one_datum_leaves_the_others_their_gradient():
    def model(log_factor):
        with plate("data", 3):
            sample("z", dist.Bernoulli(0.3))
            factor("evidence", log_factor)

    def guide(log_factor):
        with plate("data", 3):
            sample("z", dist.Bernoulli(logits=param("logits", jnp.zeros(3))))

    @quickly
    def gradient(log_factor):
        def loss(logits):
            return OVIS(3).loss(random.key(0), {"logits": logits}, model, guide, log_factor)

        return jax.grad(loss)(jnp.array([0.4, -0.9, 0.3]))

    without, every = gradient(jnp.array([0.0, -jnp.inf, 0.0])), gradient(jnp.zeros(3))
    assert_same(without, jnp.where(jnp.array([True, False, True]), every, 0.0))
