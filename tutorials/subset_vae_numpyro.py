"""A variational autoencoder whose code is a few subsets of fixed size, for NumPyro.

The model draws a subset of each group's items, uniformly, and the pixels given the subsets; the
guide reads the subsets' scores off the pixels.
"""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import random
from jax.typing import ArrayLike
from numpyro.infer import ELBO, SVI, TraceMeanField_ELBO
from sbn_numpyro import affine

from numpyro_gradest import KSubset, adapt_imle, imle


class SubsetVAE(NamedTuple):
    """Model and guide; inputs of both are centred."""

    pixel_logits: ArrayLike
    """Logits of the mean image, where the visible bias starts and the guide's input is centred."""
    num_groups: int = 8
    num_items: int = 8
    num_chosen: int = 3
    num_hidden: int = 200

    def model(self, images: jax.Array) -> None:
        prior = KSubset(jnp.zeros((self.num_groups, self.num_items)), self.num_chosen).to_event(1)
        with numpyro.plate("images", len(images)):
            subsets = numpyro.sample("subsets", prior)
            code = subsets.reshape(*subsets.shape[:-2], -1) - self.num_chosen / self.num_items
            hidden = jnp.tanh(affine("code_to_hidden", code, self.num_hidden))
            logits = affine("hidden_to_pixels", hidden, images.shape[-1], self.pixel_logits)
            numpyro.sample("pixels", dist.Bernoulli(logits=logits).to_event(1), obs=images)

    def guide(self, images: jax.Array) -> None:
        centred = images - jax.nn.sigmoid(self.pixel_logits)
        hidden = jnp.tanh(affine("pixels_to_hidden", centred, self.num_hidden))
        scores = affine("hidden_to_scores", hidden, self.num_groups * self.num_items)
        scores = scores.reshape(len(images), self.num_groups, self.num_items)
        with numpyro.plate("images", len(images)):
            numpyro.sample("subsets", KSubset(scores, self.num_chosen).to_event(1))


class Fit(NamedTuple):
    """A trained network, and of each epoch the mean bound in nats per image and the CPU time."""

    network: SubsetVAE
    params: dict[str, Any]
    bounds: list[float]
    seconds: list[float]


def fit(
    network: SubsetVAE,
    config: Any,
    images: np.ndarray,
    *,
    loss: ELBO | None = None,
    num_epochs: int,
    batch_size: int = 50,
    learning_rate: float = 3e-3,
) -> Fit:
    """Train on minibatches with Adam; an epoch is one compiled loop.

    ``config`` is what ``imle`` takes. ``loss`` is the ELBO with its exact KL divergence if left
    out.
    """
    optimizer = adapt_imle(optax.adam(learning_rate), config)
    guide = imle(network.guide, config)
    svi = SVI(network.model, guide, optimizer, loss=loss or TraceMeanField_ELBO())
    num_batches = len(images) // batch_size
    images = jnp.asarray(images)

    @jax.jit
    def run_epoch(state, key):
        rows = random.permutation(key, len(images))[: num_batches * batch_size]
        batches = images[rows].reshape(num_batches, batch_size, -1)
        # Minibatches are the data: plates that subsample would scale the gradient, and IMLE's step.
        return jax.lax.scan(svi.update, state, batches)

    state = jax.jit(svi.init)(random.key(0), images[:batch_size])
    bounds, seconds = [], []
    for key in random.split(random.key(1), num_epochs):
        start = time.process_time()
        state, losses = run_epoch(state, key)
        bounds.append(-float(losses.mean()) / batch_size)
        seconds.append(time.process_time() - start)
    return Fit(network, svi.get_params(state), bounds, seconds)
