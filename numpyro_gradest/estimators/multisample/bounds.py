"""Multi-sample bounds and the weights that come with them.

Notation: lw_k = log p(x, z_k) - log q(z_k | x), K particles along axis 0.
"""

import math

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float

from numpyro_gradest.estimators.multisample._validation import as_log_weights


def iwae_bound(log_weights: Float[Array, " K *batch"]) -> Float[Array, " *batch"]:
    r"""Importance-weighted bound on the log-evidence.

    .. math:: L = \log \frac1K \sum_{k=1}^K w_k

    The expectation of L is a lower bound of :math:`\log p(x)`, and does not decrease with K. For
    K = 1 it is the ELBO.

    Args:
        log_weights: Unnormalised log-weights in nats, shape ``[K, *batch]``, K >= 1. Entries of
            -inf are particles of zero weight.

    Returns:
        The bound in nats, shape ``[*batch]``, in the dtype of ``log_weights``. Differentiable: its
        gradient is :func:`normalized_weights` (zero where every weight is zero and L = -inf).

    Raises:
        TypeError: If ``log_weights`` is not of a floating dtype.
        ValueError: If ``log_weights`` has no particle axis.

    Bias and variance:
        The value is a self-normalised, O(1/K) underestimate of the log-evidence.

    Cost:
        O(K) time and memory per batch element.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> print(np.asarray(iwae_bound(jnp.log(jnp.array([1.0, 3.0])))).round(4))  # log 2
        0.6931

    References:
        Burda, Grosse and Salakhutdinov, `Importance Weighted Autoencoders
        <https://arxiv.org/abs/1509.00519>`_, 2016, equation 8.
    """
    as_log_weights(log_weights, caller="iwae_bound")
    return _log_mean_exp(log_weights)


def renyi_bound(log_weights: Float[Array, " K *batch"], *, alpha: float) -> Float[Array, " *batch"]:
    r"""Variational Renyi bound of order alpha, by its K-sample estimate.

    .. math:: L_\alpha = \frac1{1-\alpha} \log \frac1K \sum_{k=1}^K w_k^{1-\alpha}

    ``alpha=0`` is the importance-weighted bound and ``alpha=1`` (by continuity) the average of the
    log-weights, which is the ELBO. In between, the expectation is a lower bound of the evidence.

    Args:
        log_weights: Unnormalised log-weights in nats, shape ``[K, *batch]``, K >= 1.
        alpha: Order of the divergence, a Python number.

    Returns:
        The bound in nats, shape ``[*batch]``, differentiable in ``log_weights``.

    Raises:
        TypeError: If ``log_weights`` is not of a floating dtype.
        ValueError: If ``log_weights`` has no particle axis, or ``alpha`` is not finite.

    Bias and variance:
        The value is a self-normalised, O(1/K) estimate of its limit in K.

    Cost:
        O(K) time and memory per batch element.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> log_weights = jnp.log(jnp.array([1.0, 3.0]))
        >>> print(np.asarray(renyi_bound(log_weights, alpha=1.0)).round(4))  # (log 1 + log 3) / 2
        0.5493

    References:
        Li and Turner, `Renyi Divergence Variational Inference
        <https://arxiv.org/abs/1602.02311>`_, 2016, equation 7.
    """
    as_log_weights(log_weights, caller="renyi_bound")
    if not math.isfinite(alpha):
        raise ValueError(f"renyi_bound needs a finite alpha, got {alpha}.")
    if alpha == 1:
        return jnp.mean(log_weights, axis=0)
    return _log_mean_exp((1.0 - alpha) * log_weights) / (1.0 - alpha)


def normalized_weights(log_weights: Float[Array, " K *batch"]) -> Float[Array, " K *batch"]:
    r"""Self-normalised importance weights.

    .. math:: v_k = w_k \Big/ \sum_{l=1}^K w_l

    They are the coefficients of :math:`\nabla \log p(x, z_k)` in every gradient of the
    importance-weighted bound.

    Args:
        log_weights: Unnormalised log-weights in nats, shape ``[K, *batch]``, K >= 1.

    Returns:
        Detached weights, shape ``[K, *batch]``, non-negative, summing to one over axis 0. Zeros
        where every weight is zero.

    Raises:
        TypeError: If ``log_weights`` is not of a floating dtype.
        ValueError: If ``log_weights`` has no particle axis.

    Bias and variance:
        Expectations under these weights are self-normalised, O(1/K).

    Cost:
        O(K) time and memory per batch element.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> print(np.asarray(normalized_weights(jnp.log(jnp.array([1.0, 3.0])))).round(4))
        [0.25 0.75]

    References:
        Burda, Grosse and Salakhutdinov, `Importance Weighted Autoencoders
        <https://arxiv.org/abs/1509.00519>`_, 2016, equation 14.
    """
    log_weights = as_log_weights(log_weights, caller="normalized_weights")
    all_zero = jnp.all(jnp.isneginf(log_weights), axis=0)
    weights = jax.nn.softmax(jnp.where(all_zero, 0.0, log_weights), axis=0)
    return jnp.where(all_zero, 0.0, weights)


def effective_sample_size(log_weights: Float[Array, " K *batch"]) -> Float[Array, " *batch"]:
    r"""Effective sample size of the importance weights.

    .. math:: \mathrm{ESS} = 1 \Big/ \sum_{k=1}^K v_k^2

    K where all weights are equal, 1 where one particle holds all the weight, 0 where all weights
    are zero.

    Args:
        log_weights: Unnormalised log-weights in nats, shape ``[K, *batch]``, K >= 1.

    Returns:
        Detached effective number of particles, shape ``[*batch]``, between 1 and K.

    Raises:
        TypeError: If ``log_weights`` is not of a floating dtype.
        ValueError: If ``log_weights`` has no particle axis.

    Bias and variance:
        A self-normalised, O(1/K) estimate of the effective size in the limit of many particles.

    Cost:
        O(K) time and memory per batch element.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> print(np.asarray(effective_sample_size(jnp.log(jnp.array([1.0, 3.0])))).round(4))
        1.6

    References:
        Kong, `A note on importance sampling using standardized weights
        <https://galton.uchicago.edu/techreports/tr348.pdf>`_, 1992.
    """
    as_log_weights(log_weights, caller="effective_sample_size")
    sum_of_squares = jnp.sum(normalized_weights(log_weights) ** 2, axis=0)
    return jnp.where(sum_of_squares > 0, 1 / jnp.where(sum_of_squares > 0, sum_of_squares, 1), 0)


def _log_mean_exp(log_weights: Float[Array, " K *batch"]) -> Float[Array, " *batch"]:
    # The derivative of logsumexp is 0/0 where every entry is -inf; keep it away from there.
    all_zero = jnp.all(jnp.isneginf(log_weights), axis=0)
    finite = logsumexp(jnp.where(all_zero, 0.0, log_weights), axis=0)
    return jnp.where(all_zero, -jnp.inf, finite - math.log(log_weights.shape[0]))
