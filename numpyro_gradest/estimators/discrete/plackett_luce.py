r"""Items taken one after the other, each with probability proportional to exp theta of those left.

The order of all items is a ranking, the first k of them without their order a subset. Both come
from Gumbel noise, and equivalently from independent exponential clocks of rates w = exp theta: the
items come in the order in which their clocks ring. That the clocks of a subset S all ring before
the first of the others, whose rates add up to W, has probability

.. math:: p(S) = \int_0^\infty e^{-v} \prod_{i \in S} (1 - e^{-v w_i / W}) \, dv.

In s = log v the integrand is log-concave and entire, and vanishes at both ends, so a sum over
equidistant points converges exponentially. The points are laid where the integrand is not
negligible, which holds for any weights; on the interval [0, 1] of exp(-v) no fixed rule does.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from numpyro_gradest.estimators.discrete.noise import GumbelNoise

_NEVER = -1e30
# Points of the sum, and of the coarse search for where to lay them.
_NUM_POINTS = 192
_NUM_COARSE = 64
# Fall of the logarithm of the integrand from its largest value, beyond which it is left out.
_DROP = 36.0


def draw_ranking(key: Array, theta: Float[Array, " *batch n"]) -> Int[Array, " *batch n"]:
    """The items from first to last."""
    noisy = jax.lax.stop_gradient(theta) + GumbelNoise().sample_like(key, theta)
    return jnp.argsort(-noisy, axis=-1)


def ranking_log_prob(
    theta: Float[Array, " *batch n"], ranking: Int[Array, " *batch n"]
) -> Float[Array, " *batch"]:
    """Logarithm of the probability of this order."""
    in_order = jnp.take_along_axis(theta, ranking, axis=-1)
    log_left = jax.lax.cumlogsumexp(in_order, axis=in_order.ndim - 1, reverse=True)
    return jnp.sum(in_order - log_left, axis=-1)


def draw_subset(
    key: Array, theta: Float[Array, " *batch n"], num_ones: int
) -> Float[Array, " *batch n"]:
    """The first items, marked by ones."""
    noisy = jax.lax.stop_gradient(theta) + GumbelNoise().sample_like(key, theta)
    return _marks(jax.lax.top_k(noisy, num_ones)[1], noisy)


def subset_log_prob(
    theta: Float[Array, " *batch n"], subset: Float[Array, " *batch n"], num_ones: int
) -> Float[Array, " *batch"]:
    """Logarithm of the probability that the first items are these."""
    if num_ones in (0, theta.shape[-1]):
        return 0.0 * jnp.sum(theta, axis=-1)
    if num_ones == 1:  # linear in the subset
        return jnp.sum(subset * theta, axis=-1) - jax.nn.logsumexp(theta, axis=-1)
    inside = jax.lax.top_k(jax.lax.stop_gradient(subset), num_ones)[1]
    others = jnp.where(_marks(inside, theta) > 0, _NEVER, theta)
    log_total = jax.nn.logsumexp(others, axis=-1, keepdims=True)
    log_ratios = jnp.take_along_axis(theta, inside, axis=-1) - log_total
    points, spacing = _points(jax.lax.stop_gradient(log_ratios))
    log_integral = jax.nn.logsumexp(_log_integrand(points, log_ratios), axis=-1) + jnp.log(spacing)
    return log_integral + jnp.sum(jnp.minimum(log_ratios, 0.0), axis=-1)


def _marks(indices: Array, theta: Array) -> Array:
    return jnp.put_along_axis(jnp.zeros_like(theta), indices, 1.0, axis=-1, inplace=False)


def _points(log_ratios: Array) -> tuple[Array, Array]:
    """Where to evaluate the integrand, ``[*batch, points]``, and how far apart."""
    k = log_ratios.shape[-1]
    # At its right end the integrand is that of a gamma variable of shape k + 1 or falls earlier.
    first, last = -_DROP - 2, math.log(2 * k + 60)
    coarse = jnp.linspace(first, last, _NUM_COARSE, dtype=log_ratios.dtype)
    step = (last - first) / (_NUM_COARSE - 1)
    heights = _log_integrand(coarse, log_ratios)
    is_high = heights > jnp.max(heights, axis=-1, keepdims=True) - _DROP
    left = jnp.min(jnp.where(is_high, coarse, jnp.inf), axis=-1) - step
    right = jnp.max(jnp.where(is_high, coarse, -jnp.inf), axis=-1) + step
    spacing = (right - left) / _NUM_POINTS
    middles = jnp.arange(_NUM_POINTS, dtype=left.dtype) + 0.5
    return left[..., None] + spacing[..., None] * middles, spacing


def _log_integrand(log_times: Array, log_ratios: Array) -> Array:
    """Less the factors by which slow clocks lower it everywhere, beside which it would lose its
    digits."""
    log_times, log_ratios = log_times[..., None], log_ratios[..., None, :]
    lowered = jnp.minimum(log_ratios, 0.0)
    is_early = log_times + log_ratios < -20
    # In the double where, neither branch meets a value at which its derivative is not finite.
    early = jnp.where(is_early, log_times + log_ratios, -20.0)
    late = jnp.minimum(jnp.where(is_early, 0.0, log_times + log_ratios), 6.0)
    log_rung = jnp.where(
        is_early,
        log_times + (log_ratios - lowered) - jnp.exp(early) / 2,
        jnp.log(-jnp.expm1(-jnp.exp(late))) - lowered,
    )
    return (log_times - jnp.exp(log_times))[..., 0] + jnp.sum(log_rung, axis=-1)
