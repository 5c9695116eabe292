"""Kernels that know the derivatives a score estimator takes of them, and their bandwidth.

A radial kernel is k(x, y) = f(s), s = |x - y|^2, with f(0) = 1. All estimators need f and its
derivatives in s at every pair and nothing else, because every sum over samples of a gradient or a
Hessian of k is one of differences x - y with weights made of them: no array over pairs *and*
dimensions is ever formed.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_gradest.estimators.score._pairs import (
    pairwise_median,
    squared_distances,
    weighted_differences,
)
from pyro_gradest.estimators.score._validation import as_samples


class RBF(NamedTuple):
    r"""Gaussian kernel, exp(-|x - y|^2 / (2 h^2)).

    With a bandwidth h of ``None`` it takes the :func:`median_bandwidth` of the samples it meets.
    Its tails make it blind to what lies several bandwidths away: good for one mode, also in many
    dimensions; with several modes prefer :class:`IMQ`.
    """

    bandwidth: Float[Tensor, " *batch"] | float | None = None
    """h, in the units in which the kernel is applied (after whitening); one for each batch element
    or one for all."""

    def derivative(
        self, squared_distance: Float[Tensor, " *batch P N"], order: int = 0
    ) -> Float[Tensor, " *batch P N"]:
        """Derivative of that order of the kernel in the squared distance, at each pair."""
        return self.derivatives(squared_distance, order)[order]

    def derivatives(
        self, squared_distance: Float[Tensor, " *batch P N"], highest: int
    ) -> list[Float[Tensor, " *batch P N"]]:
        """The kernel and its derivatives up to that order, each made from the one before."""
        rate = -0.5 / _squared(self.bandwidth)
        values = [torch.exp(rate * squared_distance)]
        for _ in range(highest):
            values.append(rate * values[-1])
        return values


class IMQ(NamedTuple):
    r"""Inverse multiquadric kernel, (1 + |x - y|^2 / h^2)^(-1/2).

    With a bandwidth h of ``None`` it takes the :func:`median_bandwidth` of the samples it meets.
    Its heavy tails keep distant samples, and so separate modes, in touch.
    """

    bandwidth: Float[Tensor, " *batch"] | float | None = None
    """h, in the units in which the kernel is applied (after whitening); one for each batch element
    or one for all."""

    def derivative(
        self, squared_distance: Float[Tensor, " *batch P N"], order: int = 0
    ) -> Float[Tensor, " *batch P N"]:
        """Derivative of that order of the kernel in the squared distance, at each pair."""
        return self.derivatives(squared_distance, order)[order]

    def derivatives(
        self, squared_distance: Float[Tensor, " *batch P N"], highest: int
    ) -> list[Float[Tensor, " *batch P N"]]:
        """The kernel and its derivatives up to that order, each made from the one before."""
        rate = 1 / _squared(self.bandwidth)
        values = [torch.rsqrt(1 + rate * squared_distance)]
        square = values[0] ** 2 if highest else 0.0
        for i in range(highest):
            values.append((-(0.5 + i) * rate) * values[-1] * square)
        return values


RadialKernel = RBF | IMQ


class CurlFree(NamedTuple):
    r"""Matrix-valued kernel whose every combination is the gradient of a scalar function.

    .. math:: \Gamma(x, y) = -h^2\, \nabla_x \nabla_x^\top k(x, y)

    of a radial kernel k. A score is a gradient, so nothing is lost by looking for it among
    gradients, and in many dimensions much is gained. The factor h^2 makes
    :math:`\Gamma(x, x) = I`, so that a ridge means the same as for a scalar kernel.
    """

    radial: RadialKernel
    """k, with its bandwidth given."""

    def operator(
        self, points: Float[Tensor, " *batch P D"], samples: Float[Tensor, " *batch N D"]
    ) -> Callable[[Float[Tensor, " *batch N D"]], Float[Tensor, " *batch P D"]]:
        r"""The map from c to :math:`\sum_j \Gamma(x_i, y_j) c_j`, in O(P N D) and without the
        blocks, for points x and samples y."""
        squared_distance = squared_distances(points, samples)
        squared_bandwidth = _squared(self.radial.bandwidth)
        _, first, second = self.radial.derivatives(squared_distance, 2)
        across = -2 * squared_bandwidth * first
        along = -4 * squared_bandwidth * second

        def apply(coefficients: Float[Tensor, " *batch N D"]) -> Float[Tensor, " *batch P D"]:
            # (x_i - y_j) . c_j as a difference of products, not as a [P, N, D] array.
            own = torch.sum(samples * coefficients, dim=-1)[..., None, :]
            projections = points @ coefficients.mT - own
            return across @ coefficients + weighted_differences(
                along * projections, points, samples
            )

        return apply

    def divergence(
        self, points: Float[Tensor, " *batch P D"], samples: Float[Tensor, " *batch N D"]
    ) -> Float[Tensor, " *batch P D"]:
        r""":math:`\sum_j \nabla_{y_j} \cdot \Gamma(x_i, y_j)`, which is
        :math:`h^2 \sum_j \nabla_x \Delta_x k(x_i, y_j)`."""
        squared_distance = squared_distances(points, samples)
        _, _, second, third = self.radial.derivatives(squared_distance, 3)
        weights = _squared(self.radial.bandwidth) * (
            4 * (points.shape[-1] + 2) * second + 8 * squared_distance * third
        )
        return weighted_differences(weights, points, samples)


def median_bandwidth(samples: Float[Tensor, " *batch N D"]) -> Float[Tensor, " *batch"]:
    r"""Median of the distances between different samples.

    The lower median over the N (N - 1) / 2 pairs; a sample's distance of zero to itself does not
    count. It is kept above the fourth root of the dtype's epsilon (2 % in float32) times the
    root-mean-square distance, so that a kernel stays usable where most samples coincide, and it is
    1 where all do.

    Args:
        samples: Samples, shape ``[*batch, N, D]``, N >= 2, float32 or float64.

    Returns:
        Detached bandwidth in the units of the samples, shape ``[*batch]``, positive.

    Raises:
        TypeError: If ``samples`` is neither float32 nor float64.
        ValueError: If N < 2, or a sample is not finite.

    Bias and variance:
        Asymptotically unbiased in K for the median distance of two independent draws.

    Cost:
        O(N^2 D) time and O(N^2) memory per batch element.

    Example:
        >>> import torch
        >>> print(median_bandwidth(torch.tensor([[0.0], [1.0], [3.0]])))  # of 1, 2 and 3
        tensor(2.)

    References:
        Garreau, Jitkrittum and Kanagawa, `Large sample analysis of the median heuristic
        <https://arxiv.org/abs/1707.07269>`_, 2017, equation 2, which squares it.
    """
    samples = as_samples(samples, caller="median_bandwidth", may_be_few=True)
    # Centred, since squared distances come from products, which offsets would swamp.
    centred = samples - samples[..., :1, :]
    centred = centred - centred.mean(dim=-2, keepdim=True)
    return pairwise_median(squared_distances(centred, centred))


def _squared(bandwidth: Tensor | float | None) -> Tensor | float:
    """h^2, shaped to multiply ``[*batch, P, N]``."""
    if bandwidth is None:
        raise ValueError(
            "a kernel needs a bandwidth to be evaluated: pass one, such as "
            "RBF(median_bandwidth(samples)). Estimators fill it in where it is None."
        )
    return bandwidth[..., None, None] ** 2 if isinstance(bandwidth, Tensor) else bandwidth**2
