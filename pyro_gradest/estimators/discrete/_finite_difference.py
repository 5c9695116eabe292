"""The derivative of a solver as a difference of solutions; it is itself never differentiated.

Notation follows Niepert et al. (2021): z = MAP(theta + eps), lambda the length of the step along
the gradient dy = dL/dz. The difference is of solutions under the *same* noise.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_gradest.estimators.discrete.solvers import Solver


class Rule(NamedTuple):
    """How a difference is taken; nothing in it is an array."""

    solver: Solver
    symmetric: bool
    step_size: float = 0.0
    """lambda, where the step is not relative to theta."""
    least_length: float = 0.0
    """What the length of theta counts as at least, where the step is relative to it."""
    is_of_bits: bool = False
    """Whether an entry is one of the two of a one-hot state, which change together."""
    is_relative: bool = False
    """Whether the share of entries that differ is counted, not their number."""


def solve_with_difference(
    rule: Rule,
    theta: Tensor,
    perturbation: Tensor,
    relative_step: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """States at theta + perturbation, with the difference as their derivative in theta.

    With a relative step, that of each datum is this multiple of the length of its theta, whatever
    the length of its gradient. What ``counts`` gets is no derivative: it is the number of entries
    that differ, or their share of a datum's, and the number of data, summed over those counted.
    """
    return _Difference.apply(rule, theta, perturbation, relative_step, counts)


class _Difference(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        rule: Rule,
        theta: Tensor,
        perturbation: Tensor,
        relative_step: Tensor | None,
        counts: Tensor | None,
    ) -> Tensor:
        return rule.solver(theta + perturbation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.rule, theta, perturbation, relative_step, counts = inputs
        ctx.has_counts = counts is not None
        ctx.save_for_backward(theta, perturbation, relative_step, output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        theta, perturbation, relative_step, states = ctx.saved_tensors
        rule, event_dim = ctx.rule, ctx.rule.solver.event_dim
        if relative_step is None:
            displacement, inverse = rule.step_size * gradient, 1 / rule.step_size
            is_counted = torch.tensor(True)
        else:
            size = _length(gradient, event_dim)
            length = relative_step * _length(theta, event_dim).clamp_min(rule.least_length)
            # A datum without gradient, or a step of no length, makes no difference.
            is_counted = (size > 0) & (length > 0)
            inverse = torch.where(is_counted, size / length, 0.0)
            displacement = torch.where(is_counted, length / size, 0.0) * gradient
        # A solver need not know what to do with nan or inf: they are put back below.
        displacement = displacement.nan_to_num(0.0, 0.0, 0.0)
        perturbed = theta + perturbation
        below = rule.solver(perturbed - displacement)
        above = rule.solver(perturbed + displacement) if rule.symmetric else states
        if rule.symmetric:
            inverse = inverse / 2
        result = inverse * (above - below) + 0.0 * gradient
        counts = None
        if ctx.has_counts:
            change = torch.where(is_counted, _change(rule, above, below, gradient), 0.0)
            counts = torch.stack([change.sum(), is_counted.sum()]).to(theta.dtype)
        return None, result, None, None, counts


def _change(rule: Rule, above: Tensor, below: Tensor, gradient: Tensor) -> Tensor:
    """Of each datum, how many entries differ, or their share of those that could be asked to."""
    event_dim = rule.solver.event_dim
    differ = _number(above != below, event_dim)
    if not rule.is_relative:
        # Both of the entries that stand for a bit.
        return 2 * differ if rule.is_of_bits else differ
    if rule.is_of_bits:
        most = _number(torch.ones_like(above), event_dim)
    else:
        most = _number(above != 0, event_dim) + _number(below != 0, event_dim)
    # Far fewer have a gradient where a path, say, is nearly right, however long the step.
    asked = torch.minimum(most, _number(gradient != 0, event_dim))
    return (differ / asked.clamp_min(1)).clamp_max(1)


def _number(marks: Tensor, event_dim: int) -> Tensor:
    """Sum over the event axes, which are kept."""
    axes = tuple(range(-event_dim, 0))
    return marks.sum(dim=axes, keepdim=True) if axes else marks.long()


def _length(vectors: Tensor, event_dim: int) -> Tensor:
    """Euclidean length over the event axes, which are kept; no square under- or overflows."""
    if event_dim == 0:
        return vectors.abs()
    axes = tuple(range(-event_dim, 0))
    largest = vectors.abs().amax(dim=axes, keepdim=True)
    scaled = vectors / torch.where(largest > 0, largest, 1.0)
    return largest * scaled.square().sum(dim=axes, keepdim=True).sqrt()
