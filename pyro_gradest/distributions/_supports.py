"""Sets of values that the host has no constraint for."""

from typing import Any

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint


class KHot(Constraint):
    """Vectors of zeros and ones with exactly ``k`` ones."""

    is_discrete = True
    event_dim = 1

    def __init__(self, k: int) -> None:
        self.k = k

    def check(self, value: Tensor) -> Tensor:
        return _is_binary(value).all(dim=-1) & (value.sum(dim=-1) == self.k)

    def __repr__(self) -> str:
        return f"KHot(k={self.k})"


class Permutation(Constraint):
    """Vectors of the integers 0 to n - 1, each once."""

    is_discrete = True
    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        numbers = torch.arange(value.shape[-1], device=value.device)
        return (value.sort(dim=-1).values == numbers).all(dim=-1)

    def __repr__(self) -> str:
        return "Permutation()"


class SpanningTreeAdjacency(Constraint):
    """Symmetric matrices of zeros and ones whose ones are the edges of a tree on all nodes."""

    is_discrete = True
    event_dim = 2

    def check(self, value: Tensor) -> Tensor:
        num_nodes = value.shape[-1]
        is_graph = _is_binary(value) & (value == value.mT)
        num_ends = value.sum(dim=(-2, -1))
        # Pairs of nodes at a distance of up to 1, 2, 4, ... edges.
        reached = (value != 0).float() + torch.eye(num_nodes, device=value.device)
        for _ in range(num_nodes.bit_length()):
            reached = (reached @ reached).clamp(max=1.0)
        is_tree = (num_ends == 2 * (num_nodes - 1)) & (reached > 0).all(dim=-1).all(dim=-1)
        return is_graph.all(dim=-1).all(dim=-1) & is_tree

    def __repr__(self) -> str:
        return "SpanningTreeAdjacency()"


def _is_binary(value: Any) -> Any:
    return (value == 0) | (value == 1)
