"""Sums over pairs of samples without an array over pairs and dimensions."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def product(left: Float[Array, " *batch P N"], right: Float[Array, " *batch N D"]) -> Array:
    """Matrix product in full precision: accelerators round the factors unless told not to."""
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def squared_distances(
    points: Float[Array, " *batch P D"], samples: Float[Array, " *batch N D"]
) -> Float[Array, " *batch P N"]:
    """|x_i - y_j|^2 from inner products: both should be centred, or their offset is lost digits."""
    of_points = jnp.sum(points**2, axis=-1)[..., :, None]
    of_samples = jnp.sum(samples**2, axis=-1)[..., None, :]
    squared = product(-2 * points, samples.mT) + of_points + of_samples
    # What is no more than rounding is zero: between samples that coincide nothing may differ.
    rounding = 8 * float(jnp.finfo(squared.dtype).eps)
    return jnp.where(squared > rounding * of_points + rounding * of_samples, squared, 0.0)


def weighted_differences(
    weights: Float[Array, " *batch P N"],
    points: Float[Array, " *batch P D"],
    samples: Float[Array, " *batch N D"],
) -> Float[Array, " *batch P D"]:
    """sum_j w_ij (x_i - y_j)."""
    return jnp.sum(weights, axis=-1, keepdims=True) * points - product(weights, samples)


def pairwise_median(
    squared_distance: Float[Array, " *batch N N"],
) -> Float[Array, " *batch"]:
    """Lower median of the distances between different points, with its floor."""
    num_points = squared_distance.shape[-1]
    rows, columns = np.triu_indices(num_points, 1)
    squared = squared_distance[..., rows, columns]
    mean = jnp.mean(squared, axis=-1)
    median = _smallest(squared, (squared.shape[-1] + 1) // 2)
    # Squared distances are known to about eps times their mean: stay well above that.
    floor = float(jnp.finfo(squared.dtype).eps) ** 0.5 * mean
    bandwidth = jnp.sqrt(jnp.maximum(median, floor))
    return jnp.where(mean > 0, bandwidth, 1.0)


def _smallest(values: Float[Array, " *batch M"], rank: int) -> Float[Array, " *batch"]:
    """The value of that rank, counted from 1, among values that are not negative.

    Sorting would take most of the time of an estimate, since XLA is slow at it on CPUs. Numbers
    that are not negative are ordered as their bits are: halve the range of bits, and count.
    """
    num_bits = jnp.finfo(values.dtype).bits
    highest = jax.lax.bitcast_convert_type(jnp.max(values, axis=-1), jnp.dtype(f"int{num_bits}"))

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        lowest, highest = bounds
        middle = lowest + (highest - lowest) // 2
        threshold = jax.lax.bitcast_convert_type(middle, values.dtype)
        is_enough = jnp.sum(values <= threshold[..., None], axis=-1, dtype=jnp.int32) >= rank
        return jnp.where(is_enough, lowest, middle + 1), jnp.where(is_enough, middle, highest)

    lowest, _ = jax.lax.fori_loop(0, num_bits - 1, halve, (jnp.zeros_like(highest), highest))
    return jax.lax.bitcast_convert_type(lowest, values.dtype)
