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
    products = product(points, samples.mT)
    of_points = jnp.sum(points**2, axis=-1)[..., :, None]
    of_samples = jnp.sum(samples**2, axis=-1)[..., None, :]
    total = of_points + of_samples
    squared = total - 2 * products
    # What is no more than rounding is zero: between samples that coincide nothing may differ.
    return jnp.where(squared > 8 * float(jnp.finfo(squared.dtype).eps) * total, squared, 0.0)


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
    median = jnp.sort(squared, axis=-1)[..., (squared.shape[-1] - 1) // 2]
    # Squared distances are known to about eps times their mean: stay well above that.
    floor = float(jnp.finfo(squared.dtype).eps) ** 0.5 * mean
    bandwidth = jnp.sqrt(jnp.maximum(median, floor))
    return jnp.where(mean > 0, bandwidth, 1.0)
