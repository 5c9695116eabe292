"""A Bayesian neural network for regression, and guides for it, for NumPyro.

One hidden layer of tanh units. The weights of a unit, those that enter it and the one that leaves
it, are the unit's own draw: the guide that can only be sampled draws them jointly, unit by unit.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import random
from numpyro.distributions import constraints
from numpyro.infer import ELBO, MCMC, NUTS, SVI, Predictive
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.initialization import init_to_sample

from numpyro_gradest import AutoImplicit, Implicit

OPTIONS: dict = {}  # NumPyro's objectives need none
NUM_UNITS = 20
NUM_HIDDEN = 16
"""Width of the network inside the guide."""
LATENTS = ("weights", "shift", "outgoing", "bias", "noise")


def network(features, weights, shift, outgoing, bias):
    """The output for each datum, ``[N]``."""
    return jnp.tanh(features @ weights.T + shift) @ outgoing + bias


def model(features, targets=None, batch_size=None):
    num_inputs = features.shape[-1]
    with numpyro.plate("units", NUM_UNITS):
        weights = numpyro.sample("weights", dist.Normal(0, 1).expand([num_inputs]).to_event(1))
        shift = numpyro.sample("shift", dist.Normal(0, 1))
        outgoing = numpyro.sample("outgoing", dist.Normal(0, 1 / math.sqrt(NUM_UNITS)))
    bias = numpyro.sample("bias", dist.Normal(0, 1))
    noise = numpyro.sample("noise", dist.HalfNormal(1))
    with numpyro.plate("data", len(features), subsample_size=batch_size):
        features = numpyro.subsample(features, event_dim=1)
        targets = None if targets is None else numpyro.subsample(targets, event_dim=0)
        mean = network(features, weights, shift, outgoing, bias)
        numpyro.sample("targets", dist.Normal(mean, noise), obs=targets)


def unit_guide(features, targets=None, batch_size=None):
    """Each unit's weights are pushed jointly out of noise; the two other latents have densities."""
    num_inputs = features.shape[-1]
    dim = num_inputs + 2
    loc = numpyro.param("loc", lambda key: 0.5 * random.normal(key, (NUM_UNITS, dim)))
    skip = numpyro.param("skip", jnp.tile(0.1 * jnp.eye(dim), (NUM_UNITS, 1, 1)))
    first = numpyro.param("first", partial(_initial_weight, shape=(NUM_UNITS, dim, NUM_HIDDEN)))
    last = numpyro.param("last", jnp.zeros((NUM_UNITS, NUM_HIDDEN, dim)))
    with numpyro.plate("units", NUM_UNITS):
        normal = dist.Normal(0, 1).expand([dim]).to_event(1)
        e = numpyro.sample("noise_of_unit", normal, infer={"is_auxiliary": True})[:, None]
        drawn = loc + (e @ skip + jnp.tanh(e @ first) @ last)[:, 0]
        numpyro.sample("weights", Implicit(drawn[:, :num_inputs], event_dim=1))
        numpyro.sample("shift", Implicit(drawn[:, -2]))
        numpyro.sample("outgoing", Implicit(drawn[:, -1]))
    width = partial(numpyro.param, init_value=0.1, constraint=constraints.positive)
    numpyro.sample("bias", dist.Normal(numpyro.param("bias_loc", 0.0), width("bias_scale")))
    log_noise = numpyro.param("log_noise", -1.0)
    numpyro.sample("noise", dist.LogNormal(log_noise, width("log_noise_scale")))


def _initial_weight(key, shape):
    return random.normal(key, shape) / math.sqrt(shape[-2])


def mean_field_guide() -> AutoNormal:
    return AutoNormal(model, init_loc_fn=init_to_sample)


def joint_guide() -> AutoImplicit:
    return AutoImplicit(model, init_loc_fn=init_to_sample)


def fitter(
    guide: Callable, objective: ELBO, *, num_steps: int, learning_rate: float, batch_size: int
) -> Callable:
    """A function from seed, features and targets to draws; compiled once for data of one size."""
    schedule = optax.cosine_decay_schedule(learning_rate, num_steps)
    svi = SVI(model, guide, optax.adam(schedule), loss=objective, batch_size=batch_size)

    @jax.jit
    def fit(key, features, targets):
        state = svi.init(key, features, targets)
        state, _ = jax.lax.scan(
            lambda state, _: svi.update(state, features, targets), state, length=num_steps
        )
        predictive = Predictive(guide, params=svi.get_params(state), num_samples=1000)
        return predictive(key, features)

    return lambda seed, features, targets: fit(random.key(seed), features, targets)


def nuts_draws(
    seed: int,
    features: np.ndarray,
    targets: np.ndarray,
    *,
    num_warmup: int,
    num_samples: int,
    max_tree_depth: int = 10,
) -> dict[str, jax.Array]:
    """Draws by the host's NUTS."""
    kernel = NUTS(model, max_tree_depth=max_tree_depth)
    mcmc = MCMC(kernel, num_warmup=num_warmup, num_samples=num_samples, progress_bar=False)
    mcmc.run(random.key(seed), features, targets)
    return mcmc.get_samples()


@jax.jit
def predict(features, draws):
    """For each posterior draw the output for each datum ``[S, N]``, and the noise ``[S]``."""
    *weights, noise = (draws[name] for name in LATENTS)
    return jax.vmap(partial(network, features))(*weights), noise
