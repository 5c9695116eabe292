"""A sigmoid belief network with two layers of binary units, for NumPyro.

The model draws ``top``, then ``hidden`` given ``top``, then the pixels given ``hidden``; the guide goes
the other way, from the pixels up. Every latent is a Bernoulli, so nothing can be reparameterised.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import random
from jax.typing import ArrayLike


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
    """Logits of the pixels' means: the visible bias starts here, and the guide's input is centred here."""
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
