"""How far draws are from reference draws, by their projections on random lines."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_gradest.estimators._validation import check_count
from numpyro_gradest.estimators.score._validation import as_reference, as_samples


def sliced_wasserstein(
    key: Array,
    samples: Float[Array, " *batch N D"],
    reference: Float[Array, " *batch P D"],
    *,
    num_projections: int = 100,
) -> Float[Array, " *batch"]:
    r"""Sliced Wasserstein distance of order 2 between two sets of draws.

    .. math::
        \mathrm{SW}^2 = \frac1L \sum_l \int_0^1
        \bigl(F^{-1}_{\theta_l \cdot x}(t) - F^{-1}_{\theta_l \cdot y}(t)\bigr)^2 dt

    over directions :math:`\theta_l` uniform on the sphere. The integral over quantiles is exact,
    also where N and P differ. Unlike what needs the score alone it sees missing modes.

    Args:
        key: Random key of the directions.
        samples: Draws to be judged, shape ``[*batch, N, D]``, N >= 2, float32 or float64.
        reference: Draws of what they should be, shape ``[*batch, P, D]``, same dtype.
        num_projections: L; in one dimension one is exact.

    Returns:
        Detached distance in the units of the samples, shape ``[*batch]``.

    Raises:
        TypeError: If ``samples`` is neither float32 nor float64, or ``reference`` has another
            dtype.
        ValueError: If N or P < 2, the shapes do not go together, an entry is not finite, or
            ``num_projections`` is not positive.

    Bias and variance:
        Asymptotically unbiased in K: two sets of draws of one distribution are about
        O((1/N + 1/P)^(1/2)) apart in a direction. The square is unbiased over directions.

    Cost:
        O(L (N + P) (D + log(N + P))) time and O(L (N + P)) memory per batch element.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> samples = jnp.array([[0.0], [1.0], [2.0]])
        >>> print(sliced_wasserstein(jax.random.key(0), samples, samples + 0.5))
        0.5

    References:
        Bonneel, Rabin, Peyre and Pfister, Sliced and Radon Wasserstein barycenters of measures,
        2015, definition 7.
    """
    check_count(num_projections, "num_projections", caller="sliced_wasserstein")
    samples = as_samples(samples, caller="sliced_wasserstein", may_be_few=True)
    reference = as_reference(reference, samples, caller="sliced_wasserstein")
    directions = random_directions(key, samples, num_projections)
    # Centred, which keeps the digits of samples far from zero. [*batch, L, N] and [*batch, L, P].
    mean = samples.mean(axis=-2, keepdims=True)
    project = partial(jnp.matmul, directions, precision=jax.lax.Precision.HIGHEST)
    quantiles = jnp.sort(project((samples - mean).mT), axis=-1)
    of_reference = jnp.sort(project((reference - mean).mT), axis=-1)
    widths, left, right = _common_steps(samples.shape[-2], reference.shape[-2])
    differences = quantiles[..., left] - of_reference[..., right]
    squared = jnp.sum(jnp.asarray(widths, samples.dtype) * differences**2, axis=-1)
    return jnp.sqrt(jnp.mean(squared, axis=-1))


def random_directions(
    key: Array, samples: Float[Array, " *batch N D"], number: int
) -> Float[Array, " L D"]:
    """Directions uniform on the sphere, for all batch elements the same."""
    normal = jax.random.normal(key, (number, samples.shape[-1]), samples.dtype)
    return normal / jnp.linalg.norm(normal, axis=-1, keepdims=True)


def _common_steps(number: int, other: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where either of two empirical quantile functions steps: widths, and the index in each."""
    # In units of 1 / (number * other), so that equal steps are equal.
    steps = np.union1d(np.arange(number) * other, np.arange(other) * number)
    widths = np.diff(steps, append=number * other) / (number * other)
    return widths, steps // other, steps // number
