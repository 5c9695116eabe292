"""The score of a kernel density estimate, the baseline that the other estimators should beat."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_gradest.estimators.score._pairs import squared_distances, weighted_differences
from pyro_gradest.estimators.score._standardize import standardize
from pyro_gradest.estimators.score._validation import as_points, as_samples
from pyro_gradest.estimators.score.kernels import RadialKernel
from pyro_gradest.estimators.score.whitening import Whitening


class KDEFit(NamedTuple):
    """A fitted kernel density: ``scores`` at the samples, ``score(points)`` anywhere."""

    scores: Float[Tensor, " *batch N D"]
    """The estimate at the samples, in their units."""
    whitening: Whitening
    whitened: Float[Tensor, " *batch N D"]
    """The samples in whitened coordinates."""
    kernel: RadialKernel

    def score(self, points: Float[Tensor, " *batch P D"]) -> Float[Tensor, " *batch P D"]:
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
    samples: Float[Tensor, " *batch N D"],
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
        >>> import torch
        >>> fit = fit_kde(torch.linspace(-2, 2, 50)[:, None])
        >>> print(fit.score(torch.tensor([[0.0]])).abs() < 1e-3)  # a symmetric density
        tensor([[True]])

    References:
        Li and Turner, `Gradient Estimators for Implicit Models
        <https://arxiv.org/abs/1705.07107>`_, 2018, section 3, where it is the plug-in estimate.
    """
    return _fit(samples, kernel, whiten, caller="fit_kde")


def kde_score(
    samples: Float[Tensor, " *batch N D"],
    *,
    kernel: RadialKernel | None = None,
    whiten: bool = True,
) -> Float[Tensor, " *batch N D"]:
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
        >>> import torch
        >>> samples = torch.tensor([[-1.0], [0.0], [1.0]])
        >>> print(kde_score(samples).T.round(decimals=2) + 0.0)
        tensor([[ 0.2500,  0.0000, -0.2500]])

    References:
        Li and Turner, `Gradient Estimators for Implicit Models
        <https://arxiv.org/abs/1705.07107>`_, 2018, section 3, where it is the plug-in estimate.
    """
    return _fit(samples, kernel, whiten, caller="kde_score").scores


def _fit(samples: Tensor, kernel: RadialKernel | None, whiten: bool, *, caller: str) -> KDEFit:
    samples = as_samples(samples, caller=caller)
    whitening, points, kernel, squared_distance = standardize(
        samples, kernel, whiten, caller=caller
    )
    scores = whitening.score(_score(kernel, squared_distance, points, points))
    return KDEFit(scores=scores, whitening=whitening, whitened=points, kernel=kernel)


def _score(
    kernel: RadialKernel,
    squared_distance: Float[Tensor, " *batch P N"],
    points: Float[Tensor, " *batch P D"],
    samples: Float[Tensor, " *batch N D"],
) -> Float[Tensor, " *batch P D"]:
    value, derivative = kernel.derivatives(squared_distance, 1)
    density = torch.sum(value, dim=-1, keepdim=True)
    # Far from all samples both may underflow.
    smallest = torch.finfo(points.dtype).tiny
    return (
        2 * weighted_differences(derivative, points, samples) / torch.clamp(density, min=smallest)
    )
