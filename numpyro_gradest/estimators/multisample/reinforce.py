"""Score function without a control variate.

Notation: L the importance-weighted bound, v the self-normalised weights, h_k the gradient of
log q(z_k | x) with respect to the guide's parameters.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_gradest.estimators.multisample._validation import as_log_weights
from numpyro_gradest.estimators.multisample.bounds import iwae_bound, normalized_weights


def reinforce_learning_signal(
    log_weights: Float[Array, " K *batch"],
) -> Float[Array, " K *batch"]:
    r"""Plain score-function learning signal of the importance-weighted bound.

    .. math:: a_k = L - v_k

    so that :math:`\sum_k a_k h_k` is the guide's gradient of L: every particle is credited with
    the whole bound, and -v_k is the derivative of L through its own weight. For K = 1 this is the
    REINFORCE estimator of the ELBO.

    Args:
        log_weights: Unnormalised log-weights in nats, shape ``[K, *batch]``, K >= 1.

    Returns:
        Detached learning signal, the full coefficient of h_k, shape ``[K, *batch]``. Zero where
        every weight is zero.

    Raises:
        TypeError: If ``log_weights`` is not of a floating dtype.
        ValueError: If ``log_weights`` has no particle axis.

    Bias and variance:
        Unbiased. The variance grows with K and with the offset of L: use it as a baseline to
        compare with, not to train.

    Cost:
        O(K) time and memory per batch element.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> print(np.asarray(reinforce_learning_signal(jnp.log(jnp.array([1.0, 3.0])))).round(4))
        [ 0.4431 -0.0569]

    References:
        Mnih and Rezende, `Variational Inference for Monte Carlo Objectives
        <https://arxiv.org/abs/1602.06725>`_, 2016, equation 8.
    """
    log_weights = as_log_weights(log_weights, caller="reinforce_learning_signal")
    bound = iwae_bound(log_weights)
    return jnp.where(jnp.isneginf(bound), 0.0, bound - normalized_weights(log_weights))
