"""Subsets of fixed size as an exponential family, by elementary symmetric polynomials.

p(z) is proportional to exp <z, theta> over z in {0, 1}^n with k ones: the law of independent bits
of log-odds theta + c, for any c, given that k of them are one. So the normaliser follows from the
probability of k ones, the coefficient of x^k in the product of (q_i + p_i x), multiplied out in a
balanced tree of which no coefficient beyond k is kept: O(n k) in log2(n) steps of whole arrays.
With c such that k ones are expected, none that matters underflows, whatever theta, and sums and
products of probabilities need no logarithms. A draw goes down the same tree and splits the ones
among the children; the probabilities of the items go down it too. Inside, batches come last: long
rows of like work are fastest.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# Halvings of the interval in which c lies: of one as long as 1e6, which scores of items that are
# excluded may make it, they leave 0.06. So near, k ones are likely enough not to underflow.
_NUM_HALVINGS = 24


def log_partition(theta: Float[Tensor, " *batch n"], num_ones: int) -> Float[Tensor, " *batch"]:
    """Logarithm of the sum of exp <z, theta> over all z with that many ones."""
    return _LogPartition.apply(theta, _shift(theta, num_ones), num_ones)


class _LogPartition(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(theta: Tensor, shift: Tensor, num_ones: int) -> Tensor:
        log_odds = theta.movedim(-1, 0) + shift
        probability = _root(_tree(log_odds, num_ones), num_ones)
        of_bits = torch.nn.functional.softplus(log_odds).sum(dim=0)
        return probability.log() + of_bits - num_ones * shift

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        theta, shift, ctx.num_ones = inputs
        ctx.save_for_backward(theta, shift)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        theta, shift = ctx.saved_tensors
        return gradient.unsqueeze(-1) * _marginals(theta, shift, ctx.num_ones), None, None


def marginals(theta: Float[Tensor, " *batch n"], num_ones: int) -> Float[Tensor, " *batch n"]:
    """Probability of each item to be in the subset; differentiable, their Jacobian the covariance
    of the items."""
    return _marginals(theta, _shift(theta, num_ones), num_ones)


def _marginals(theta: Tensor, shift: Tensor, num_ones: int) -> Tensor:
    levels = _tree(theta.movedim(-1, 0) + shift, num_ones)
    # From the root down, of each node: the probability of k ones in all given those in the node.
    outside = torch.zeros_like(levels[-1][:1, :1]).expand(num_ones + 1, 1, *levels[-1].shape[2:])
    outside = torch.cat([outside[1:], outside[:1] + 1])
    for level in reversed(levels):
        size = len(level)
        if level.shape[1] > 1:
            siblings = level.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)
            given = _padded(outside, 0, max(2 * size - 1 - len(outside), 0))[: 2 * size - 1]
            outside = _correlate(given.repeat_interleave(2, dim=1), siblings)
    joint = levels[0][: num_ones + 1] * outside[:2]
    is_one = joint[1:].sum(dim=0) / joint.sum(dim=0)
    return is_one[: theta.shape[-1]].movedim(0, -1)


def draw(
    theta: Float[Tensor, " *batch n"],
    num_ones: int,
    generator: torch.Generator | None,
    sample_shape: tuple[int, ...] = (),
) -> Float[Tensor, " *samples_batch n"]:
    """Subsets ``[*sample_shape, *batch, n]``, exactly from the family."""
    shape = (*sample_shape, *theta.shape[:-1], num_splits(theta.shape[-1]))
    uniform = torch.rand(shape, generator=generator, dtype=theta.dtype, device=theta.device)
    return place(theta, uniform, num_ones)


def num_splits(num_items: int) -> int:
    """How many uniform numbers make a draw: one for each node that splits its ones in two."""
    return 2 ** _depth(num_items) - 1


def place(
    theta: Float[Tensor, " *batch n"],
    uniform: Float[Tensor, " *samples_batch splits"],
    num_ones: int,
) -> Float[Tensor, " *samples_batch n"]:
    """The draws that these uniform numbers make: of like thetas, like draws."""
    theta = theta.detach()[(None,) * (uniform.dim() - theta.dim())]
    uniform = uniform.movedim(-1, 0)
    counts = torch.full((1, *uniform.shape[1:]), num_ones, device=theta.device)
    log_odds = theta.movedim(-1, 0) + _shift(theta, num_ones)
    for level in reversed(_tree(log_odds, num_ones)):
        if level.shape[1] == 1:  # of one item
            break
        left, right = level[:, 0::2], level[:, 1::2]
        counts_of_left = torch.arange(len(level), device=theta.device)
        counts_of_left = counts_of_left.reshape(-1, *[1] * counts.dim())
        cumulative = (left * _coefficient(right, counts - counts_of_left)).cumsum(dim=0)
        num_nodes = len(counts)
        total = cumulative[-1]
        # Rounding must not lead past the last count that is possible.
        limit = uniform[num_nodes - 1 : 2 * num_nodes - 1] * total
        in_left = ((cumulative <= limit) & (cumulative < total)).sum(dim=0)
        counts = torch.stack([in_left, counts - in_left], dim=1).flatten(0, 1)
    return counts[: theta.shape[-1]].movedim(0, -1).to(theta.dtype)


def _depth(num_items: int) -> int:
    return (num_items - 1).bit_length()


def _shift(theta: Tensor, num_ones: int) -> Tensor:
    """c ``[*batch]``, at which about so many of independent bits of log-odds theta + c are one."""
    theta = theta.detach().movedim(-1, 0).contiguous()
    num_items = len(theta)
    expected = min(max(num_ones, 0.5), num_items - 0.5)
    # Where it would lie if all were like the largest, and the way from there to the smallest.
    lower = math.log(expected / (num_items - expected)) - theta.amax(dim=0)
    width = theta.amax(dim=0) - theta.amin(dim=0)
    for _ in range(_NUM_HALVINGS):
        width = width / 2
        is_higher = torch.sigmoid(theta + (lower + width)).sum(dim=0) < expected
        lower = lower + is_higher * width
    return lower + width / 2


def _tree(log_odds: Tensor, num_ones: int) -> list[Tensor]:
    """Coefficients ``[degree + 1, nodes, *batch]`` of every level below the root, items first."""
    num_items = len(log_odds)
    depth = _depth(num_items)
    missing = 2**depth - num_items
    is_one, is_zero = torch.sigmoid(log_odds), torch.sigmoid(-log_odds)
    level = torch.stack([is_zero, is_one])
    if missing:
        never = torch.zeros_like(log_odds[:1]).expand(missing, *log_odds.shape[1:])
        level = torch.cat([level, torch.stack([never + 1, never])], dim=1)
    levels = [level]
    for _ in range(depth - 1):
        levels.append(_product(levels[-1][:, 0::2], levels[-1][:, 1::2], num_ones))
    return levels


def _root(levels: list[Tensor], num_ones: int) -> Tensor:
    """The coefficient of x^k in the product of all, ``[*batch]``."""
    level = levels[-1]
    if level.shape[1] == 1:  # of one item
        return level[num_ones, 0]
    lowest = max(num_ones + 1 - len(level), 0)
    factors = level[lowest : num_ones + 1]
    return (factors[:, 0] * factors[:, 1].flip(0)).sum(dim=0)


def _product(left: Tensor, right: Tensor, num_ones: int) -> Tensor:
    """Coefficients, up to the power k, of the product of two polynomials of one degree."""
    size = len(left)
    return _correlate(_padded(right, size - 1, size - 1)[: num_ones + size], left.flip(0))


def _padded(coefficients: Tensor, before: int, after: int) -> Tensor:
    """With so many zeros before and after them."""
    widths = (0, 0) * (coefficients.dim() - 1)
    return torch.nn.functional.pad(coefficients, (*widths, before, after))


def _correlate(long: Tensor, short: Tensor) -> Tensor:
    """The sums over i of ``long[j + i] * short[i]``, for each j at which all are there."""
    return _Correlation.apply(long, short)


class _Correlation(torch.autograd.Function):
    """Its derivatives are of its own kind; the library's would be copies and scattered sums."""

    generate_vmap_rule = True

    @staticmethod
    def forward(long: Tensor, short: Tensor) -> Tensor:
        windows = long.unfold(0, len(short), 1).movedim(-1, 0)
        return (windows * short.unsqueeze(1)).sum(dim=0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        long, short = ctx.saved_tensors
        margin = len(short) - 1
        return _correlate(_padded(gradient, margin, margin), short.flip(0)), _correlate(
            long, gradient
        )


def _coefficient(coefficients: Tensor, power: Tensor) -> Tensor:
    """The entry at ``power`` of the first axis, zero outside of it."""
    degree = len(coefficients) - 1
    shape = torch.broadcast_shapes(coefficients.shape[1:], power.shape[1:])
    taken = torch.take_along_dim(
        coefficients.expand(degree + 1, *shape),
        power.clamp(0, degree).expand(len(power), *shape),
        dim=0,
    )
    return torch.where((power >= 0) & (power <= degree), taken, 0.0)
