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

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_gradest.estimators.discrete.noise import GumbelNoise

# Stands for the logarithm of zero. -inf would make derivatives nan.
_NEVER = -1e30


def log_partition(logits: Float[Array, " *batch n n"]) -> Float[Array, " *batch"]:
    """Logarithm of the sum over all spanning trees of the product of the edges' weights."""
    log_factors, _, _ = _eliminate(logits)
    return jnp.sum(log_factors, axis=0)


def marginals(logits: Float[Array, " *batch n n"]) -> Float[Array, " *batch n n"]:
    """Probability of each edge to be in the tree, symmetric; differentiable."""
    # Either of an edge's two entries has half of the derivative.
    return 2 * jax.grad(lambda logits: jnp.sum(log_partition(logits)))(logits)


def draw(
    key: Array, logits: Float[Array, " *batch n n"], sample_shape: tuple[int, ...] = ()
) -> Float[Array, " *samples_batch n n"]:
    """Adjacency matrices ``[*sample_shape, *batch, n, n]``, exactly from the family."""
    _, stars, log_kept = _eliminate(jax.lax.stop_gradient(logits))
    num_nodes = logits.shape[-1]
    nodes = jnp.arange(num_nodes)
    first = jnp.broadcast_to(nodes, (*sample_shape, *logits.shape[:-1]))
    keys = jax.random.split(key, num_nodes - 1)
    steps = (keys, nodes[:-1], stars, log_kept)
    parents, _ = jax.lax.scan(
        lambda parents, step: (_insert(parents, *step), None), first, steps, reverse=True
    )
    half = (parents[..., None] == nodes) & (nodes[:, None] != nodes)
    return (half | half.mT).astype(logits.dtype)


def _eliminate(logits: Array) -> tuple[Array, Array, Array]:
    """For each node but the last, its log-factor ``[*batch]``, the log-weights of its edges
    ``[*batch, n]``, and the log-probabilities ``[*batch, n, n]`` of the edges after it that they
    were there before."""
    num_nodes = logits.shape[-1]
    is_loop = jnp.eye(num_nodes, dtype=bool)

    def step(log_weights: Array, node: Array) -> tuple[Array, tuple[Array, Array, Array]]:
        star = jnp.take(log_weights, node, axis=-2)
        log_factor = jax.nn.logsumexp(star, axis=-1)
        is_gone = is_loop[node] | is_loop[node][:, None]
        before = jnp.where(is_gone, _NEVER, log_weights)
        mesh = star[..., None] + star[..., None, :] - log_factor[..., None, None]
        after = jnp.where(is_gone | is_loop, _NEVER, jnp.logaddexp(before, mesh))
        return after, (log_factor, star, before - after)

    log_weights = jnp.where(is_loop, _NEVER, (logits + logits.mT) / 2)
    return jax.lax.scan(step, log_weights, jnp.arange(num_nodes - 1))[1]


def _insert(parents: Array, key: Array, node: Array, star: Array, log_kept: Array) -> Array:
    """A tree that has the node as its root, from one of the nodes after it.

    Trees are the parents of their nodes. A root, and what is not in the tree yet, is its own.
    """
    key_kept, key_joined = jax.random.split(key)
    nodes = jnp.arange(parents.shape[-1])
    log_kept = jnp.broadcast_to(log_kept, (*parents.shape, parents.shape[-1]))
    log_kept = jnp.take_along_axis(log_kept, parents[..., None], axis=-1)[..., 0]
    uniform = jax.random.uniform(key_kept, log_kept.shape, log_kept.dtype)
    parents = jnp.where(uniform < jnp.exp(log_kept), parents, nodes)
    jumps = [parents]  # by 1, 2, 4, ... edges upwards, staying at the top
    for _ in range(parents.shape[-1].bit_length()):
        jumps.append(jnp.take_along_axis(jumps[-1], jumps[-1], axis=-1))
    is_joined = _one_of_each(key_joined, jumps[-1], star) & (nodes > node)
    # Each piece is turned to have the node that is joined as its top: the path up is reversed.
    is_on_path = is_joined
    for jump in jumps:
        is_on_path = is_on_path | (_largest(is_on_path.astype(int), jump) > 0)
    child = _largest(jnp.where(is_on_path & (parents != nodes), nodes + 1, 0), parents)
    turned = jnp.where(child > 0, child - 1, parents)
    return jnp.where(is_joined, node, turned)


def _one_of_each(key: Array, piece: Array, star: Array) -> Array:
    """Marks one node of each piece, drawn in proportion to its weight."""
    star = jnp.broadcast_to(star, piece.shape)
    noisy = star + GumbelNoise().sample_like(key, star)
    best = _largest(noisy, piece, 2 * _NEVER)
    # Where two are equal, which happens in float32, the later one is taken.
    numbers = jnp.arange(1, piece.shape[-1] + 1)
    candidates = jnp.where(noisy == jnp.take_along_axis(best, piece, axis=-1), numbers, 0)
    return jnp.take_along_axis(_largest(candidates, piece), piece, axis=-1) == numbers


def _largest(values: Array, groups: Array, none: float = 0) -> Array:
    """The largest of the values of each group, ``none`` for none."""

    def of_datum(values: Array, groups: Array) -> Array:
        return jnp.full_like(values, none).at[groups].max(values)

    return jnp.vectorize(of_datum, signature="(n),(n)->(n)")(values, groups)
