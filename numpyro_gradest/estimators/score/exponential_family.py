"""The kernel exponential family: a score sought among gradient fields, by conjugate gradients.

Notation follows Zhou, Shi and Zhu (2020): M samples (our N), Gamma the curl-free kernel, L the
average of Gamma over the samples as an operator, zeta(x) the average of the divergence of
Gamma(x, x_m) in x_m, lambda the regularisation. The score s solves L s = -zeta.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_gradest.estimators._validation import check_count
from numpyro_gradest.estimators.score._standardize import standardize
from numpyro_gradest.estimators.score._validation import as_points, as_samples, check_ridge
from numpyro_gradest.estimators.score.kernels import CurlFree, RadialKernel
from numpyro_gradest.estimators.score.whitening import Whitening

# Iteration, solution, residual, direction, squared size of the residual.
_State = tuple[Any, Array, Array, Array, Array]


class CurlFreeFit(NamedTuple):
    """A fitted gradient field: ``scores`` at the samples, ``score(points)`` anywhere."""

    scores: Float[Array, " *batch N D"]
    """The estimate at the samples, in their units."""
    whitening: Whitening
    whitened: Float[Array, " *batch N D"]
    """The samples in whitened coordinates."""
    kernel: RadialKernel
    """What :class:`CurlFree` is made of."""
    coefficients: Float[Array, " *batch N D"]
    """c, of the kernel's columns at the samples, in whitened coordinates."""
    divergence_weight: Float[Array, " *batch"]
    """Of the summed divergence of the kernel."""

    def score(self, points: Float[Array, " *batch P D"]) -> Float[Array, " *batch P D"]:
        r"""Estimate at other points, :math:`\sum_m \Gamma(y, x_m) c_m - w\, M \zeta(y)`.

        Args:
            points: Points of the dtype and batch shape of the samples, ``[*batch, P, D]``.

        Returns:
            Detached score, shape ``[*batch, P, D]``.
        """
        points = self.whitening.points(as_points(points, self.scores, caller="CurlFreeFit.score"))
        curl_free = CurlFree(self.kernel)
        field = curl_free.operator(points, self.whitened)(self.coefficients)
        divergence = curl_free.divergence(points, self.whitened)
        return self.whitening.score(field - self.divergence_weight[..., None, None] * divergence)


def fit_kernel_exponential_family(
    samples: Float[Array, " *batch N D"],
    *,
    kernel: RadialKernel | None = None,
    ridge: float = 0.1,
    tolerance: float = 1e-5,
    max_iterations: int = 100,
    whiten: bool = True,
) -> CurlFreeFit:
    """Score of a kernel exponential family, with what it takes to evaluate it at other points.

    As :func:`kernel_exponential_family_score`, which returns the estimate at the samples alone.

    Args:
        samples: Independent draws of q, shape ``[*batch, N, D]``, N >= 2, float32 or float64.
        kernel: :class:`RBF` or :class:`IMQ`, made curl-free; ``None`` is IMQ at the median
            distance.
        ridge: eta > 0, relative to Gamma(x, x) = I; at least 1e-3 in float32.
        tolerance: Size of the residual, relative to the right-hand side, to stop at.
        max_iterations: Number of iterations to stop at.
        whiten: Estimate in coordinates with covariance one.

    Returns:
        A :class:`CurlFreeFit`, detached, with the leading axes of the samples.

    Raises:
        TypeError: If ``samples`` is neither float32 nor float64.
        ValueError: If N < 2, a sample is not finite, or an option makes no sense.

    Bias and variance:
        Biased by design: the ridge shrinks the score. Elsewhere than at the samples it is a
        difference divided by the ridge, so errors of the iteration weigh more there: lower the
        tolerance with the ridge.

    Cost:
        O(N^2 D) time per iteration and O(N^2 + N D) memory per batch element; evaluation at P
        points O(N P D).

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> fit = fit_kernel_exponential_family(jnp.linspace(-2, 2, 50)[:, None])
        >>> print(np.abs(fit.score(jnp.array([[0.0]]))) < 1e-2)  # a symmetric density
        [[ True]]

    References:
        Zhou, Shi and Zhu, `Nonparametric Score Estimators <https://arxiv.org/abs/2005.10099>`_,
        2020, section 3.
    """
    return _fit(
        samples,
        kernel,
        ridge,
        tolerance,
        max_iterations,
        whiten,
        caller="fit_kernel_exponential_family",
    )


