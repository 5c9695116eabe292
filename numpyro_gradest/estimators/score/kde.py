"""The score of a kernel density estimate, the baseline that the other estimators should beat."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_gradest.estimators.score._pairs import squared_distances, weighted_differences
from numpyro_gradest.estimators.score._standardize import standardize
from numpyro_gradest.estimators.score._validation import as_points, as_samples
from numpyro_gradest.estimators.score.kernels import RadialKernel
from numpyro_gradest.estimators.score.whitening import Whitening


class KDEFit(NamedTuple):
    """A fitted kernel density: ``scores`` at the samples, ``score(points)`` anywhere."""

    scores: Float[Array, " *batch N D"]
    """The estimate at the samples, in their units."""
    whitening: Whitening
    whitened: Float[Array, " *batch N D"]
    """The samples in whitened coordinates."""
    kernel: RadialKernel

    def score(self, points: Float[Array, " *batch P D"]) -> Float[Array, " *batch P D"]:
        """Estimate at other points.

        Args:
            points: Points of the dtype and batch shape of the samples, ``[*batch, P, D]``.

        Returns:
            Detached score, shape ``[*batch, P, D]``. Zero where the kernel vanishes at every
            sample.
        """
        points = self.whitening.points(as_points(points, self.scores, caller="KDEFit.score"))
        squared_distance = squared_distances(points, self.whitened)
        score = _score(self.kernel, squared_distance, points, self.whitened)
        return self.whitening.score(score)


def fit_kde(
    samples: Float[Array, " *batch N D"],
    *,
    kernel: RadialKernel | None = None,
    whiten: bool = True,
) -> KDEFit:
    """Score of a kernel density estimate, with what it takes to evaluate it at other points.

    As :func:`kde_score`, which returns the estimate at the samples alone.

    Args:
        samples: Independent draws of q, shape ``[*batch, N, D]``, N >= 2, float32 or float64.
        kernel: :class:`RBF` or :class:`IMQ`; ``None`` is IMQ at the median distance.
        whiten: Estimate in coordinates with covariance one.

    Returns:
        A :class:`KDEFit`, detached, with the leading axes of the samples.

    Raises:
        TypeError: If ``samples`` is neither float32 nor float64.
        ValueError: If N < 2, a sample is not finite, or the bandwidth makes no sense.

    Bias and variance:
        Biased by design: it is the score of q blurred by the kernel.

    Cost:
        O(N^2 D) time and O(N^2 + N D) memory per batch element; evaluation at P points O(N P D).

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> fit = fit_kde(jnp.linspace(-2, 2, 50)[:, None])
        >>> print(np.abs(fit.score(jnp.array([[0.0]]))) < 1e-3)  # a symmetric density
        [[ True]]

    References:
        Li and Turner, `Gradient Estimators for Implicit Models
        <https://arxiv.org/abs/1705.07107>`_, 2018, section 3, where it is the plug-in estimate.
    """
    return _fit(samples, kernel, whiten, caller="fit_kde")


def kde_score(
    samples: Float[Array, " *batch N D"],
    *,
    kernel: RadialKernel | None = None,
    whiten: bool = True,
) -> Float[Array, " *batch N D"]:
    r"""Score of a kernel density estimate at samples of q.

    .. math:: g_i = \nabla \log \sum_k k(x_i, x_k) = \frac{\sum_k \nabla_{x_i} k(x_i, x_k)}
        {\sum_k k(x_i, x_k)}

    A baseline: at the bandwidths that other estimators want, the density is far too smooth.

    Args:
        samples: Independent draws of q, shape ``[*batch, N, D]``, N >= 2, float32 or float64.
        kernel: :class:`RBF` or :class:`IMQ`, with a bandwidth in whitened units or without one;
            ``None`` is IMQ at the median distance.
        whiten: Estimate in coordinates with covariance one, and map the score back.

    Returns:
        Detached estimate of grad log q at each sample, in the inverse units of the samples, shape
        ``[*batch, N, D]``. Zero where all samples coincide.

    Raises:
        TypeError: If ``samples`` is neither float32 nor float64.
        ValueError: If N < 2, a sample is not finite, or the bandwidth makes no sense.

    Bias and variance:
        Biased by design: it is the score of q blurred by the kernel, for a Gaussian q of variance
        1 and an RBF kernel of bandwidth h about 1 / (1 + h^2) times the true one.

    Cost:
        O(N^2 D) time and O(N^2 + N D) memory per batch element; nothing is factorised.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> samples = jnp.array([[-1.0], [0.0], [1.0]])
        >>> print(np.asarray(kde_score(samples)).T.round(2) + 0.0)
        [[ 0.25  0.   -0.25]]

    References:
        Li and Turner, `Gradient Estimators for Implicit Models
        <https://arxiv.org/abs/1705.07107>`_, 2018, section 3, where it is the plug-in estimate.
    """
    return _fit(samples, kernel, whiten, caller="kde_score").scores


def _fit(samples: Array, kernel: RadialKernel | None, whiten: bool, *, caller: str) -> KDEFit:
    samples = as_samples(samples, caller=caller)
    whitening, points, kernel, squared_distance = standardize(
        samples, kernel, whiten, caller=caller
    )
    scores = whitening.score(_score(kernel, squared_distance, points, points))
    return KDEFit(scores=scores, whitening=whitening, whitened=points, kernel=kernel)


def _score(
    kernel: RadialKernel,
    squared_distance: Float[Array, " *batch P N"],
    points: Float[Array, " *batch P D"],
    samples: Float[Array, " *batch N D"],
) -> Float[Array, " *batch P D"]:
    value, derivative = kernel.derivatives(squared_distance, 1)
    density = jnp.sum(value, axis=-1, keepdims=True)
    # Far from all samples both may underflow.
    smallest = jnp.finfo(points.dtype).tiny
    return 2 * weighted_differences(derivative, points, samples) / jnp.maximum(density, smallest)
