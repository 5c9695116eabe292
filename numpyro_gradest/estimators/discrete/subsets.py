"""Subsets of fixed size as an exponential family, by elementary symmetric polynomials.

p(z) is proportional to exp <z, theta> over z in {0, 1}^n with k ones. The normaliser is the
coefficient of x^k in the product of (1 + exp(theta_i) x), multiplied out in a balanced tree of
log-coefficients, of which none beyond k is kept: O(n k) in log2(n) steps of whole arrays. A draw
goes down the same tree and splits the ones among the children.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Stands for the logarithm of zero. -inf would make the derivative of a logsumexp nan.
_NEVER = -1e30
# Outside of compiled code, as when a host runs a program for the first time, each of the many small
# operations would be compiled for itself.
_compiled = partial(jax.jit, static_argnames="num_ones")


@_compiled
def log_partition(theta: Float[Array, " *batch n"], num_ones: int) -> Float[Array, " *batch"]:
    """Logarithm of the sum of exp <z, theta> over all z with that many ones."""
    return _tree(theta, num_ones)[-1][..., 0, num_ones]


@_compiled
def marginals(theta: Float[Array, " *batch n"], num_ones: int) -> Float[Array, " *batch n"]:
    """Probability of each item to be in the subset; differentiable, their Jacobian the covariance
    of the items."""
    return jax.grad(lambda theta: jnp.sum(log_partition(theta, num_ones)))(theta)


def draw(
    key: Array,
    theta: Float[Array, " *batch n"],
    num_ones: int,
    sample_shape: tuple[int, ...] = (),
) -> Float[Array, " *samples_batch n"]:
    """Subsets ``[*sample_shape, *batch, n]``, exactly from the family."""
    shape = (*sample_shape, *theta.shape[:-1], num_splits(theta.shape[-1]))
    return place(theta, jax.random.uniform(key, shape, theta.dtype), num_ones)


def num_splits(num_items: int) -> int:
    """How many uniform numbers make a draw: one for each node that splits its ones in two."""
    return 2 ** _depth(num_items) - 1


@_compiled
def place(
    theta: Float[Array, " *batch n"], uniform: Float[Array, " *samples_batch splits"], num_ones: int
) -> Float[Array, " *samples_batch n"]:
    """The draws that these uniform numbers make: of like thetas, like draws."""
    tree = _tree(jax.lax.stop_gradient(theta), num_ones)
    counts = jnp.full((*uniform.shape[:-1], 1), num_ones)
    for level in reversed(tree[:-1]):
        left, right = level[..., 0::2, :], level[..., 1::2, :]
        others = counts[..., None] - jnp.arange(left.shape[-1])
        weights = jax.nn.softmax(left + _coefficient(right, others), axis=-1)
        cumulative = jnp.cumsum(weights, axis=-1)
        num_nodes = counts.shape[-1]
        level_uniform = uniform[..., num_nodes - 1 : 2 * num_nodes - 1, None]
        total = cumulative[..., -1:]
        # Rounding must not lead past the last count that is possible.
        is_passed = (cumulative <= level_uniform * total) & (cumulative < total)
        in_left = jnp.sum(is_passed, axis=-1)
        counts = jnp.stack([in_left, counts - in_left], axis=-1)
        counts = counts.reshape(*counts.shape[:-2], -1)
    return counts[..., : theta.shape[-1]].astype(theta.dtype)


def _depth(num_items: int) -> int:
    return (num_items - 1).bit_length()


def _tree(theta: Array, num_ones: int) -> list[Array]:
    """Log-coefficients ``[*batch, nodes, degree + 1]`` of every level, from the items up."""
    num_items = theta.shape[-1]
    depth = _depth(num_items)
    widths = [(0, 0)] * (theta.ndim - 1) + [(0, 2**depth - num_items)]
    padded = jnp.pad(theta, widths, constant_values=_NEVER)
    levels = [jnp.stack([jnp.zeros_like(padded), padded], axis=-1)]
    for _ in range(depth):
        left, right = levels[-1][..., 0::2, :], levels[-1][..., 1::2, :]
        levels.append(_product(left, right, num_ones))
    return levels


def _product(left: Array, right: Array, num_ones: int) -> Array:
    """Log-coefficients, up to the power k, of the product of two polynomials of one degree.

    In a row for each coefficient of ``left``, moved to the right by its power: those of one power
    then share a column. The rows move by being written out one entry too long, for indexing with
    an array compiles slowly, and its derivative is a scatter.
    """
    size = left.shape[-1]
    rows = left[..., :, None] + right[..., None, :]
    widths = [(0, 0)] * (rows.ndim - 1) + [(0, size)]
    entries = jnp.pad(rows, widths, constant_values=_NEVER).reshape(*rows.shape[:-2], -1)
    moved = entries[..., :-size].reshape(*rows.shape[:-1], 2 * size - 1)
    moved = moved[..., : num_ones + 1]
    # No entry is infinite, which spares what a library's logsumexp does about it.
    largest = jax.lax.stop_gradient(jnp.max(moved, axis=-2, keepdims=True))
    return largest[..., 0, :] + jnp.log(jnp.sum(jnp.exp(moved - largest), axis=-2))


def _coefficient(log_coefficients: Array, power: Array) -> Array:
    """The entry at ``power`` of the last axis, zero's logarithm outside of it."""
    degree = log_coefficients.shape[-1] - 1
    is_inside = (power >= 0) & (power <= degree)
    shape = jnp.broadcast_shapes(log_coefficients.shape[:-1], power.shape[:-1])
    taken = jnp.take_along_axis(
        jnp.broadcast_to(log_coefficients, (*shape, degree + 1)),
        jnp.broadcast_to(jnp.clip(power, 0, degree), (*shape, power.shape[-1])),
        axis=-1,
    )
    return jnp.where(is_inside, taken, _NEVER)