def kernel_exponential_family_score(
    samples: Float[Array, " *batch N D"],
    *,
    kernel: RadialKernel | None = None,
    ridge: float = 0.1,
    tolerance: float = 1e-5,
    max_iterations: int = 100,
    whiten: bool = True,
) -> Float[Array, " *batch N D"]:
    r"""Score of a kernel exponential family fitted to samples of q, at these samples.

    Score matching over all log-densities in the space of a kernel is ridge regression of the score
    with the curl-free kernel made from it, whose every member is a gradient:

    .. math::
        \hat s = -(L + \lambda)^{-1} \zeta, \qquad
        \hat s(X) = -(\Gamma + \eta I)^{-1} M \zeta(X), \qquad \eta = M \lambda

    The system has N D unknowns. It is solved by conjugate gradients, with products of
    :math:`\Gamma` that never form its blocks. With a scalar kernel in the place of
    :math:`\Gamma` this is the Stein estimator.

    Args:
        samples: Independent draws of q, shape ``[*batch, N, D]``, N >= 2, float32 or float64.
        kernel: :class:`RBF` or :class:`IMQ`, made curl-free; its bandwidth in whitened units or
            none; ``None`` is IMQ at the median distance.
        ridge: eta > 0, relative to Gamma(x, x) = I; at least 1e-3 in float32.
        tolerance: Size of the residual, relative to the right-hand side, to stop at. Each batch
            element stops by itself.
        max_iterations: Number of iterations to stop at; what is reached by then is returned, which
            is a more regularised estimate.
        whiten: Estimate in coordinates with covariance one, and map the score back.

    Returns:
        Detached estimate of grad log q at each sample, in the inverse units of the samples, shape
        ``[*batch, N, D]``. Zero where all samples coincide.

    Raises:
        TypeError: If ``samples`` is neither float32 nor float64.
        ValueError: If N < 2, a sample is not finite, or an option makes no sense.

    Bias and variance:
        Biased by design: the ridge shrinks the score, in many dimensions less than that of the
        Stein estimator, since only gradient fields are fitted.

    Cost:
        O(N^2 D) time per iteration and O(N^2 + N D) memory per batch element; nothing is
        factorised. Products with N x N matrices suit accelerators.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np
        >>> samples = jax.scipy.special.ndtri(jnp.linspace(0.01, 0.99, 50))[:, None]  # normal
        >>> shrinkage = -(kernel_exponential_family_score(samples) * samples).mean()
        >>> print(np.asarray(shrinkage).round(2))  # 1 of the exact score, -x
        0.89

    References:
        Zhou, Shi and Zhu, `Nonparametric Score Estimators <https://arxiv.org/abs/2005.10099>`_,
        2020, section 3; the estimator is that of Sriperumbudur, Fukumizu, Gretton, Hyvarinen and
        Kumar, `Density Estimation in Infinite Dimensional Exponential Families
        <https://arxiv.org/abs/1312.3516>`_, 2017. Scaling the kernel to Gamma(x, x) = I, so that a
        ridge means the same for every bandwidth, is ours.
    """
    return _fit(
        samples,
        kernel,
        ridge,
        tolerance,
        max_iterations,
        whiten,
        caller="kernel_exponential_family_score",
    ).scores


def _fit(
    samples: Array,
    kernel: RadialKernel | None,
    ridge: float,
    tolerance: float,
    max_iterations: int,
    whiten: bool,
    *,
    caller: str,
) -> CurlFreeFit:
    samples = as_samples(samples, caller=caller)
    check_ridge(ridge, samples.dtype, caller=caller)
    check_count(max_iterations, "max_iterations", caller=caller)
    if ridge == 0:
        raise ValueError(f"{caller} needs ridge > 0 to divide by, got 0. Use ridge=0.1.")
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"{caller} needs a finite tolerance >= 0, got {tolerance}.")
    whitening, points, kernel, _ = standardize(samples, kernel, whiten, caller=caller)
    curl_free = CurlFree(kernel)
    gamma = curl_free.operator(points, points)
    solution = _conjugate_gradients(
        lambda x: gamma(x) + ridge * x,
        curl_free.divergence(points, points),
        tolerance,
        max_iterations,
    )
    return CurlFreeFit(
        scores=whitening.score(-solution),
        whitening=whitening,
        whitened=points,
        kernel=kernel,
        coefficients=solution / ridge,
        divergence_weight=jnp.full_like(points[..., 0, 0], 1 / ridge),
    )


def _conjugate_gradients(
    operator: Callable[[Array], Array],
    right: Float[Array, " *batch N D"],
    tolerance: float,
    max_iterations: int,
) -> Float[Array, " *batch N D"]:
    """Solve operator(x) = right for a positive operator; converged batch elements stand still."""
    squared = _inner(right, right)
    target = tolerance**2 * squared
    start = (0, jnp.zeros_like(right), right, right, squared)

    def is_unfinished(state: _State) -> Array:
        iteration, *_, squared = state
        return (iteration < max_iterations) & jnp.any(squared > target)

    def iterate(state: _State) -> _State:
        iteration, solution, residual, direction, previous = state
        is_active = previous > target
        image = operator(direction)
        step = _ratio(previous, _inner(direction, image), is_active)
        solution = solution + step * direction
        residual = residual - step * image
        squared = _inner(residual, residual)
        direction = residual + _ratio(squared, previous, is_active) * direction
        return iteration + 1, solution, residual, direction, squared

    return jax.lax.while_loop(is_unfinished, iterate, start)[1]


def _inner(
    left: Float[Array, " *batch N D"], right: Float[Array, " *batch N D"]
) -> Float[Array, " *batch 1 1"]:
    return jnp.sum(left * right, axis=(-2, -1), keepdims=True)


def _ratio(numerator: Array, denominator: Array, where: Array) -> Array:
    return jnp.where(where, numerator / jnp.where(where, denominator, 1.0), 0.0)
