"""The Stein gradient estimator: the score of samples whose density is unknown.

Notation follows Li and Turner (2018): samples x_i of q, K_ij = k(x_i, x_j), eta the ridge,
<grad, K>_i = sum_k grad_{x_k} k(x_i, x_k), and G the estimate of grad log q at the samples.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.scipy.linalg import cho_solve
from jaxtyping import Array, Float

from numpyro_gradest.estimators.score._pairs import product, squared_distances, weighted_differences
from numpyro_gradest.estimators.score._standardize import standardize
from numpyro_gradest.estimators.score._validation import as_points, as_samples, check_ridge
from numpyro_gradest.estimators.score.kernels import RadialKernel
from numpyro_gradest.estimators.score.whitening import Whitening


class SteinFit(NamedTuple):
    """A fitted Stein estimator: ``scores`` at the samples, ``score(points)`` anywhere."""

    scores: Float[Array, " *batch N D"]
    """G, the estimate at the samples, in their units."""
    whitening: Whitening
    whitened: Float[Array, " *batch N D"]
    """The samples in whitened coordinates."""
    kernel: RadialKernel
    ridge: Float[Array, " *batch"]
    cholesky: Float[Array, " *batch N N"]
    """Lower Cholesky factor of K + eta I."""

    def score(self, points: Float[Array, " *batch P D"]) -> Float[Array, " *batch P D"]:
        r"""Estimate at other points.

        .. math::
            \hat g(y) = -\frac{K_{yX} G - (K_{yX} A + 1^\top) \nabla_y K(\cdot, y)}
            {1 + \eta - K_{yX} A K_{Xy}}, \qquad A = (K + \eta I)^{-1}

        which is what fitting again with y among the samples would give for y. At a sample it
        therefore differs from ``scores``: that sample then counts twice.

        Args:
            points: Points of the dtype and batch shape of the samples, ``[*batch, P, D]``.

        Returns:
            Detached score, shape ``[*batch, P, D]``.
        """
        points = self.whitening.points(as_points(points, self.scores, caller="SteinFit.score"))
        squared_distance = squared_distances(points, self.whitened)
        kernel, derivative = self.kernel.derivatives(squared_distance, 1)
        solved = cho_solve((self.cholesky, True), kernel.mT).mT
        slopes = -2 * derivative * (1 + solved)
        ridge = self.ridge[..., None, None]
        # The Schur complement of a positive matrix with that ridge is no smaller than the ridge;
        # rounding may think otherwise.
        remainder = 1 + ridge - jnp.sum(kernel * solved, axis=-1, keepdims=True)
        differences = weighted_differences(slopes, points, self.whitened)
        numerator = product(kernel, self.scores) + self.whitening.score(differences)
        return -numerator / jnp.maximum(remainder, ridge)


def fit_stein(
    samples: Float[Array, " *batch N D"],
    *,
    kernel: RadialKernel | None = None,
    ridge: float = 0.01,
    whiten: bool = True,
) -> SteinFit:
    """Stein estimate of the score, with what it takes to evaluate it at other points.

    As :func:`stein_score`, which returns the estimate at the samples alone.

    Args:
        samples: Independent draws of q, shape ``[*batch, N, D]``, N >= 2, float32 or float64.
        kernel: :class:`RBF` or :class:`IMQ`; ``None`` is IMQ at the median distance.
        ridge: eta >= 0, relative to k(x, x) = 1; at least 1e-3 in float32.
        whiten: Estimate in coordinates with covariance one.

    Returns:
        A :class:`SteinFit`, detached, with the leading axes of the samples.

    Raises:
        TypeError: If ``samples`` is neither float32 nor float64.
        ValueError: If N < 2, a sample is not finite, or ``ridge`` or the bandwidth makes no sense.

    Bias and variance:
        Biased by design: the ridge shrinks the score at the samples, and more so elsewhere, where
        it vanishes far from all samples.

    Cost:
        O(N^3 + N^2 D) time and O(N^2 + N D) memory per batch element, with one Cholesky
        factorisation; evaluation at P points O(N^2 P + N P D).

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> fit = fit_stein(jnp.linspace(-2, 2, 50)[:, None])
        >>> print(np.abs(fit.score(jnp.array([[0.0]]))) < 1e-3)  # a symmetric density
        [[ True]]

    References:
        Li and Turner, `Gradient Estimators for Implicit Models
        <https://arxiv.org/abs/1705.07107>`_, 2018, section 3.
    """
    return _fit(samples, kernel, ridge, whiten, caller="fit_stein")


def stein_score(
    samples: Float[Array, " *batch N D"],
    *,
    kernel: RadialKernel | None = None,
    ridge: float = 0.01,
    whiten: bool = True,
) -> Float[Array, " *batch N D"]:
    r"""Stein estimate of the score of q at samples of q.

    Stein's identity, :math:`E_q[k(x, \cdot) \nabla \log q(x) + \nabla_x k(x, \cdot)] = 0`, holds
    for any kernel. Replacing its expectation by the average over the samples and solving for the
    scores by ridge regression gives the V-statistic

    .. math::
        G = -(K + \eta I)^{-1} \langle \nabla, K \rangle, \qquad
        \langle \nabla, K \rangle_i = \sum_k \nabla_{x_k} k(x_i, x_k)

    for the kernel exp(-|x - y|^2 / (2 h^2)) that is
    :math:`\langle \nabla, K \rangle = (\mathrm{diag}(K 1) - K) X / h^2`.

    Args:
        samples: Independent draws of q, shape ``[*batch, N, D]``, N >= 2, float32 or float64. Take
            N >= 5 D; below D a warning is given.
        kernel: :class:`RBF` or :class:`IMQ`, with a bandwidth in whitened units or without one;
            ``None`` is IMQ at the median distance, the better one in few dimensions or with
            several modes.
        ridge: eta >= 0, relative to k(x, x) = 1; at least 1e-3 in float32. It trades bias for
            variance: the paper's 0.1 and more make a guide too narrow that is fitted with it.
        whiten: Estimate in coordinates with covariance one, and map the score back. One bandwidth
            then suits all directions, whatever their scales and correlation.

    Returns:
        Detached estimate of grad log q at each sample, in the inverse units of the samples, shape
        ``[*batch, N, D]``. Zero where all samples coincide.

    Raises:
        TypeError: If ``samples`` is neither float32 nor float64.
        ValueError: If N < 2, a sample is not finite, or ``ridge`` or the bandwidth makes no sense.

    Bias and variance:
        Biased by design: the ridge shrinks the score, by a factor
        :math:`c = -\frac{1}{ND} \sum_i g_i \cdot (x_i - \bar x)` that is 1 for the true score.

    Cost:
        O(N^3 + N^2 D) time and O(N^2 + N D) memory per batch element, with one Cholesky
        factorisation; no array over pairs and dimensions.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> samples = jnp.array([[-1.0], [0.0], [1.0]])
        >>> print(np.asarray(stein_score(samples)).T.round(2) + 0.0)
        [[ 0.95  0.   -0.95]]

    References:
        Li and Turner, `Gradient Estimators for Implicit Models
        <https://arxiv.org/abs/1705.07107>`_, 2018, section 3.1. The paper estimates in the
        coordinates of the samples; whitening is ours (``whiten=False`` is the paper's).
    """
    return _fit(samples, kernel, ridge, whiten, caller="stein_score").scores


def _fit(
    samples: Array, kernel: RadialKernel | None, ridge: float, whiten: bool, *, caller: str
) -> SteinFit:
    samples = as_samples(samples, caller=caller)
    check_ridge(ridge, samples.dtype, caller=caller)
    whitening, points, kernel, squared_distance = standardize(
        samples, kernel, whiten, caller=caller
    )
    identity = jnp.eye(points.shape[-2], dtype=points.dtype)
    value, derivative = kernel.derivatives(squared_distance, 1)
    cholesky = jnp.linalg.cholesky(value + ridge * identity)
    stein = -2 * weighted_differences(derivative, points, points)
    scores = whitening.score(-cho_solve((cholesky, True), stein))
    return SteinFit(
        scores=scores,
        whitening=whitening,
        whitened=points,
        kernel=kernel,
        ridge=jnp.full_like(points[..., 0, 0], ridge),
        cholesky=cholesky,
    )
