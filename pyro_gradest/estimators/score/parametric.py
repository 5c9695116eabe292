"""A density of kernel form, log q = sum_k a_k k(x, x_k) + constant, fitted to its own samples.

Notation follows Li and Turner (2018), appendix: B_i,k = grad_{x_i} k(x_i, x_k), so that the score
at the samples is B a; K_ij = k(x_i, x_j), G_ij = -2 f'(|x_i - x_j|^2) for k = f(|x - y|^2), so
that B_i,k = -G_ik (x_i - x_k); S_ij = |x_i - x_j|^2. The inner products of differences that both
objectives need are, by the cosine rule, sums of entries of S:

    2 (x_i - x_j) . (x_m - x_l) = S_il + S_jm - S_im - S_jl
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_gradest.estimators.score._pairs import squared_distances, weighted_differences
from pyro_gradest.estimators.score._standardize import standardize
from pyro_gradest.estimators.score._validation import as_points, as_samples, check_ridge
from pyro_gradest.estimators.score.kernels import RadialKernel
from pyro_gradest.estimators.score.whitening import Whitening


class ParametricFit(NamedTuple):
    """A fitted density of kernel form: ``scores`` at the samples, ``score(points)`` anywhere."""

    scores: Float[Tensor, " *batch N D"]
    """The estimate at the samples, in their units."""
    whitening: Whitening
    whitened: Float[Tensor, " *batch N D"]
    """The samples in whitened coordinates."""
    kernel: RadialKernel
    coefficients: Float[Tensor, " *batch N"]
    """a"""

    def score(self, points: Float[Tensor, " *batch P D"]) -> Float[Tensor, " *batch P D"]:
        r"""Estimate at other points, :math:`\sum_k a_k \nabla_y k(y, x_k)`.

        Args:
            points: Points of the dtype and batch shape of the samples, ``[*batch, P, D]``.

        Returns:
            Detached score, shape ``[*batch, P, D]``.
        """
        points = self.whitening.points(as_points(points, self.scores, caller="ParametricFit.score"))
        slopes = 2 * self.kernel.derivative(squared_distances(points, self.whitened), 1)
        weights = slopes * self.coefficients[..., None, :]
        return self.whitening.score(weighted_differences(weights, points, self.whitened))


class _System(NamedTuple):
    """A quadratic objective a'Qa / 2 + a'l."""

    matrix: Float[Tensor, " *batch N N"]
    """Q"""
    vector: Float[Tensor, " *batch N"]
    """l"""
    largest: Float[Tensor, " *batch 1 1"]
    """Size of the largest term that Q is a sum of: its entries are known to eps times that."""


def fit_parametric_stein(
    samples: Float[Tensor, " *batch N D"],
    *,
    kernel: RadialKernel | None = None,
    ridge: float = 0.01,
    whiten: bool = True,
) -> ParametricFit:
    """Stein estimate in parametric form, with what it takes to evaluate it at other points.

    As :func:`parametric_stein_score`, which returns the estimate at the samples alone.

    Args:
        samples: Independent draws of q, shape ``[*batch, N, D]``, N >= 2, float32 or float64.
        kernel: :class:`RBF` or :class:`IMQ`; ``None`` is IMQ at the median distance.
        ridge: eta >= 0, relative to the mean of Lambda's diagonal; at least 1e-3 in float32.
        whiten: Estimate in coordinates with covariance one.

    Returns:
        A :class:`ParametricFit`, detached, with the leading axes of the samples.

    Raises:
        TypeError: If ``samples`` is neither float32 nor float64.
        ValueError: If N < 2, a sample is not finite, or ``ridge`` or the bandwidth makes no sense.

    Bias and variance:
        Biased by design: the ridge shrinks the coefficients.

    Cost:
        O(N^3 + N^2 D) time and O(N^2 + N D) memory per batch element; evaluation at P points
        O(N P D).

    Example:
        >>> import torch
        >>> fit = fit_parametric_stein(torch.linspace(-2, 2, 50)[:, None])
        >>> print(fit.score(torch.tensor([[0.0]])).abs() < 1e-3)  # a symmetric density
        tensor([[True]])

    References:
        Li and Turner, `Gradient Estimators for Implicit Models
        <https://arxiv.org/abs/1705.07107>`_, 2018, section 3 and appendix.
    """
    return _fit(samples, kernel, ridge, whiten, _stein_system, caller="fit_parametric_stein")


def parametric_stein_score(
    samples: Float[Tensor, " *batch N D"],
    *,
    kernel: RadialKernel | None = None,
    ridge: float = 0.01,
    whiten: bool = True,
) -> Float[Tensor, " *batch N D"]:
    r"""Stein estimate of the score, in parametric form, at samples of q.

    The score is that of :math:`\log q = \sum_k a_k k(x, x_k)`, with the coefficients that minimise
    the kernel Stein discrepancy between the samples and that density, with a ridge:

    .. math::
        a = -(\Lambda + \eta \bar\Lambda I)^{-1} B^\top \langle \nabla, K \rangle, \qquad
        \Lambda = B^\top K B

    where :math:`\bar\Lambda` is the mean of the diagonal of :math:`\Lambda`.

    Args:
        samples: Independent draws of q, shape ``[*batch, N, D]``, N >= 2, float32 or float64.
        kernel: :class:`RBF` or :class:`IMQ`, with a bandwidth in whitened units or without one;
            ``None`` is IMQ at the median distance. It serves the density and the discrepancy.
        ridge: eta >= 0, relative to the mean of Lambda's diagonal; at least 1e-3 in float32.
        whiten: Estimate in coordinates with covariance one, and map the score back.

    Returns:
        Detached estimate of grad log q at each sample, in the inverse units of the samples, shape
        ``[*batch, N, D]``. Zero where all samples coincide.

    Raises:
        TypeError: If ``samples`` is neither float32 nor float64.
        ValueError: If N < 2, a sample is not finite, or ``ridge`` or the bandwidth makes no sense.

    Bias and variance:
        Biased by design: the ridge shrinks the coefficients, so the score, towards zero.

    Cost:
        O(N^3 + N^2 D) time and O(N^2 + N D) memory per batch element, with one Cholesky
        factorisation and five products of N x N matrices.

    Example:
        >>> import torch
        >>> samples = torch.tensor([[-1.0], [0.0], [1.0]])
        >>> print(parametric_stein_score(samples).T.round(decimals=2) + 0.0)
        tensor([[ 0.9500,  0.0000, -0.9500]])

    References:
        Li and Turner, `Gradient Estimators for Implicit Models
        <https://arxiv.org/abs/1705.07107>`_, 2018, section 3 and appendix. The paper's ridge is
        absolute, so that its effect depends on N and on the bandwidth; ours is relative.
    """
    return _fit(
        samples, kernel, ridge, whiten, _stein_system, caller="parametric_stein_score"
    ).scores


def fit_score_matching(
    samples: Float[Tensor, " *batch N D"],
    *,
    kernel: RadialKernel | None = None,
    ridge: float = 0.1,
    whiten: bool = True,
) -> ParametricFit:
    """Score-matching estimate, with what it takes to evaluate it at other points.

    As :func:`score_matching_score`, which returns the estimate at the samples alone.

    Args:
        samples: Independent draws of q, shape ``[*batch, N, D]``, N >= 2, float32 or float64.
        kernel: :class:`RBF` or :class:`IMQ`; ``None`` is IMQ at the median distance.
        ridge: eta >= 0, relative to the mean diagonal of B'B; at least 1e-3 in float32.
        whiten: Estimate in coordinates with covariance one.

    Returns:
        A :class:`ParametricFit`, detached, with the leading axes of the samples.

    Raises:
        TypeError: If ``samples`` is neither float32 nor float64.
        ValueError: If N < 2, a sample is not finite, or ``ridge`` or the bandwidth makes no sense.

    Bias and variance:
        Biased by design: the ridge shrinks the coefficients.

    Cost:
        O(N^3 + N^2 D) time and O(N^2 + N D) memory per batch element; evaluation at P points
        O(N P D).

    Example:
        >>> import torch
        >>> fit = fit_score_matching(torch.linspace(-2, 2, 50)[:, None])
        >>> print(fit.score(torch.tensor([[0.0]])).abs() < 1e-3)  # a symmetric density
        tensor([[True]])

    References:
        Hyvarinen, `Estimation of Non-Normalized Statistical Models by Score Matching
        <https://jmlr.org/papers/v6/hyvarinen05a.html>`_, 2005, section 2.
    """
    return _fit(samples, kernel, ridge, whiten, _score_matching_system, caller="fit_score_matching")


def score_matching_score(
    samples: Float[Tensor, " *batch N D"],
    *,
    kernel: RadialKernel | None = None,
    ridge: float = 0.1,
    whiten: bool = True,
) -> Float[Tensor, " *batch N D"]:
    r"""Score-matching estimate of the score at samples of q.

    The score g is that of :math:`\log q = \sum_k a_k k(x, x_k)` with the coefficients that
    minimise

    .. math:: \frac1N \sum_i \Big[ \tfrac12 |g(x_i)|^2 + \nabla \cdot g(x_i) \Big]

    which is, up to a constant, half the mean squared distance to the true score. With a ridge,

    .. math:: a = -(B^\top B + \eta\, \overline{B^\top B}\, I)^{-1} b, \qquad
        b_k = \sum_i \Delta_{x_i} k(x_i, x_k)

    where the bar is the mean of the diagonal.

    Args:
        samples: Independent draws of q, shape ``[*batch, N, D]``, N >= 2, float32 or float64.
        kernel: :class:`RBF` or :class:`IMQ`, with a bandwidth in whitened units or without one;
            ``None`` is IMQ at the median distance.
        ridge: eta >= 0, relative to the mean diagonal of B'B; at least 1e-3 in float32.
        whiten: Estimate in coordinates with covariance one, and map the score back.

    Returns:
        Detached estimate of grad log q at each sample, in the inverse units of the samples, shape
        ``[*batch, N, D]``. Zero where all samples coincide.

    Raises:
        TypeError: If ``samples`` is neither float32 nor float64.
        ValueError: If N < 2, a sample is not finite, or ``ridge`` or the bandwidth makes no sense.

    Bias and variance:
        Biased by design: the ridge shrinks the coefficients. The score is hardly shrunk by it: of
        all estimators here its c is nearest to 1 where samples are few, N = 5 D. Without a ridge
        the objective has no minimum worth having, since it rewards curvature at the samples.

    Cost:
        O(N^3 + N^2 D) time and O(N^2 + N D) memory per batch element, with one Cholesky
        factorisation and two products of N x N matrices.

    Example:
        >>> import torch
        >>> samples = torch.tensor([[-1.0], [0.0], [1.0]])
        >>> print(score_matching_score(samples).T.round(decimals=2) + 0.0)
        tensor([[ 1.1700,  0.0000, -1.1700]])

    References:
        Hyvarinen, `Estimation of Non-Normalized Statistical Models by Score Matching
        <https://jmlr.org/papers/v6/hyvarinen05a.html>`_, 2005, section 2; Li and Turner, `Gradient
        Estimators for Implicit Models <https://arxiv.org/abs/1705.07107>`_, 2018, section 3, for
        this density. The paper's ridge is absolute; ours is relative.
    """
    return _fit(
        samples, kernel, ridge, whiten, _score_matching_system, caller="score_matching_score"
    ).scores


def _fit(
    samples: Tensor,
    kernel: RadialKernel | None,
    ridge: float,
    whiten: bool,
    system: Callable[[RadialKernel, Tensor, Tensor, Tensor], _System],
    *,
    caller: str,
) -> ParametricFit:
    samples = as_samples(samples, caller=caller)
    check_ridge(ridge, samples.dtype, caller=caller)
    whitening, points, kernel, squared_distance = standardize(
        samples, kernel, whiten, caller=caller
    )
    slopes = -2 * kernel.derivative(squared_distance, 1)
    matrix, vector, largest = system(kernel, squared_distance, slopes, points)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
    diagonal = torch.where(diagonal > 0, diagonal, 1.0)
    # In units of the diagonal, so that a ridge is as safe here as for a kernel matrix, unless the
    # terms of an entry cancel, as they do where nearly all samples coincide.
    rounding = points.shape[-2] * torch.finfo(points.dtype).eps * largest / diagonal
    identity = torch.eye(points.shape[-2], dtype=points.dtype, device=points.device)
    cholesky = torch.linalg.cholesky(matrix / diagonal + (ridge + rounding) * identity)
    coefficients = -torch.cholesky_solve(vector[..., None] / diagonal, cholesky)[..., 0]
    weights = -slopes * coefficients[..., None, :]
    return ParametricFit(
        scores=whitening.score(weighted_differences(weights, points, points)),
        whitening=whitening,
        whitened=points,
        kernel=kernel,
        coefficients=coefficients,
    )


def _stein_system(
    kernel: RadialKernel,
    squared_distance: Float[Tensor, " *batch N N"],
    slopes: Float[Tensor, " *batch N N"],
    points: Float[Tensor, " *batch N D"],
) -> _System:
    """B'KB and B' <grad, K>."""
    gram = kernel.derivative(squared_distance)
    # 2 B'KB = G (S o KG) + its transpose - G (S o K) G - S o (GKG); G, K and S are symmetric.
    smoothed = gram @ slopes
    once = slopes @ (squared_distance * smoothed)
    both = slopes @ (squared_distance * gram) @ slopes
    matrix = (once + once.mT - both - squared_distance * (slopes @ smoothed)) / 2
    stein = weighted_differences(slopes, points, points)
    # -(B' <grad, K>)_k = sum_i G_ik (x_i - x_k) . <grad, K>_i
    along = torch.sum(points * stein, dim=-1, keepdim=True)
    across = torch.sum(points * (slopes @ stein), dim=-1)
    return _System(matrix, across - (slopes @ along)[..., 0], _largest(once))


def _score_matching_system(
    kernel: RadialKernel,
    squared_distance: Float[Tensor, " *batch N N"],
    slopes: Float[Tensor, " *batch N N"],
    points: Float[Tensor, " *batch N D"],
) -> _System:
    """B'B and the summed Laplacians of the kernel."""
    # 2 B'B = G (S o G) + its transpose - S o (GG).
    once = slopes @ (squared_distance * slopes)
    matrix = (once + once.mT - squared_distance * (slopes @ slopes)) / 2
    curvature = 4 * squared_distance * kernel.derivative(squared_distance, 2)
    laplacian = curvature - points.shape[-1] * slopes
    return _System(matrix, torch.sum(laplacian, dim=-2), _largest(once))


def _largest(matrix: Float[Tensor, " *batch N N"]) -> Float[Tensor, " *batch 1 1"]:
    return torch.amax(torch.abs(matrix), dim=(-2, -1), keepdim=True)
