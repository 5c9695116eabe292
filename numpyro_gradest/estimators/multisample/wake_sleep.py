"""Reweighted wake-sleep: the guide follows the posterior, not the bound.

Notation: v the self-normalised weights, h_k the gradient of log q(z_k | x).
"""

from jaxtyping import Array, Float

from numpyro_gradest.estimators.multisample._validation import as_log_weights
from numpyro_gradest.estimators.multisample.bounds import normalized_weights


def wake_phi_learning_signal(
    log_weights: Float[Array, " K *batch"],
) -> Float[Array, " K *batch"]:
    r"""Wake-phi learning signal of reweighted wake-sleep.

    .. math:: a_k = v_k

    :math:`\sum_k v_k h_k` estimates the gradient of
    :math:`-\mathrm{KL}(p(z|x) \,\|\, q(z|x))`, the inclusive divergence.

    Args:
        log_weights: Unnormalised log-weights in nats, shape ``[K, *batch]``, K >= 1.

    Returns:
        Detached learning signal, the full coefficient of h_k, shape ``[K, *batch]``. Zero where
        every weight is zero.

    Raises:
        TypeError: If ``log_weights`` is not of a floating dtype.
        ValueError: If ``log_weights`` has no particle axis.

    Bias and variance:
        Self-normalised, O(1/K), for the gradient of the inclusive divergence. It is not a gradient
        of the importance-weighted bound: do not rank it by signal-to-noise against those that are.

    Cost:
        O(K) time and memory per batch element.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> print(np.asarray(wake_phi_learning_signal(jnp.log(jnp.array([1.0, 3.0])))).round(4))
        [0.25 0.75]

    References:
        Bornschein and Bengio, `Reweighted Wake-Sleep <https://arxiv.org/abs/1406.2751>`_, 2015,
        section 2.3.
    """
    return normalized_weights(as_log_weights(log_weights, caller="wake_phi_learning_signal"))
