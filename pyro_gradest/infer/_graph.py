"""What a tensor was computed from, and derivatives along a part of it."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

COUNTS = "_gradest_counts"
"""Mark of a leaf whose gradient is no derivative but a count of what a backward pass met."""


class Cut(NamedTuple):
    """A place where the graph was cut."""

    value: Tensor
    """As it was computed."""
    copy: Tensor
    """The leaf that stands for it in all that follows, later values included."""
    kind: str
    """What is counted together."""


def graph_leaves(tensor: Tensor, *, but: Collection[Tensor] = ()) -> list[Tensor]:
    """The leaves that a tensor was computed from and that require a gradient."""
    left_out = set(map(id, but))
    leaves, seen, stack = [], set(), [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(function for function, _ in node.next_functions)
            if hasattr(node, "variable") and id(node.variable) not in left_out:
                leaves.append(node.variable)
    return leaves


def with_gradient(leaf: Tensor, gradient: Tensor) -> Tensor:
    """A scalar that has this gradient in the leaf, multiplied by what arrives unless it counts."""
    if getattr(leaf, COUNTS, False):
        return _Count.apply(leaf, gradient)
    return (leaf * gradient).sum()


class _Count(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return leaf.new_zeros(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


def through_cuts(function: Tensor, runs: Iterable[Sequence[Cut]], *, kind: str) -> Tensor:
    """A scalar whose gradient is that of ``function`` along the paths that start at cuts of a kind.

    Such a path may pass through any cuts after it. Linear in the values that were cut, each of
    which depends on the copies before it: the derivative in a value is that of the function and
    that of all later values of its run.
    """
    runs = [run for run in runs if run]
    copies = [cut.copy for run in runs for cut in run]
    if not copies:
        return torch.zeros_like(function)
    slopes = iter(_derivatives(function, copies, None))
    terms = []
    for run in runs:
        total = [next(slopes) for _ in run]
        for j in reversed(range(len(run))):
            if run[j].kind == kind:
                terms.append((total[j] * run[j].value).sum())
            earlier = [cut.copy for cut in run[:j]]
            if earlier:
                carried = _derivatives(run[j].value, earlier, total[j])
                total[:j] = [a + b for a, b in zip(total[:j], carried, strict=True)]
    return torch.stack(terms).sum() if terms else torch.zeros_like(function)


def _derivatives(tensor: Tensor, inputs: list[Tensor], weight: Tensor | None) -> Sequence[Tensor]:
    return torch.autograd.grad(tensor, inputs, weight, retain_graph=True, materialize_grads=True)
