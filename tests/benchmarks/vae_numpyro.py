"""A Gaussian variational autoencoder, which doubly reparameterised gradients need, for NumPyro."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

from tutorials.sbn_numpyro import affine

NUM_UNITS = 200
NUM_LATENTS = 50


def model(images: jax.Array) -> None:
    with numpyro.plate("images", len(images)):
        normal = dist.Normal(jnp.zeros(NUM_LATENTS), 1.0).to_event(1)
        hidden = jnp.tanh(affine("decoder", numpyro.sample("z", normal), NUM_UNITS))
        logits = affine("pixels", hidden, images.shape[-1])
        numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=images)


def guide(images: jax.Array) -> None:
    with numpyro.plate("images", len(images)):
        hidden = jnp.tanh(affine("encoder", images, NUM_UNITS))
        scale = jnp.exp(affine("log_scale", hidden, NUM_LATENTS))
        numpyro.sample("z", dist.Normal(affine("loc", hidden, NUM_LATENTS), scale).to_event(1))
