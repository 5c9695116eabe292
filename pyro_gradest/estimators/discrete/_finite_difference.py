"""The derivative of a solver as a difference of solutions; it is itself never differentiated.

Notation follows Niepert et al. (2021): z = MAP(theta + eps), lambda the length of the step along
the gradient dy = dL/dz. The difference is of solutions under the *same* noise.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_gradest.estimators.discrete.solvers import Solver, states_of


class Rule(NamedTuple):
    """How a difference is taken; nothing in it is an array."""

    solver: Solver
    symmetric: bool
    step_size: float = 0.0
    """lambda, where a step is this multiple of the gradient."""
    is_of_bits: bool = False
    """Whether an entry is one of the two of a one-hot state, which change together."""
    is_relative: bool = False
    """Whether the share of entries that differ is counted, not their number."""


def solve_with_difference(
    rule: Rule,
    theta: Tensor,
    perturbed: Tensor,
    length: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """States at ``perturbed``, with the difference around it as their derivative in theta.

    With a length, that is the step's of each datum, whatever the length of its gradient. What
    ``counts`` gets is no derivative: it is the number of entries that differ, or their share of a
    datum's, and the number of data, summed over those counted.
    """
    return _Difference.apply(rule, theta, perturbed.detach(), length, counts)


class _Difference(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        rule: Rule,
        theta: Tensor,
        perturbed: Tensor,
        length: Tensor | None,
        counts: Tensor | None,
    ) -> Tensor:
        return rule.solver(perturbed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.rule, _, perturbed, length, counts = inputs
        ctx.has_counts = counts is not None
        ctx.save_for_backward(perturbed, length, None if ctx.rule.symmetric else output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        perturbed, length, states = ctx.saved_tensors
        rule, event_dim = ctx.rule, ctx.rule.solver.event_dim
        if length is None:
            scale, inverse = rule.step_size, 1 / rule.step_size
        else:
            size = length_of(gradient, event_dim)
            # A datum without gradient, or a step of no length, makes no difference.
            is_counted = (size > 0) & (length > 0)
            scale = torch.where(is_counted, length / size, 0.0)
            inverse = torch.where(is_counted, size / length, 0.0)
        # A solver need not know what to do with nan or inf: they are put back below.
        displacement = (scale * gradient).nan_to_num_(0.0, 0.0, 0.0)
        below = states_of(rule.solver, perturbed - displacement)
        above = states_of(rule.solver, perturbed + displacement) if rule.symmetric else states
        if rule.symmetric:
            inverse = inverse / 2
        result = (inverse * (above - below)).add_(gradient, alpha=0.0)
        counts = None
        if ctx.has_counts:
            change = torch.where(is_counted, _change(rule, above, below, gradient), 0.0)
            counts = torch.stack([change.sum(), is_counted.sum()]).to(gradient.dtype)
        return None, result, None, None, counts


def _change(rule: Rule, above: Tensor, below: Tensor, gradient: Tensor) -> Tensor:
    """Of each datum, how many entries differ, or their share of those that could be asked to."""
    event_dim = rule.solver.event_dim
    differ = _number(above != below, event_dim, above)
    if not rule.is_relative:
        # Both of the entries that stand for a bit.
        return 2 * differ if rule.is_of_bits else differ
    if rule.is_of_bits:
        most = _number(torch.ones_like(above), event_dim, above)
    else:
        most = _number(above != 0, event_dim, above) + _number(below != 0, event_dim, above)
    # Far fewer have a gradient where a path, say, is nearly right, however long the step.
    asked = torch.minimum(most, _number(gradient != 0, event_dim, above))
    return (differ / asked.clamp_min(1)).clamp_max(1)


def _number(marks: Tensor, event_dim: int, like: Tensor) -> Tensor:
    """Sum over the event axes, which are kept."""
    marks = marks.to(like.dtype)  # to sum truth values takes several times as long
    axes = tuple(range(-event_dim, 0))
    return marks.sum(dim=axes, keepdim=True) if axes else marks


def length_of(vectors: Tensor, event_dim: int) -> Tensor:
    """Euclidean length over the event axes, which are kept; no square under- or overflows."""
    if event_dim == 0:
        return vectors.abs()
    axes = tuple(range(-event_dim, 0))
    largest = vectors.abs().amax(dim=axes, keepdim=True)
    scaled = vectors / torch.where(largest > 0, largest, 1.0)
    return largest * torch.linalg.vector_norm(scaled, dim=axes, keepdim=True)
