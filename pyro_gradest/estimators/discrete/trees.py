"""Spanning trees as an exponential family, by eliminating one node after the other.

A tree's probability is proportional to the product of its edges' weights, exp of their logits. By
Kirchhoff's theorem the normaliser is a determinant of the Laplacian, here by elimination. A node
with edges of weights c_i, whose sum is d, contributes the factor d and leaves behind, between each
two of its neighbours, an edge of weight c_i c_j / d beside the one that was there. Nothing is ever
subtracted, so that, in logarithms, weights of any ratio keep their digits.

A draw goes back through the nodes. Given a tree of the graph without the node, each edge is one
that was there or one that the node left behind, in proportion to their weights. The latter are
dropped, and the node is joined to each of the pieces at one of its nodes, in proportion to c_i.
That the tree then has the right law: of given pieces B the trees before and after have the weights
prod_B c(B) and prod_B c(B) / d, by Cayley's formula for trees of products of weights.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_gradest.estimators.discrete.noise import GumbelNoise

# Stands for the logarithm of zero. -inf would make derivatives nan.
_NEVER = -1e30


def log_partition(logits: Float[Tensor, " *batch n n"]) -> Float[Tensor, " *batch"]:
    """Logarithm of the sum over all spanning trees of the product of the edges' weights."""
    log_factors, _, _ = _eliminate(logits)
    return torch.stack(log_factors, dim=-1).sum(dim=-1)


def marginals(logits: Float[Tensor, " *batch n n"]) -> Float[Tensor, " *batch n n"]:
    """Probability of each edge to be in the tree, symmetric; differentiable."""
    # Either of an edge's two entries has half of the derivative.
    return 2 * torch.func.grad(lambda logits: log_partition(logits).sum())(logits)


def draw(
    logits: Float[Tensor, " *batch n n"],
    generator: torch.Generator | None,
    sample_shape: tuple[int, ...] = (),
) -> Float[Tensor, " *samples_batch n n"]:
    """Adjacency matrices ``[*sample_shape, *batch, n, n]``, exactly from the family."""
    _, stars, log_kept = _eliminate(logits.detach())
    num_nodes = logits.shape[-1]
    nodes = torch.arange(num_nodes, device=logits.device)
    parents = nodes.expand(*sample_shape, *logits.shape[:-1])
    for node in reversed(range(num_nodes - 1)):
        parents = _insert(node, parents, stars[node], log_kept[node], generator)
    half = (parents[..., None] == nodes) & (nodes[:, None] != nodes)
    return (half | half.mT).to(logits.dtype)


def _eliminate(logits: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """For each node but the last, its log-factor ``[*batch]``, the log-weights of its edges
    ``[*batch, n]``, and the log-probabilities ``[*batch, n, n]`` of the edges after it that they
    were there before."""
    num_nodes = logits.shape[-1]
    is_loop = torch.eye(num_nodes, dtype=torch.bool, device=logits.device)
    log_weights = ((logits + logits.mT) / 2).masked_fill(is_loop, _NEVER)
    # The sum of no factors is zero, and has a gradient all the same.
    log_factors, stars, log_kept = [0.0 * logits.sum(dim=(-2, -1))], [], []
    for node in range(num_nodes - 1):
        star = log_weights[..., node, :]
        log_factor = star.logsumexp(dim=-1)
        is_gone = is_loop[node] | is_loop[node][:, None]
        before = log_weights.masked_fill(is_gone, _NEVER)
        mesh = star[..., None] + star[..., None, :] - log_factor[..., None, None]
        # The second derivative of torch.logaddexp is nan where its arguments are far apart.
        log_weights = torch.stack([before, mesh]).logsumexp(dim=0)
        log_weights = log_weights.masked_fill(is_gone | is_loop, _NEVER)
        log_factors.append(log_factor)
        stars.append(star)
        log_kept.append(before - log_weights)
    return log_factors, stars, log_kept


def _insert(
    node: int,
    parents: Tensor,
    star: Tensor,
    log_kept: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """A tree that has the node as its root, from one of the nodes after it.

    Trees are the parents of their nodes. A root, and what is not in the tree yet, is its own.
    """
    nodes = torch.arange(parents.shape[-1], device=parents.device)
    log_kept = torch.take_along_dim(log_kept.expand(*parents.shape, -1), parents[..., None], -1)
    shape, dtype, device = parents.shape, star.dtype, star.device
    uniform = torch.rand(shape, generator=generator, dtype=dtype, device=device)
    parents = torch.where(uniform < log_kept[..., 0].exp(), parents, nodes)
    jumps = [parents]  # by 1, 2, 4, ... edges upwards, staying at the top
    for _ in range(parents.shape[-1].bit_length()):
        jumps.append(jumps[-1].gather(-1, jumps[-1]))
    is_joined = _one_of_each(jumps[-1], star, generator) & (nodes > node)
    # Each piece is turned to have the node that is joined as its top: the path up is reversed.
    is_on_path = is_joined
    for jump in jumps:
        is_on_path = is_on_path | (_largest(is_on_path.long(), jump) > 0)
    child = _largest(torch.where(is_on_path & (parents != nodes), nodes + 1, 0), parents)
    turned = torch.where(child > 0, child - 1, parents)
    return torch.where(is_joined, node, turned)


def _one_of_each(piece: Tensor, star: Tensor, generator: torch.Generator | None) -> Tensor:
    """Marks one node of each piece, drawn in proportion to its weight."""
    star = star.expand(piece.shape)
    noisy = star + GumbelNoise().sample_like(star, generator=generator)
    best = torch.full_like(noisy, 2 * _NEVER).scatter_reduce(-1, piece, noisy, "amax")
    # Where two are equal, which happens in float32, the later one is taken.
    numbers = torch.arange(1, piece.shape[-1] + 1, device=piece.device).expand(piece.shape)
    candidates = torch.where(noisy == best.gather(-1, piece), numbers, 0)
    return _largest(candidates, piece).gather(-1, piece) == numbers


def _largest(values: Tensor, groups: Tensor) -> Tensor:
    """The largest of the values of each group, zero for none."""
    return torch.zeros_like(values).scatter_reduce(-1, groups, values, "amax")
