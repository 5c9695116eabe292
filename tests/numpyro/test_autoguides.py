"""Autoguides: joint ones have one weight, and no bound exceeds the evidence.

Setting a guide up is part of what is compiled: operation by operation it takes seconds. A guide
keeps what it finds there, so every compiled function builds one of its own.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro import handlers, param, plate, sample
from numpyro.infer import SVI, autoguide

from numpyro_gradest import IWAE, OVIS, VIMCO, importance_samples
from tests.conformance.backends import QUICK_TO_COMPILE

X = jnp.array([0.9, -0.4, 0.1, 1.7])
quickly = partial(jax.jit, compiler_options=QUICK_TO_COMPILE)


def local():
    """One latent for each datum; it is constrained."""
    with plate("data", 4):
        z = sample("z", dist.LogNormal(0.0, 1.0))
        sample("x", dist.Normal(jnp.log(z), 1.0), obs=X)


EVIDENCE = dist.Normal(0.0, math.sqrt(2)).log_prob(X).sum()


def local_and_global():
    g = sample("g", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with plate("data", 4):
        z = sample("z", dist.Normal(g.sum(-1), 1.0))
        sample("x", dist.Normal(z, 1.0), obs=X)


def guide_list(model):
    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoNormal(model))
    return guide


ELEMENTWISE = {"AutoNormal": autoguide.AutoNormal, "AutoGuideList": guide_list}
# Of the normal family, which holds the posterior of either model.
JOINT_NORMAL = {
    "AutoDiagonalNormal": autoguide.AutoDiagonalNormal,
    "AutoMultivariateNormal": autoguide.AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": autoguide.AutoLowRankMultivariateNormal,
    "AutoBatchedMultivariateNormal": autoguide.AutoBatchedMultivariateNormal,
}
JOINT = JOINT_NORMAL | {
    "AutoIAFNormal": partial(autoguide.AutoIAFNormal, num_flows=1),
    "AutoBNAFNormal": partial(autoguide.AutoBNAFNormal, num_flows=1),
    "AutoDAIS": partial(autoguide.AutoDAIS, K=2),
}


def initial(guide, model, objective=None):
    """SVI and its first state."""
    schedule = optax.cosine_decay_schedule(0.1, 400)
    svi = SVI(model, guide, optax.adam(schedule), loss=objective or IWAE(1))
    return svi, svi.init(random.key(0))


def log_evidence(guide, model):
    svi, state = initial(guide, model)
    params = svi.get_params(state)
    return importance_samples(random.key(1), model, guide, params, num_particles=3).log_evidence


def number_of_weights(build, model):
    return jax.eval_shape(lambda: log_evidence(build(model), model)).size


@pytest.mark.parametrize("build", ELEMENTWISE.values(), ids=ELEMENTWISE)
def test_guides_with_a_site_in_the_plate_have_weights_per_datum(build):
    assert number_of_weights(build, local) == 4


@pytest.mark.parametrize("build", JOINT.values(), ids=JOINT)
def test_joint_guides_have_one_weight(build):
    assert number_of_weights(build, local) == 1


# Flows take long to compile, and one of the two says what both do.
GENERAL = {
    name: guide
    for name, guide in (ELEMENTWISE | JOINT).items()
    if name not in ("AutoBatchedMultivariateNormal", "AutoBNAFNormal")
}


@pytest.mark.parametrize("build", GENERAL.values(), ids=GENERAL)
def test_global_and_local_latents_share_one_weight(build):
    assert number_of_weights(build, local_and_global) == 1


@pytest.mark.parametrize("build", (ELEMENTWISE | JOINT).values(), ids=ELEMENTWISE | JOINT)
def test_the_bound_stays_below_the_evidence(build):
    @quickly
    def evaluate(keys):
        svi, state = initial(build(local), local, IWAE(3, num_replicates=300))
        return jax.vmap(lambda key: svi.evaluate(state._replace(rng_key=key)))(keys)

    bounds = -evaluate(random.split(random.key(2), 12))
    standard_error = bounds.std() / math.sqrt(len(bounds))
    assert bounds.mean() < EVIDENCE + 4.5 * standard_error
    # A joint guide counted once per datum exceeds the evidence by nats.
    assert standard_error < 0.5, "uninformative"


@pytest.mark.parametrize(
    "build", (ELEMENTWISE | JOINT_NORMAL).values(), ids=ELEMENTWISE | JOINT_NORMAL
)
def test_the_bound_of_a_guide_that_holds_the_posterior_is_the_evidence(build):
    """Trained, every weight is the evidence: a gradient gone wrong would stop short of that."""

    @quickly
    def train(keys):
        svi, state = initial(build(local), local, VIMCO(3, num_replicates=10))
        state, _ = jax.lax.scan(lambda state, _: svi.update(state), state, length=400)
        return jax.vmap(lambda key: svi.evaluate(state._replace(rng_key=key)))(keys)

    np.testing.assert_allclose(train(random.split(random.key(2), 3)), -EVIDENCE, atol=0.1)


def test_a_point_mass_is_fitted_to_the_mode():
    """An AutoDelta's objective is no bound; with any number of particles it is log p at a point."""

    @quickly
    def evaluate():
        svi, state = initial(autoguide.AutoDelta(local), local, IWAE(2))
        z = svi.get_params(state)["z_auto_loc"]
        log_p = dist.LogNormal(0.0, 1.0).log_prob(z) + dist.Normal(jnp.log(z), 1.0).log_prob(X)
        return svi.evaluate(state), -log_p.sum()

    np.testing.assert_allclose(*evaluate(), rtol=1e-9)


def test_discrete_latents_beside_an_autoguide():
    def model():
        with plate("data", 4):
            b = sample("b", dist.Bernoulli(0.4))
            z = sample("z", dist.Normal(2.0 * b, 1.0))
            sample("x", dist.Normal(z, 1.0), obs=X)

    continuous = autoguide.AutoNormal(handlers.block(model, hide=["b"]))

    def guide():
        logits = param("logits", jnp.linspace(-1.0, 1.0, 4))
        with plate("data", 4):
            sample("b", dist.Bernoulli(logits=logits))
        continuous()

    @quickly
    def step():
        svi, state = initial(guide, model, OVIS(3))
        after, loss = svi.update(state)
        return svi.get_params(after)["logits"] - svi.get_params(state)["logits"], loss

    moved, loss = step()
    assert abs(moved).min() > 0
    assert np.isfinite(loss)


def test_autoguides_that_subsample_with_the_model():
    def create_plates():
        return plate("data", 4, subsample_size=2)

    def model():
        with create_plates() as rows:
            z = sample("z", dist.Normal(0.0, 1.0))
            sample("x", dist.Normal(z, 1.0), obs=X[rows])

    build = partial(autoguide.AutoNormal, create_plates=create_plates)

    @quickly
    def train():
        svi, state = initial(build(model), model, IWAE(3))
        return jax.lax.scan(lambda state, _: svi.update(state), state, length=5)[1]

    assert number_of_weights(build, model) == 2
    assert np.isfinite(train()).all()
