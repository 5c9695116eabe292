"""Sets of values that the host has no constraint for."""

from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from numpyro.distributions.constraints import Constraint, ParameterFreeConstraint


class KHot(Constraint):
    """Vectors of zeros and ones with exactly ``k`` ones."""

    is_discrete = True
    event_dim = 1

    def __init__(self, k: int) -> None:
        self.k = k

    def __call__(self, x: ArrayLike) -> ArrayLike:
        x = jnp.asarray(x)
        return jnp.all(_is_binary(x), axis=-1) & (jnp.sum(x, axis=-1) == self.k)

    def __repr__(self) -> str:
        return f"KHot(k={self.k})"

    def tree_flatten(self) -> Any:
        return (), ((), {"k": self.k})

    def eq(self, other: object, static: bool = False) -> ArrayLike:
        return isinstance(other, KHot) and self.k == other.k


class Permutation(ParameterFreeConstraint):
    """Vectors of the integers 0 to n - 1, each once."""

    is_discrete = True
    event_dim = 1

    def __call__(self, x: ArrayLike) -> ArrayLike:
        x = jnp.sort(jnp.asarray(x), axis=-1)
        return jnp.all(x == jnp.arange(x.shape[-1]), axis=-1)

    def __repr__(self) -> str:
        return "Permutation()"


class SpanningTreeAdjacency(ParameterFreeConstraint):
    """Symmetric matrices of zeros and ones whose ones are the edges of a tree on all nodes."""

    is_discrete = True
    event_dim = 2

    def __call__(self, x: ArrayLike) -> ArrayLike:
        x = jnp.asarray(x)
        num_nodes = x.shape[-1]
        is_graph = jnp.all(_is_binary(x) & (x == x.mT), axis=(-2, -1))
        num_ends = jnp.sum(x, axis=(-2, -1))
        # Pairs of nodes at a distance of up to 1, 2, 4, ... edges.
        reached = (x != 0).astype("float32") + jnp.eye(num_nodes, dtype="float32")
        for _ in range(num_nodes.bit_length()):
            reached = jnp.minimum(reached @ reached, 1.0)
        is_tree = (num_ends == 2 * (num_nodes - 1)) & jnp.all(reached > 0, axis=(-2, -1))
        return is_graph & is_tree

    def __repr__(self) -> str:
        return "SpanningTreeAdjacency()"


def _is_binary(value: Any) -> Any:
    return (value == 0) | (value == 1)
