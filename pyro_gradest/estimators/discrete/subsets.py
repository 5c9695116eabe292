"""Subsets of fixed size as an exponential family, by elementary symmetric polynomials.

p(z) is proportional to exp <z, theta> over z in {0, 1}^n with k ones. The normaliser is the
coefficient of x^k in the product of (1 + exp(theta_i) x), multiplied out in a balanced tree of
log-coefficients, of which none beyond k is kept: O(n k) in log2(n) steps of whole arrays. A draw
goes down the same tree and splits the ones among the children.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_gradest.estimators.discrete.noise import GumbelNoise

# Stands for the logarithm of zero. -inf would make the derivative of a logsumexp nan.
_NEVER = -1e30


def log_partition(theta: Float[Tensor, " *batch n"], num_ones: int) -> Float[Tensor, " *batch"]:
    """Logarithm of the sum of exp <z, theta> over all z with that many ones."""
    return _tree(theta, num_ones)[-1][..., 0, num_ones]


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
    tree = _tree(theta.detach(), num_ones)
    counts = torch.full((*sample_shape, *theta.shape[:-1], 1), num_ones, device=theta.device)
    for level in reversed(tree[:-1]):
        left, right = level[..., 0::2, :], level[..., 1::2, :]
        others = counts[..., None] - torch.arange(left.shape[-1], device=theta.device)
        log_weights = left + _coefficient(right, others)
        noisy = log_weights + GumbelNoise().sample_like(log_weights, generator=generator)
        in_left = noisy.argmax(dim=-1)
        counts = torch.stack([in_left, counts - in_left], dim=-1).flatten(-2)
    return counts[..., : theta.shape[-1]].to(theta.dtype)


def _tree(theta: Tensor, num_ones: int) -> list[Tensor]:
    """Log-coefficients ``[*batch, nodes, degree + 1]`` of every level, from the items up."""
    num_items = theta.shape[-1]
    depth = (num_items - 1).bit_length()
    padded = torch.nn.functional.pad(theta, (0, 2**depth - num_items), value=_NEVER)
    levels = [torch.stack([torch.zeros_like(padded), padded], dim=-1)]
    for _ in range(depth):
        left, right = levels[-1][..., 0::2, :], levels[-1][..., 1::2, :]
        degree = left.shape[-1] - 1
        new_degree = min(2 * degree, num_ones)
        difference = _range(new_degree, theta)[:, None] - _range(degree, theta)
        products = left[..., None, :] + _coefficient(right[..., None, :], difference)
        levels.append(torch.logsumexp(products, dim=-1))
    return levels


def _coefficient(log_coefficients: Tensor, power: Tensor) -> Tensor:
    """The entry at ``power`` of the last axis, zero's logarithm outside of it."""
    degree = log_coefficients.shape[-1] - 1
    is_inside = (power >= 0) & (power <= degree)
    shape = torch.broadcast_shapes(log_coefficients.shape[:-1], power.shape[:-1])
    taken = torch.take_along_dim(
        log_coefficients.expand(*shape, degree + 1),
        power.clamp(0, degree).expand(*shape, power.shape[-1]),
        dim=-1,
    )
    return torch.where(is_inside, taken, _NEVER)


def _range(last: int, theta: Tensor) -> Tensor:
    return torch.arange(last + 1, device=theta.device)
