"""The value of the entropy of a distribution that can only be sampled.

Notation: r_i distance of x_i to its k-th nearest neighbour, V_D volume of the unit ball.
"""

import math

import jax
import jax.numpy as jnp
from jax.scipy.special import digamma
from jaxtyping import Array, Float

from numpyro_gradest.estimators.score._pairs import squared_distances
from numpyro_gradest.estimators.score._validation import as_samples


def knn_entropy(
    samples: Float[Array, " *batch N D"], *, num_neighbors: int = 3
) -> Float[Array, " *batch"]:
    r"""Kozachenko-Leonenko estimate of the differential entropy H[q] in nats.

    .. math:: \hat H = \psi(N) - \psi(k) + \log V_D + \frac DN \sum_i \log r_i

    An estimate, not a bound. Its gradient is not an estimate of the entropy's: that is
    :func:`entropy_surrogate`.

    Args:
        samples: Independent draws of q, shape ``[*batch, N, D]``, N >= 2, float32 or float64.
        num_neighbors: k; at most N - 1 are used. More mean less variance and more bias.

    Returns:
        Detached entropy in nats, shape ``[*batch]``. Where draws coincide their distance counts as
        the smallest that rounding can tell.

    Raises:
        TypeError: If ``samples`` is neither float32 nor float64.
        ValueError: If N < 2, a sample is not finite, or ``num_neighbors`` is not positive.

    Bias and variance:
        Biased by design, O((k/N)^(2/D)): slowly better in many dimensions. Variance O(1/N).

    Cost:
        O(N^2 D) time and O(N^2) memory per batch element.

    Example:
        >>> import jax, math
        >>> normal = jax.random.normal(jax.random.key(0), (1000, 1))
        >>> bool(abs(knn_entropy(normal) - 0.5 * math.log(2 * math.pi * math.e)) < 0.1)
        True

    References:
        Kozachenko and Leonenko, Sample estimate of the entropy of a random vector, 1987. Kraskov,
        Stoegbauer and Grassberger, `Estimating mutual information
        <https://arxiv.org/abs/cond-mat/0305641>`_, 2004, eq. 20.
    """
    if num_neighbors < 1:
        raise ValueError(f"knn_entropy needs num_neighbors >= 1, got {num_neighbors}.")
    samples = as_samples(samples, caller="knn_entropy", may_be_few=True)
    num_samples, dim = samples.shape[-2:]
    k = min(num_neighbors, num_samples - 1)
    centred = samples - jnp.mean(samples, axis=-2, keepdims=True)
    squared_distance = squared_distances(centred, centred)
    scale = jnp.mean(jnp.sum(centred**2, axis=-1), axis=-1)
    # A point is its own nearest neighbour, though rounding may put others as near.
    squared_distance = jnp.where(jnp.eye(num_samples, dtype=bool), 0.0, squared_distance)
    squared_radius = -jax.lax.top_k(-squared_distance, k + 1)[0][..., -1]
    smallest = jnp.finfo(samples.dtype).eps * scale + jnp.finfo(samples.dtype).tiny
    log_radius = 0.5 * jnp.log(jnp.maximum(squared_radius, smallest[..., None]))
    log_volume = 0.5 * dim * math.log(math.pi) - math.lgamma(0.5 * dim + 1)
    difference = digamma(jnp.asarray(num_samples, samples.dtype)) - digamma(
        jnp.asarray(k, samples.dtype)
    )
    return difference + log_volume + dim * jnp.mean(log_radius, axis=-1)
