"""A sigmoid belief network with two layers of binary units, for NumPyro.

The model draws ``top``, then ``hidden`` given ``top``, then the pixels given ``hidden``; the guide
goes the other way, from the pixels up. Every latent is a Bernoulli: nothing can be reparameterised.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import random
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike
from numpyro.handlers import seed, substitute, trace, uncondition
from numpyro.infer import ELBO, SVI
from tqdm import trange

from numpyro_gradest import IWAE, importance_samples

# What NumPyro's objectives are told: nothing, they run all particles at once.
OPTIONS: dict[str, Any] = {}


def affine(name: str, inputs: jax.Array, num_outputs: int, bias: ArrayLike = 0.0) -> jax.Array:
    """A learnable affine map; ``bias`` is where its bias starts."""
    num_inputs = inputs.shape[-1]
    weight = numpyro.param(
        f"{name}.weight",
        lambda key: random.normal(key, (num_inputs, num_outputs)) / jnp.sqrt(num_inputs),
    )
    bias = numpyro.param(f"{name}.bias", jnp.broadcast_to(bias, num_outputs))
    return inputs @ weight + bias


class SigmoidBeliefNetwork(NamedTuple):
    """Model and guide. Inputs of both are centred, which is worth about 4 nats after 20 epochs."""

    pixel_logits: ArrayLike
    """Logits of the mean image, where the visible bias starts and the guide's input is centred."""
    num_units: int = 200

    def model(self, images: jax.Array, batch_size: int | None = None) -> None:
        # Starts near 0 but not at it: numpyro's Bernoulli(logits=0.) has a wrong gradient there.
        prior = numpyro.param("prior", lambda key: 0.01 * random.normal(key, (self.num_units,)))
        with numpyro.plate("images", len(images), subsample_size=batch_size):
            batch = numpyro.subsample(images, event_dim=1)
            top = numpyro.sample("top", dist.Bernoulli(logits=prior).to_event(1))
            logits = affine("top_to_hidden", top - 0.5, self.num_units)
            hidden = numpyro.sample("hidden", dist.Bernoulli(logits=logits).to_event(1))
            logits = affine("hidden_to_pixels", hidden - 0.5, batch.shape[-1], self.pixel_logits)
            numpyro.sample("pixels", dist.Bernoulli(logits=logits).to_event(1), obs=batch)

    def guide(self, images: jax.Array, batch_size: int | None = None) -> None:
        with numpyro.plate("images", len(images), subsample_size=batch_size):
            batch = numpyro.subsample(images, event_dim=1)
            centred = batch - jax.nn.sigmoid(self.pixel_logits)
            logits = affine("pixels_to_hidden", centred, self.num_units)
            hidden = numpyro.sample("hidden", dist.Bernoulli(logits=logits).to_event(1))
            logits = affine("hidden_to_top", hidden - 0.5, self.num_units)
            numpyro.sample("top", dist.Bernoulli(logits=logits).to_event(1))


class Fit(NamedTuple):
    """A trained network, and the mean bound of each epoch in nats per image."""

    network: SigmoidBeliefNetwork
    params: dict[str, Any]
    bounds: list[float]


def fit(
    network: SigmoidBeliefNetwork,
    objective: ELBO,
    images: np.ndarray,
    *,
    num_epochs: int,
    batch_size: int = 50,
    learning_rate: float = 3e-3,
    label: str = "",
) -> Fit:
    """Train on minibatches with Adam; an epoch is one compiled loop."""
    optimizer = optax.adam(learning_rate)
    svi = SVI(network.model, network.guide, optimizer, loss=objective, batch_size=batch_size)

    @jax.jit
    def run_epoch(state, images):
        num_steps = len(images) // batch_size
        return jax.lax.scan(lambda state, _: svi.update(state, images), state, length=num_steps)

    state = svi.init(random.key(0), images)
    bounds = []
    with trange(num_epochs, desc=label, unit="epoch") as progress:
        for _ in progress:
            state, losses = run_epoch(state, images)
            bounds.append(-float(losses.mean()) / len(images))
            progress.set_postfix_str(f"bound {bounds[-1]:.2f} nats per image")
    return Fit(network, svi.get_params(state), bounds)


def held_out_bound(fit: Fit, images: np.ndarray, *, num_particles: int = 1000) -> float:
    """The K-particle bound on log p(image), in nats per image; memory does not grow with K."""
    objective = IWAE(num_particles, chunk_size=20, **OPTIONS)
    model, guide = fit.network.model, fit.network.guide
    loss = jax.jit(lambda key, params, x: objective.loss(key, params, model, guide, x))
    return -float(loss(random.key(1), fit.params, images)) / len(images)


def gradient_moments(
    fit: Fit, objective: ELBO, images: np.ndarray, *, num_draws: int
) -> tuple[float, float]:
    """Squared norm of the mean of the guide's gradient, and its total variance."""
    model, guide = fit.network.model, fit.network.guide
    in_guide = trace(seed(guide, random.key(0))).get_trace(images)
    guide_params = {k: v for k, v in fit.params.items() if k in in_guide}

    @jax.jit
    def sums(key, guide_params, params, images):
        def loss(guide_params, key):
            return objective.loss(key, params | guide_params, model, guide, images)

        def add(sums, key):
            gradient, _ = ravel_pytree(jax.grad(loss)(guide_params, key))
            return (sums[0] + gradient, sums[1] + gradient @ gradient), None

        zeros = jnp.zeros_like(ravel_pytree(guide_params)[0])
        return jax.lax.scan(add, (zeros, 0.0), random.split(key, num_draws))[0]

    total, total_square = sums(random.key(2), guide_params, fit.params, images)
    mean_square = float(total @ total) / num_draws**2
    variance = (float(total_square) / num_draws - mean_square) * num_draws / (num_draws - 1)
    # The mean of a finite number of draws has noise of its own, which would pass for signal.
    return mean_square - variance / num_draws, variance


def draw_images(fit: Fit, num_images: int) -> np.ndarray:
    """Pixel probabilities of images drawn from the model."""
    images = np.empty((num_images, len(fit.network.pixel_logits)), np.float32)
    return np.asarray(_pixel_probs(fit, {}, images))


def reconstruct(fit: Fit, images: np.ndarray) -> np.ndarray:
    """Pixel probabilities of images, averaged over draws from their posterior."""
    model, guide = fit.network.model, fit.network.guide

    @jax.jit
    def average(key, params, images):
        draws = importance_samples(key, model, guide, params, images, num_samples=50)
        return jax.vmap(lambda latents: _pixel_probs(fit, latents, images))(draws.samples).mean(0)

    return np.asarray(average(random.key(3), fit.params, images))


def _pixel_probs(fit: Fit, latents: dict[str, jax.Array], images: ArrayLike) -> jax.Array:
    model = substitute(uncondition(fit.network.model), data=fit.params | latents)
    return trace(seed(model, random.key(4))).get_trace(images)["pixels"]["fn"].mean
