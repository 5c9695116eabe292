"""Leave-one-out sums of weights in O(K), exact where one particle holds nearly all the weight.

Notation: lw_k log-weights, LSE logsumexp over particles, v = softmax(lw) and
LOO_k = LSE over l != k. All control variates of the family are functions of v and of

    r_k = LSE - LOO_k = -log(1 - v_k)  >= 0.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Bool, Float


class LeaveOneOut(NamedTuple):
    """What every leave-one-out control variate is made of; each field is ``[K, *batch]``."""

    weights: Float[Array, " K *batch"]
    """v_k; zeros where every particle has zero weight."""
    log_ratio: Float[Array, " K *batch"]
    """r_k = LSE - LOO_k, finite: 0 where ``undefined``."""
    log_rest: Float[Array, " K *batch"]
    """LOO_k in the units of ``log_weights - shift``; 0 where ``undefined``."""
    shift: Float[Array, " *batch"]
    """The largest log-weight (0 where all are -inf)."""
    undefined: Bool[Array, " K *batch"]
    """True where all *other* particles have zero weight, so that LOO_k = -inf."""


def leave_one_out(log_weights: Float[Array, " K *batch"]) -> LeaveOneOut:
    """Compute v, r and LOO in O(K)."""
    largest = jnp.max(log_weights, axis=0)
    # Everything but the bound itself is invariant to a shift. Removing the largest log-weight
    # first keeps rounding relative to the spread of the weights, not to |lw| (hundreds of nats).
    shift = jnp.where(jnp.isneginf(largest), 0.0, largest)
    shifted = log_weights - shift
    lse = logsumexp(shifted, axis=0)
    weights = jnp.where(jnp.isneginf(lse), 0.0, jnp.exp(shifted - lse))

    # 1 - v_k loses every digit when one particle dominates; that particle (there can be only one
    # with v_k > 1/2) gets LOO_k by summing the others. log1p(-v_k) is accurate for the rest.
    particle = jnp.arange(log_weights.shape[0]).reshape((-1,) + (1,) * (log_weights.ndim - 1))
    is_argmax = particle == jnp.argmax(shifted, axis=0)
    dominates = is_argmax & (weights > 0.5)
    rest = logsumexp(jnp.where(is_argmax, -jnp.inf, shifted), axis=0)

    log_ratio = jnp.where(dominates, lse - rest, -jnp.log1p(-jnp.where(dominates, 0.0, weights)))
    log_rest = jnp.where(dominates, rest, lse - log_ratio)
    undefined = jnp.isneginf(log_rest)
    return LeaveOneOut(
        weights=weights,
        log_ratio=jnp.where(undefined, 0.0, log_ratio),
        log_rest=jnp.where(undefined, 0.0, log_rest),
        shift=shift,
        undefined=undefined,
    )


def log_ratio_minus_weight(loo: LeaveOneOut) -> Float[Array, " K *batch"]:
    r"""r_k - v_k = -log(1 - v_k) - v_k without cancellation for small v_k.

    The difference is :math:`v^2/2 + v^3/3 + \dots`; below the threshold the series to
    :math:`v^5` is closer than the difference of two nearly equal numbers.
    """
    v = loo.weights
    # Truncation is about v^4/3 and cancellation about 2 eps/v, relative: equal at (6 eps)^(1/5).
    threshold = (6 * float(jnp.finfo(v.dtype).eps)) ** 0.2
    series = v**2 * (1 / 2 + v * (1 / 3 + v * (1 / 4 + v / 5)))
    return jnp.where(v < threshold, series, loo.log_ratio - v)


def at_zero_weights(
    loo: LeaveOneOut, signal: Float[Array, " K *batch"]
) -> Float[Array, " K *batch"]:
    """Complete a learning signal where the weights leave its control variate undefined.

    Where all other particles have zero weight the control variate is -inf (and so is the expected
    bound, so there is no gradient to be unbiased for): the one particle that works is credited as
    in wake-phi, a_k = v_k = 1. Where all particles have zero weight, a_k = 0.
    """
    return jnp.where(loo.undefined, loo.weights, signal)


def tempered(log_weights: Float[Array, " K *batch"], alpha: float) -> Float[Array, " K *batch"]:
    """log w^(1 - alpha), where a weight of zero stays one at alpha = 1 too."""
    is_zero = jnp.isneginf(log_weights)
    return jnp.where(is_zero, -jnp.inf, (1.0 - alpha) * jnp.where(is_zero, 0.0, log_weights))
