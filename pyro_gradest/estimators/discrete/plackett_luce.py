r"""Items taken one after the other, each with probability proportional to exp theta of those left.

The order of all items is a ranking, the first k of them without their order a subset. Both come
from Gumbel noise, and equivalently from independent exponential clocks of rates w = exp theta: the
items come in the order in which their clocks ring. That the clocks of a subset S all ring before
the first of the others, whose rates add up to W, has probability

.. math:: p(S) = \int_0^\infty e^{-v} \prod_{i \in S} (1 - e^{-v w_i / W}) \, dv.

In s = log v the integrand is log-concave and entire, and vanishes at both ends, so a sum over
equidistant points converges exponentially. The points are laid where the integrand is not
negligible, which holds for any weights; on the interval [0, 1] of exp(-v) no fixed rule does.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyro_gradest.estimators.discrete.noise import GumbelNoise

_NEVER = -1e30
# Points of the sum, and of the coarse search for where to lay them.
_NUM_POINTS = 192
_NUM_COARSE = 64
# Fall of the logarithm of the integrand from its largest value, beyond which it is left out.
_DROP = 36.0


def draw_ranking(theta: Float[Tensor, " *batch n"]) -> Int[Tensor, " *batch n"]:
    """The items from first to last."""
    noisy = theta.detach() + GumbelNoise().sample_like(theta)
    return noisy.argsort(dim=-1, descending=True)


def ranking_log_prob(
    theta: Float[Tensor, " *batch n"], ranking: Int[Tensor, " *batch n"]
) -> Float[Tensor, " *batch"]:
    """Logarithm of the probability of this order."""
    in_order = torch.take_along_dim(theta, ranking, dim=-1)
    log_left = in_order.flip(-1).logcumsumexp(dim=-1).flip(-1)
    return (in_order - log_left).sum(dim=-1)


def draw_subset(theta: Float[Tensor, " *batch n"], num_ones: int) -> Float[Tensor, " *batch n"]:
    """The first items, marked by ones."""
    noisy = theta.detach() + GumbelNoise().sample_like(theta)
    indices = noisy.topk(num_ones, dim=-1, sorted=False).indices
    return torch.zeros_like(noisy).scatter(-1, indices, 1.0)


def subset_log_prob(
    theta: Float[Tensor, " *batch n"], subset: Float[Tensor, " *batch n"], num_ones: int
) -> Float[Tensor, " *batch"]:
    """Logarithm of the probability that the first items are these."""
    if num_ones in (0, theta.shape[-1]):
        return 0.0 * theta.sum(dim=-1)
    if num_ones == 1:  # linear in the subset
        return (subset * theta).sum(dim=-1) - theta.logsumexp(dim=-1)
    inside = subset.topk(num_ones, dim=-1, sorted=False).indices
    others = theta.scatter(-1, inside, _NEVER)
    log_ratios = theta.gather(-1, inside) - others.logsumexp(dim=-1, keepdim=True)
    points, spacing = _points(log_ratios.detach())
    log_integral = _log_integrand(points, log_ratios).logsumexp(dim=-1) + spacing.log()
    return log_integral + log_ratios.clamp(max=0.0).sum(dim=-1)


def _points(log_ratios: Tensor) -> tuple[Tensor, Tensor]:
    """Where to evaluate the integrand, ``[*batch, points]``, and how far apart."""
    k = log_ratios.shape[-1]
    # At its right end the integrand is that of a gamma variable of shape k + 1 or falls earlier.
    first, last = -_DROP - 2, math.log(2 * k + 60)
    coarse = torch.linspace(
        first, last, _NUM_COARSE, dtype=log_ratios.dtype, device=log_ratios.device
    )
    step = (last - first) / (_NUM_COARSE - 1)
    heights = _log_integrand(coarse.expand(*log_ratios.shape[:-1], -1), log_ratios)
    is_high = heights > heights.amax(dim=-1, keepdim=True) - _DROP
    left = torch.where(is_high, coarse, math.inf).amin(dim=-1) - step
    right = torch.where(is_high, coarse, -math.inf).amax(dim=-1) + step
    spacing = (right - left) / _NUM_POINTS
    middles = torch.arange(_NUM_POINTS, dtype=left.dtype, device=left.device) + 0.5
    return left[..., None] + spacing[..., None] * middles, spacing


def _log_integrand(log_times: Tensor, log_ratios: Tensor) -> Tensor:
    """Less the factors by which slow clocks lower it everywhere, beside which it would lose its
    digits."""
    log_times, log_ratios = log_times[..., None], log_ratios[..., None, :]
    lowered = log_ratios.clamp(max=0.0)
    is_early = log_times + log_ratios < -20
    # In the double where, neither branch meets a value at which its derivative is not finite.
    early = torch.where(is_early, log_times + log_ratios, -20.0)
    late = torch.where(is_early, 0.0, log_times + log_ratios).clamp(max=6.0)
    log_rung = torch.where(
        is_early,
        log_times + (log_ratios - lowered) - early.exp() / 2,
        torch.log(-torch.expm1(-late.exp())) - lowered,
    )
    return (log_times - log_times.exp())[..., 0] + log_rung.sum(dim=-1)
