"""The derivative of a solver as a difference of solutions; it is itself never differentiated.

Notation follows Niepert et al. (2021): z = MAP(theta + eps), lambda the length of the step along
the gradient dy = dL/dz. The difference is of solutions under the *same* noise.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from numpyro_gradest.estimators.discrete.solvers import Solver, states_of


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
    theta: Array,
    perturbed: Array,
    length: Array | None = None,
    counts: Array | None = None,
) -> Array:
    """States at ``perturbed``, with the difference around it as their derivative in theta.

    With a length, that is the step's of each datum, whatever the length of its gradient. What
    ``counts`` gets is no derivative: it is the number of entries that differ, or their share of a
    datum's, and the number of data, summed over those counted.
    """

    # Defined anew at each call, as a solver need not be hashable.
    @jax.custom_vjp
    def solve(theta, perturbed, length, counts):  # type: ignore[no-untyped-def]
        return rule.solver(perturbed)

    def forward(theta, perturbed, length, counts):  # type: ignore[no-untyped-def]
        states = rule.solver(perturbed)
        return states, (perturbed, length, counts, None if rule.symmetric else states)

    def backward(saved, gradient):  # type: ignore[no-untyped-def]
        perturbed, length, counts, states = saved
        result, new_counts = _difference(rule, perturbed, length, states, gradient)
        return (
            result,
            jnp.zeros_like(perturbed),
            jax.tree.map(jnp.zeros_like, length),
            None if counts is None else new_counts,
        )

    solve.defvjp(forward, backward)
    return solve(theta, jax.lax.stop_gradient(perturbed), length, counts)


def _difference(
    rule: Rule,
    perturbed: Array,
    length: Array | None,
    states: Array | None,
    gradient: Array,
) -> tuple[Array, Array]:
    """The derivative in theta, and the change in how many data."""
    event_dim = rule.solver.event_dim
    if length is None:
        scale = jnp.asarray(rule.step_size, gradient.dtype)
        inverse = jnp.asarray(1 / rule.step_size, gradient.dtype)
        is_counted = jnp.array(True)
    else:
        size = length_of(gradient, event_dim)
        # A datum without gradient, or a step of no length, makes no difference.
        is_counted = (size > 0) & (length > 0)
        inverse = jnp.where(is_counted, size / jnp.where(is_counted, length, 1.0), 0.0)
        scale = jnp.where(is_counted, length / jnp.where(is_counted, size, 1.0), 0.0)
    # A solver need not know what to do with nan or inf: they are put back below.
    displacement = jnp.nan_to_num(scale * gradient, nan=0.0, posinf=0.0, neginf=0.0)
    below = states_of(rule.solver, perturbed - displacement)
    above = states_of(rule.solver, perturbed + displacement) if states is None else states
    if rule.symmetric:
        inverse = inverse / 2
    result = inverse * (above - below) + 0.0 * gradient
    change = _change(rule, above, below, gradient)
    change = jnp.sum(change, where=is_counted, dtype=gradient.dtype)
    return result, jnp.stack([change, jnp.sum(is_counted, dtype=gradient.dtype)])


def _change(rule: Rule, above: Array, below: Array, gradient: Array) -> Array:
    """Of each datum, how many entries differ, or their share of those that could be asked to."""
    event_dim = rule.solver.event_dim
    differ = _number(above != below, event_dim, above)
    if not rule.is_relative:
        # Both of the entries that stand for a bit.
        return 2 * differ if rule.is_of_bits else differ
    if rule.is_of_bits:
        most = _number(jnp.ones_like(above), event_dim, above)
    else:
        most = _number(above != 0, event_dim, above) + _number(below != 0, event_dim, above)
    # Far fewer have a gradient where a path, say, is nearly right, however long the step.
    asked = jnp.minimum(most, _number(gradient != 0, event_dim, above))
    return jnp.minimum(differ / jnp.maximum(asked, 1), 1)


def _number(marks: Array, event_dim: int, like: Array) -> Array:
    """Sum over the event axes, which are kept."""
    axes = tuple(range(-event_dim, 0))
    return jnp.sum(marks, axis=axes, keepdims=True, dtype=like.dtype)


def length_of(vectors: Array, event_dim: int) -> Array:
    """Euclidean length over the event axes, which are kept; no square under- or overflows."""
    if event_dim == 0:
        return jnp.abs(vectors)
    axes = tuple(range(-event_dim, 0))
    largest = jnp.max(jnp.abs(vectors), axis=axes, keepdims=True)
    scaled = vectors / jnp.where(largest > 0, largest, 1.0)
    return largest * jnp.sqrt(jnp.sum(jnp.square(scaled), axis=axes, keepdims=True))
