"""Subsets of fixed size as an exponential family, by elementary symmetric polynomials.

p(z) is proportional to exp <z, theta> over z in {0, 1}^n with k ones. The normaliser is the
coefficient of x^k in the product of (1 + exp(theta_i) x), multiplied out in a balanced tree of
log-coefficients, of which none beyond k is kept: O(n k) in log2(n) steps of whole arrays. A draw
goes down the same tree and splits the ones among the children. Inside, batches come last: long rows
of like work are fastest.
"""

import torch
from jaxtyping import Float
from torch import Tensor

# Stands for the logarithm of zero. -inf would make the derivative of a logsumexp nan.
_NEVER = -1e30


def log_partition(theta: Float[Tensor, " *batch n"], num_ones: int) -> Float[Tensor, " *batch"]:
    """Logarithm of the sum of exp <z, theta> over all z with that many ones."""
    return _tree(theta, num_ones)[-1][num_ones, 0]


def marginals(theta: Float[Tensor, " *batch n"], num_ones: int) -> Float[Tensor, " *batch n"]:
    """Probability of each item to be in the subset; differentiable, their Jacobian the covariance
    of the items."""
    return torch.func.grad(lambda theta: log_partition(theta, num_ones).sum())(theta)


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
    for level in reversed(_tree(theta, num_ones)[:-1]):
        left, right = level[:, 0::2], level[:, 1::2]
        counts_of_left = torch.arange(len(level), device=theta.device)
        counts_of_left = counts_of_left.reshape(-1, *[1] * counts.dim())
        log_weights = left + _coefficient(right, counts - counts_of_left)
        cumulative = torch.softmax(log_weights, dim=0).cumsum(dim=0)
        num_nodes = len(counts)
        total = cumulative[-1]
        # Rounding must not lead past the last count that is possible.
        limit = uniform[num_nodes - 1 : 2 * num_nodes - 1] * total
        in_left = ((cumulative <= limit) & (cumulative < total)).sum(dim=0)
        counts = torch.stack([in_left, counts - in_left], dim=1).flatten(0, 1)
    return counts[: theta.shape[-1]].movedim(0, -1).to(theta.dtype)


def _depth(num_items: int) -> int:
    return (num_items - 1).bit_length()


def _tree(theta: Tensor, num_ones: int) -> list[Tensor]:
    """Log-coefficients ``[degree + 1, nodes, *batch]`` of every level, from the items up."""
    num_items = theta.shape[-1]
    depth = _depth(num_items)
    padded = torch.nn.functional.pad(theta, (0, 2**depth - num_items), value=_NEVER)
    padded = padded.movedim(-1, 0).contiguous()
    levels = [torch.stack([torch.zeros_like(padded), padded])]
    for _ in range(depth):
        levels.append(_product(levels[-1][:, 0::2], levels[-1][:, 1::2], num_ones))
    return levels


def _product(left: Tensor, right: Tensor, num_ones: int) -> Tensor:
    """Log-coefficients, up to the power k, of the product of two polynomials of one degree.

    In a row for each coefficient of ``left``, moved to the right by its power: those of one power
    then share a column. The rows move by being written out one entry too long, for the derivative
    of indexing with a tensor is a scatter.
    """
    size = len(left)
    rows = left[:, None] + right
    behind = torch.full_like(rows, _NEVER)
    entries = torch.cat([rows, behind], dim=1).flatten(0, 1)
    moved = entries[:-size].unflatten(0, (size, 2 * size - 1))[:, : num_ones + 1]
    # No entry is infinite, which spares what a library's logsumexp does about it.
    largest = moved.detach().amax(dim=0)
    return largest + (moved - largest).exp().sum(dim=0).log()


def _coefficient(log_coefficients: Tensor, power: Tensor) -> Tensor:
    """The entry at ``power`` of the first axis, zero's logarithm outside of it."""
    degree = len(log_coefficients) - 1
    shape = torch.broadcast_shapes(log_coefficients.shape[1:], power.shape[1:])
    taken = torch.take_along_dim(
        log_coefficients.expand(degree + 1, *shape),
        power.clamp(0, degree).expand(len(power), *shape),
        dim=0,
    )
    return torch.where((power >= 0) & (power <= degree), taken, _NEVER)
