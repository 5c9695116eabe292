"""One OVIS step for the two-layer sigmoid belief network, in JAX and optax alone.

What somebody would write who needs this one model and estimator only: the same maths as
``SVI(network.model, network.guide, adam, loss=OVIS(num_particles))`` without NumPyro.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax


def bernoulli_log_prob(logits: jax.Array, value: jax.Array) -> jax.Array:
    return (value * logits - jax.nn.softplus(logits)).sum(-1)


def affine(params: dict, name: str, inputs: jax.Array) -> jax.Array:
    return inputs @ params[f"{name}.weight"] + params[f"{name}.bias"]


def log_joint_and_guide(
    params: dict, key: jax.Array, batch: jax.Array, pixel_logits: jax.Array, num_particles: int
) -> tuple[jax.Array, jax.Array]:
    """log p(x, z) and log q(z | x), each ``[num_particles, len(batch)]``."""
    hidden_key, top_key = jax.random.split(key)
    hidden_logits = affine(params, "pixels_to_hidden", batch - jax.nn.sigmoid(pixel_logits))
    shape = (num_particles, *hidden_logits.shape)
    probs = jax.lax.stop_gradient(jax.nn.sigmoid(hidden_logits))
    hidden = jax.random.bernoulli(hidden_key, probs, shape).astype(batch.dtype)
    top_logits = affine(params, "hidden_to_top", hidden - 0.5)
    probs = jax.lax.stop_gradient(jax.nn.sigmoid(top_logits))
    top = jax.random.bernoulli(top_key, probs).astype(batch.dtype)
    log_q = bernoulli_log_prob(hidden_logits, hidden) + bernoulli_log_prob(top_logits, top)

    log_p = bernoulli_log_prob(params["prior"], top)
    log_p += bernoulli_log_prob(affine(params, "top_to_hidden", top - 0.5), hidden)
    log_p += bernoulli_log_prob(affine(params, "hidden_to_pixels", hidden - 0.5), batch)
    return log_p, log_q


def ovis_coefficients(log_weights: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Bound, weights v and learning signal -log(1 - v) - v."""
    log_sum = jax.nn.logsumexp(log_weights, axis=0)
    weights = jnp.exp(log_weights - log_sum)
    largest = jnp.arange(len(log_weights))[:, None] == log_weights.argmax(0)
    log_rest = jax.nn.logsumexp(jnp.where(largest, -jnp.inf, log_weights), axis=0)
    # 1 - v of the largest weight is a difference of nearly equal numbers: use the others' sum.
    log_one_minus = jnp.where(
        largest, log_rest - log_sum, jnp.log1p(-jnp.where(largest, 0.0, weights))
    )
    return log_sum - jnp.log(len(log_weights)), weights, -log_one_minus - weights


def make_step(
    optimizer: optax.GradientTransformation, pixel_logits: jax.Array, num_particles: int
) -> Callable:
    """Return ``step(params, optimizer_state, key, batch) -> (params, state, key, loss)``."""

    def loss(params: dict, key: jax.Array, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_p, log_q = log_joint_and_guide(params, key, batch, pixel_logits, num_particles)
        log_weights = jax.lax.stop_gradient(log_p - log_q)
        bound, weights, learning_signal = ovis_coefficients(log_weights)
        return -(weights * log_p + learning_signal * log_q).sum(), -bound.sum()

    @jax.jit
    def step(params: dict, state: optax.OptState, key: jax.Array, batch: jax.Array):
        key, step_key = jax.random.split(key)
        gradient, value = jax.grad(loss, has_aux=True)(params, step_key, batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, key, value

    return step
