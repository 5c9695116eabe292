"""How far draws are from a target of which only the score is known.

Notation: draws x_i, s_i the score of the target p there, k(x, y) = f(|x - y|^2) a radial kernel.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_gradest.estimators.score._pairs import product
from numpyro_gradest.estimators.score._standardize import standardize
from numpyro_gradest.estimators.score._validation import as_samples, as_scores
from numpyro_gradest.estimators.score.kernels import RadialKernel


def kernel_stein_discrepancy(
    samples: Float[Array, " *batch N D"],
    model_scores: Float[Array, " *batch N D"],
    *,
    kernel: RadialKernel | None = None,
    whiten: bool = True,
) -> Float[Array, " *batch"]:
    r"""Kernel Stein discrepancy between draws and a target known by its score.

    .. math::
        \mathrm{KSD}^2 = \frac{1}{N^2} \sum_{i,j} h(x_i, x_j), \qquad
        h(x, y) = s_x \cdot s_y\, k + s_x \cdot \nabla_y k + s_y \cdot \nabla_x k
        + \nabla_x \cdot \nabla_y k

    the V-statistic, diagonal included, which is never negative. Draws of p leave
    :math:`E[h(x, x)] / N` of it.

    It is blind to modes: between modes that are far apart the score is that of each of them alone,
    so draws that sit in one of two modes, or share them wrongly, look exact. Compare with
    reference draws by :func:`sliced_wasserstein` where there may be several.

    Args:
        samples: Draws to be judged, shape ``[*batch, N, D]``, N >= 2, float32 or float64.
        model_scores: grad log p at the samples, same shape; p need not be normalised.
        kernel: :class:`RBF` or :class:`IMQ`, with a bandwidth in whitened units or without one;
            ``None`` is IMQ at the median distance, whose tails notice draws that are far off.
        whiten: Compare in coordinates in which the draws have covariance one. The discrepancy then
            has no units.

    Returns:
        Detached discrepancy, the root of the V-statistic, shape ``[*batch]``.

    Raises:
        TypeError: If ``samples`` is neither float32 nor float64, or the scores have another dtype.
        ValueError: If N < 2, the shapes differ, an entry is not finite, or the bandwidth makes no
            sense.

    Bias and variance:
        Biased by design: the diagonal adds O(1/N) to the square, and the kernel is fitted to the
        draws.

    Cost:
        O(N^2 D) time and O(N^2 + N D) memory per batch element; no array over pairs and dimensions.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> normal = jax.scipy.special.ndtri(jnp.linspace(0.005, 0.995, 100))[:, None]
        >>> exact = kernel_stein_discrepancy(normal, -normal)
        >>> shifted = kernel_stein_discrepancy(normal + 0.5, -normal - 0.5)
        >>> bool(shifted > 3 * exact)
        True

    References:
        Gorham and Mackey, `Measuring Sample Quality with Kernels
        <https://arxiv.org/abs/1703.01717>`_, 2017, section 3 and theorem 8 for the kernel.
        Liu, Lee and Jordan, `A Kernelized Stein Discrepancy
        <https://arxiv.org/abs/1602.03253>`_, 2016, equation 14.
    """
    samples = as_samples(samples, caller="kernel_stein_discrepancy")
    scores = as_scores(model_scores, samples, caller="kernel_stein_discrepancy")
    stein_kernel = stein_kernel_matrix(samples, scores, kernel, whiten)
    return jnp.sqrt(jnp.maximum(stein_kernel.mean(axis=(-2, -1)), 0.0))


def stein_kernel_matrix(
    samples: Float[Array, " *batch N D"],
    scores: Float[Array, " *batch N D"],
    kernel: RadialKernel | None = None,
    whiten: bool = True,
) -> Float[Array, " *batch N N"]:
    """h at every pair of draws that have been checked."""
    whitening, points, kernel, squared_distance = standardize(
        samples, kernel, whiten, caller="kernel_stein_discrepancy"
    )
    scores = whitening.whitened_score(scores)
    value, first, second = kernel.derivatives(squared_distance, 2)
    # (s_i - s_j) . (x_i - x_j) as a sum of products, not of a [N, N, D] array.
    across = product(scores, points.mT)
    own = jnp.diagonal(across, axis1=-2, axis2=-1)
    differences = own[..., :, None] + own[..., None, :] - across - across.mT
    dim = samples.shape[-1]
    of_kernel = -2 * dim * first - 4 * squared_distance * second
    return product(scores, scores.mT) * value - 2 * first * differences + of_kernel
