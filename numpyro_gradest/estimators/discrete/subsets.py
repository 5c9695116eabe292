"""Subsets of fixed size as an exponential family, by elementary symmetric polynomials.

p(z) is proportional to exp <z, theta> over z in {0, 1}^n with k ones: the law of independent bits
of log-odds theta + c, for any c, given that k of them are one. So the normaliser follows from the
probability of k ones, the coefficient of x^k in the product of (q_i + p_i x), multiplied out in a
balanced tree of which no coefficient beyond k is kept: O(n k) in log2(n) steps of whole arrays.
With c such that k ones are expected, none that matters underflows, whatever theta, and sums and
products of probabilities need no logarithms. A draw goes down the same tree and splits the ones
among the children; the probabilities of the items go down it too. Inside, batches come last: long
rows of like work are fastest.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Halvings of the interval in which c lies: of one as long as 1e6, which scores of items that are
# excluded may make it, they leave 0.06. So near, k ones are likely enough not to underflow.
_NUM_HALVINGS = 24
# Outside of compiled code, as when a host runs a program for the first time, each of the many small
# operations would be compiled for itself.
_compiled = partial(jax.jit, static_argnames="num_ones")


@_compiled
def log_partition(theta: Float[Array, " *batch n"], num_ones: int) -> Float[Array, " *batch"]:
    """Logarithm of the sum of exp <z, theta> over all z with that many ones."""
    return _log_partition(theta, _shift(theta, num_ones), num_ones)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _log_partition(theta: Array, shift: Array, num_ones: int) -> Array:
    log_odds = theta + shift[..., None]
    probability = _root(_tree(jnp.moveaxis(log_odds, -1, 0), num_ones), num_ones)
    of_bits = jnp.sum(jax.nn.softplus(log_odds), axis=-1)
    return jnp.log(probability) + of_bits - num_ones * shift


@_log_partition.defjvp
def _along(num_ones: int, primals: Any, tangents: Any) -> tuple[Array, Array]:
    theta, shift = primals
    tangent = jnp.sum(_marginals(theta, shift, num_ones) * tangents[0], axis=-1)
    return _log_partition(theta, shift, num_ones), tangent


@_compiled
def marginals(theta: Float[Array, " *batch n"], num_ones: int) -> Float[Array, " *batch n"]:
    """Probability of each item to be in the subset; differentiable, their Jacobian the covariance
    of the items."""
    return _marginals(theta, _shift(theta, num_ones), num_ones)


def _marginals(theta: Array, shift: Array, num_ones: int) -> Array:
    levels = _tree(jnp.moveaxis(theta, -1, 0) + shift, num_ones)
    # From the root down, of each node: the probability of k ones in all given those in the node.
    shape = (num_ones + 1, 1, *levels[-1].shape[2:])
    outside = jnp.zeros(shape, theta.dtype).at[num_ones].set(1.0)
    for level in reversed(levels):
        size, num_nodes = level.shape[:2]
        if num_nodes > 1:
            pairs = level.reshape(size, num_nodes // 2, 2, *level.shape[2:])
            siblings = jnp.flip(pairs, axis=2).reshape(level.shape)
            given = _padded(outside, 0, max(2 * size - 1 - len(outside), 0))[: 2 * size - 1]
            outside = _correlate(jnp.repeat(given, 2, axis=1), siblings)
    joint = levels[0][: num_ones + 1] * outside[:2]
    is_one = jnp.sum(joint[1:], axis=0) / jnp.sum(joint, axis=0)
    return jnp.moveaxis(is_one[: theta.shape[-1]], 0, -1)


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
    theta = jax.lax.stop_gradient(theta)
    theta = theta.reshape((1,) * (uniform.ndim - theta.ndim) + theta.shape)
    uniform = jnp.moveaxis(uniform, -1, 0)
    counts = jnp.full((1, *uniform.shape[1:]), num_ones)
    log_odds = jnp.moveaxis(theta, -1, 0) + _shift(theta, num_ones)
    for level in reversed(_tree(log_odds, num_ones)):
        num_nodes = len(counts)
        if level.shape[1] == 1:  # of one item
            break
        left, right = level[:, 0::2], level[:, 1::2]
        counts_of_left = jnp.arange(len(level)).reshape(-1, *[1] * counts.ndim)
        cumulative = jnp.cumsum(left * _coefficient(right, counts - counts_of_left), axis=0)
        total = cumulative[-1]
        # Rounding must not lead past the last count that is possible.
        limit = uniform[num_nodes - 1 : 2 * num_nodes - 1] * total
        in_left = jnp.sum((cumulative <= limit) & (cumulative < total), axis=0)
        counts = jnp.stack([in_left, counts - in_left], axis=1)
        counts = counts.reshape(2 * num_nodes, *counts.shape[2:])
    return jnp.moveaxis(counts[: theta.shape[-1]], 0, -1).astype(theta.dtype)


def _depth(num_items: int) -> int:
    return (num_items - 1).bit_length()


def _shift(theta: Array, num_ones: int) -> Array:
    """c ``[*batch]``, at which about so many of independent bits of log-odds theta + c are one."""
    theta = jax.lax.stop_gradient(theta)
    num_items = theta.shape[-1]
    expected = min(max(num_ones, 0.5), num_items - 0.5)
    # Where it would lie if all were like the largest, and the way from there to the smallest.
    lower = math.log(expected / (num_items - expected)) - jnp.max(theta, axis=-1)
    width = jnp.max(theta, axis=-1) - jnp.min(theta, axis=-1)

    def halve(_, interval):  # type: ignore[no-untyped-def]
        lower, width = interval[0], interval[1] / 2
        middle = (lower + width)[..., None]
        is_higher = jnp.sum(jax.nn.sigmoid(theta + middle), axis=-1) < expected
        return lower + is_higher * width, width

    lower, width = jax.lax.fori_loop(0, _NUM_HALVINGS, halve, (lower, width))
    return lower + width / 2


def _tree(log_odds: Array, num_ones: int) -> list[Array]:
    """Coefficients ``[degree + 1, nodes, *batch]`` of every level below the root, items first."""
    depth = _depth(len(log_odds))
    missing = 2**depth - len(log_odds)
    is_one, is_zero = jax.nn.sigmoid(log_odds), jax.nn.sigmoid(-log_odds)
    never = jnp.zeros((missing, *log_odds.shape[1:]), log_odds.dtype)
    levels = [jnp.stack([jnp.concatenate([is_zero, never + 1]), jnp.concatenate([is_one, never])])]
    for _ in range(depth - 1):
        levels.append(_product(levels[-1][:, 0::2], levels[-1][:, 1::2], num_ones))
    return levels


def _root(levels: list[Array], num_ones: int) -> Array:
    """The coefficient of x^k in the product of all, ``[*batch]``."""
    level = levels[-1]
    if level.shape[1] == 1:  # of one item
        return level[num_ones, 0]
    lowest = max(num_ones + 1 - len(level), 0)
    factors = level[lowest : num_ones + 1]
    return jnp.sum(factors[:, 0] * jnp.flip(factors[:, 1], axis=0), axis=0)


def _product(left: Array, right: Array, num_ones: int) -> Array:
    """Coefficients, up to the power k, of the product of two polynomials of one degree."""
    size = len(left)
    padded = _padded(right, size - 1, size - 1)[: num_ones + size]
    return _correlate(padded, jnp.flip(left, axis=0))


def _padded(coefficients: Array, before: int, after: int) -> Array:
    """With so many zeros before and after them."""
    return jnp.pad(coefficients, [(before, after)] + [(0, 0)] * (coefficients.ndim - 1))


@jax.custom_vjp
def _correlate(long: Array, short: Array) -> Array:
    """The sums over i of ``long[j + i] * short[i]``, for each j at which all are there.

    Its derivatives are of its own kind, and twice as fast as those of a scan. The price: the
    marginals, and second derivatives of the normaliser, have none in forward mode.
    """
    number = len(long) - len(short) + 1

    # XLA sums over a first axis ten times as slowly as this, which also takes less memory.
    def add(total, terms):  # type: ignore[no-untyped-def]
        i, factor = terms
        return total + jax.lax.dynamic_slice_in_dim(long, i, number) * factor, None

    zeros = jnp.zeros_like(long[:number])
    return jax.lax.scan(add, zeros, (jnp.arange(len(short)), short))[0]


def _forward(long: Array, short: Array) -> tuple[Array, tuple[Array, Array]]:
    return _correlate(long, short), (long, short)


def _backward(factors: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    long, short = factors
    margin = len(short) - 1
    of_long = _correlate(_padded(gradient, margin, margin), jnp.flip(short, axis=0))
    return of_long, _correlate(long, gradient)


_correlate.defvjp(_forward, _backward)


def _coefficient(coefficients: Array, power: Array) -> Array:
    """The entry at ``power`` of the first axis, zero outside of it."""
    degree = len(coefficients) - 1
    is_inside = (power >= 0) & (power <= degree)
    shape = jnp.broadcast_shapes(coefficients.shape[1:], power.shape[1:])
    taken = jnp.take_along_axis(
        jnp.broadcast_to(coefficients, (degree + 1, *shape)),
        jnp.broadcast_to(jnp.clip(power, 0, degree), (len(power), *shape)),
        axis=0,
    )
    return jnp.where(is_inside, taken, 0.0)
