"""Doubly reparameterised gradients of NumPyro's own guides, and under its transformations."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from numpyro.infer.initialization import init_to_value

from numpyro_gradest import IWAE, ReweightedWakeSleep
from tests.conformance.backends import QUICK_TO_COMPILE

quickly = partial(jax.jit, compiler_options=QUICK_TO_COMPILE)


def model():
    z = numpyro.sample("z", dist.LogNormal(0.0, 1.0))
    numpyro.sample("x", dist.Normal(jnp.log(z), 1.0), obs=1.0)


MEAN, DEVIATION = 0.5, math.sqrt(0.5)
"""Of the exact posterior of log z."""


def transformed_guide():
    loc, scale = numpyro.param("loc", MEAN), numpyro.param("s", DEVIATION)
    base = dist.Normal(loc, scale)
    numpyro.sample("z", dist.TransformedDistribution(base, dist.transforms.ExpTransform()))


GUIDES = {
    "AutoNormal": partial(AutoNormal, init_scale=DEVIATION),
    "AutoMultivariateNormal": partial(AutoMultivariateNormal, init_scale=DEVIATION),
    "transformed": lambda model, init_loc_fn: transformed_guide,
}


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("objective", [IWAE, ReweightedWakeSleep])
def test_no_noise_where_the_guide_is_the_posterior(objective, guide):
    start = init_to_value(values={"z": jnp.exp(MEAN)})
    guide = GUIDES[guide](model, init_loc_fn=start)
    svi = SVI(model, guide, optax.sgd(1.0), loss=objective(4, reparam="dreg"))

    @quickly
    def step():
        """One of size one along the gradient."""
        before = svi.init(random.key(0))
        after, _ = svi.update(before)
        return [svi.optim.get_params(state.optim_state) for state in (before, after)]

    before, after = step()
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-10), after, before)


def test_point_masses_are_parameters_and_not_draws():
    svi = SVI(model, AutoDelta(model), optax.sgd(1.0), loss=IWAE(2, reparam="dreg"))
    with pytest.raises(ValueError, match=r'reparam="dreg".*has none'):
        jax.eval_shape(lambda: svi.update(svi.init(random.key(0))))


def encoded_model(code, x):
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def encoded_guide(code, x):
    numpyro.sample("z", dist.Normal(code, 0.7))


def test_arguments_that_the_guide_depends_on_are_parameters_too():
    """An encoder may lie outside of the guide: its gradient, too, is that along the path alone."""
    slope, x = jnp.array(0.3), jnp.array(1.0)
    loss = IWAE(3, reparam="dreg")

    def outside(slope):
        return loss.loss(random.key(0), {}, encoded_model, encoded_guide, slope * x, x)

    def inside(slope):
        def guide(code, x):
            encoded_guide(numpyro.param("slope", 0.0) * x, x)

        return loss.loss(random.key(0), {"slope": slope}, encoded_model, guide, None, x)

    actual, desired = (quickly(jax.grad(loss))(slope) for loss in (outside, inside))
    np.testing.assert_allclose(actual, desired, rtol=1e-10)
