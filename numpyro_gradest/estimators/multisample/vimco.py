"""VIMCO: leave-one-out control variates for multi-sample objectives.

Notation: L the importance-weighted bound, v the self-normalised weights, h_k the gradient of
log q(z_k | x), LOO_k the logsumexp of all log-weights but the k-th.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_gradest.estimators.multisample._leave_one_out import (
    at_zero_weights,
    log_ratio_minus_weight,
)
from numpyro_gradest.estimators.multisample._leave_one_out import (
    leave_one_out as _leave_one_out,
)
from numpyro_gradest.estimators.multisample._validation import as_log_weights


def vimco_learning_signal(
    log_weights: Float[Array, " K *batch"], *, leave_one_out: str = "geometric"
) -> Float[Array, " K *batch"]:
    r"""VIMCO learning signal with leave-one-out control variates.

    For particle k the control variate is the bound with :math:`w_k` replaced by a mean of the
    other weights, which does not depend on :math:`z_k`:

    .. math::
        a_k = L - v_k - \log \frac1K \Big( \hat w_{-k} + \sum_{l \ne k} w_l \Big)

    where :math:`\hat w_{-k}` is the geometric mean of the others (the paper's choice) or their
    arithmetic mean. With the latter
    :math:`a_k = -\log(1 - v_k) - v_k + \log(1 - \tfrac1K)`.

    Args:
        log_weights: Unnormalised log-weights in nats, shape ``[K, *batch]``, K >= 2.
        leave_one_out: ``"geometric"`` or ``"arithmetic"``, the mean that stands for the particle
            left out.

    Returns:
        Detached learning signal, the full coefficient of h_k (the paper's signal minus v_k), shape
        ``[K, *batch]``. Finite for any weights: where all other particles have zero weight the
        control variate is -inf and none is used.

    Raises:
        TypeError: If ``log_weights`` is not of a floating dtype.
        ValueError: If K < 2, or ``leave_one_out`` is neither of the two.

    Bias and variance:
        Unbiased, with either mean. The signal-to-noise ratio of the guide's gradient falls, as
        1/sqrt(K) in the limit of many particles.

    Cost:
        O(K) time and memory per batch element.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> print(np.asarray(vimco_learning_signal(jnp.log(jnp.array([1.0, 3.0])))).round(4))
        [-0.6555 -0.0569]

    References:
        Mnih and Rezende, `Variational Inference for Monte Carlo Objectives
        <https://arxiv.org/abs/1602.06725>`_, 2016, equations 10 to 12.
    """
    if leave_one_out not in ("geometric", "arithmetic"):
        raise ValueError(
            f'vimco_learning_signal needs leave_one_out="geometric" or "arithmetic", '
            f"got {leave_one_out!r}."
        )
    log_weights = as_log_weights(log_weights, caller="vimco_learning_signal", at_least=2)
    num_particles = log_weights.shape[0]
    loo = _leave_one_out(log_weights)
    if leave_one_out == "arithmetic":
        signal = log_ratio_minus_weight(loo) + math.log1p(-1 / num_particles)
    else:
        # L - control variate = LSE - logaddexp(LOO_k, mean_k) = r_k - softplus(mean_k - LOO_k)
        log_mean = _mean_of_others(log_weights - loo.shift)
        signal = log_ratio_minus_weight(loo) - jax.nn.softplus(log_mean - loo.log_rest)
    return at_zero_weights(loo, signal)


def _mean_of_others(log_weights: Float[Array, " K *batch"]) -> Float[Array, " K *batch"]:
    """Mean of the log-weights over l != k, which is -inf where any of the others is."""
    is_zero = jnp.isneginf(log_weights)
    finite = jnp.where(is_zero, 0.0, log_weights)
    mean = (jnp.sum(finite, axis=0) - finite) / (log_weights.shape[0] - 1)
    others_have_zero = (jnp.sum(is_zero, axis=0) - is_zero.astype(int)) > 0
    return jnp.where(others_have_zero, -jnp.inf, mean)
