"""Variational Renyi (VR-IWAE) bound: the coefficients of its gradient.

Notation follows Daudel et al. (2023): lw_k log-weights, beta = 1 - alpha,
L_alpha = [LSE(beta lw) - log K] / beta, v the normalised weights of beta lw, LOO_k the logsumexp of
all beta lw but the k-th, r_k = LSE(beta lw) - LOO_k, h_k the gradient of log q(z_k | x).
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_gradest.estimators.multisample._leave_one_out import (
    at_zero_weights,
    leave_one_out,
    tempered,
)
from numpyro_gradest.estimators.multisample._validation import as_log_weights, check_alpha
from numpyro_gradest.estimators.multisample.bounds import normalized_weights
from numpyro_gradest.estimators.multisample.ovis import ovis_gamma_learning_signal
from numpyro_gradest.estimators.multisample.reinforce import reinforce_learning_signal
from numpyro_gradest.estimators.multisample.vimco import vimco_learning_signal

_CONTROL_VARIATES = ("none", "geometric", "arithmetic", "asymptotic")


def renyi_weights(
    log_weights: Float[Array, " K *batch"], *, alpha: float
) -> Float[Array, " K *batch"]:
    r"""Normalised weights of the variational Renyi bound.

    .. math:: \tilde v_k = w_k^{1-\alpha} \Big/ \sum_{l=1}^K w_l^{1-\alpha}

    They are the coefficients of :math:`\nabla \log p(x, z_k)` in the bound's gradient: between the
    self-normalised weights at ``alpha=0`` and 1/K at ``alpha=1``.

    Args:
        log_weights: Unnormalised log-weights in nats, shape ``[K, *batch]``, K >= 1.
        alpha: Order of the bound, between 0 (importance-weighted) and 1 (ELBO).

    Returns:
        Detached weights, shape ``[K, *batch]``, summing to one over axis 0. A particle of zero
        weight has none at any order. Zeros where every weight is zero.

    Raises:
        TypeError: If ``log_weights`` is not of a floating dtype.
        ValueError: If ``log_weights`` has no particle axis, or ``alpha`` is not in [0, 1].

    Bias and variance:
        Unbiased as coefficients of the gradient of the K-sample bound of order alpha.

    Cost:
        O(K) time and memory per batch element.

    Example:
        >>> import jax.numpy as jnp
        >>> print(renyi_weights(jnp.log(jnp.array([1.0, 9.0])), alpha=0.5).round(4))
        [0.25 0.75]

    References:
        Daudel, Benton, Shi and Doucet, `Alpha-divergence Variational Inference Meets Importance
        Weighted Auto-Encoders <https://arxiv.org/abs/2210.06226>`_, 2023, section 3.
    """
    check_alpha("renyi_weights", alpha)
    log_weights = as_log_weights(log_weights, caller="renyi_weights")
    return normalized_weights(tempered(log_weights, alpha))


def renyi_learning_signal(
    log_weights: Float[Array, " K *batch"],
    *,
    alpha: float,
    control_variate: str = "asymptotic",
) -> Float[Array, " K *batch"]:
    r"""Learning signal of the variational Renyi bound.

    .. math::
        a_k = L_\alpha - \tilde v_k - c_k, \qquad
        L_\alpha = \frac1{1-\alpha} \log \frac1K \sum_{k=1}^K w_k^{1-\alpha}

    with the control variate c_k of VIMCO, by the geometric or the arithmetic mean of the other
    :math:`w_l^{1-\alpha}`; or with the asymptotically optimal one of OVIS, which is the arithmetic
    one plus :math:`\log(1 - \tfrac1K)`:

    .. math::
        a_k = \frac{r_k - \alpha r}{1-\alpha} - \tilde v_k, \qquad
        r_k = -\log(1 - \tilde v_k), \quad r = -\log(1 - \tfrac1K)

    At ``alpha=0`` these are the signals of the importance-weighted bound, and at ``alpha=1`` their
    limits: each particle's log-weight minus the mean of the others, over K, up to a constant.

    Args:
        log_weights: Unnormalised log-weights in nats, shape ``[K, *batch]``, K >= 2 (K >= 1 with
            no control variate).
        alpha: Order of the bound, between 0 (importance-weighted) and 1 (ELBO).
        control_variate: ``"none"``, ``"geometric"``, ``"arithmetic"`` or ``"asymptotic"``.

    Returns:
        Detached learning signal, the full coefficient of h_k, shape ``[K, *batch]``. Finite for
        any weights: where all others are zero it is that of wake-phi, 1.

    Raises:
        TypeError: If ``log_weights`` is not of a floating dtype.
        ValueError: If there are too few particles, or an option makes no sense.

    Bias and variance:
        Unbiased for the gradient of the K-sample bound of order alpha, with each of them. With
        none the variance grows with the offset of the bound.

    Cost:
        O(K) time and memory per batch element.

    Example:
        >>> import jax.numpy as jnp
        >>> print(renyi_learning_signal(jnp.log(jnp.array([1.0, 9.0])), alpha=0.5).round(4))
        [-0.3678  1.3294]

    References:
        Daudel, Benton, Shi and Doucet, `Alpha-divergence Variational Inference Meets Importance
        Weighted Auto-Encoders <https://arxiv.org/abs/2210.06226>`_, 2023, for the bound. The
        constant r of the asymptotic form stands for its first order 1/K, which would make the
        variance infinite as alpha goes to 1; any constant leaves the expectation alone.
    """
    caller = "renyi_learning_signal"
    check_alpha(caller, alpha)
    if control_variate not in _CONTROL_VARIATES:
        raise ValueError(
            f"{caller} needs control_variate as one of {_CONTROL_VARIATES}, got "
            f"{control_variate!r}."
        )
    at_least = 1 if control_variate == "none" else 2
    log_weights = as_log_weights(log_weights, caller=caller, at_least=at_least)
    num_particles = log_weights.shape[0]
    if alpha == 1:
        return _limit_at_one(log_weights, control_variate)
    powers = tempered(log_weights, alpha)
    constant = 0.0
    if control_variate == "none":
        signal = reinforce_learning_signal(powers)
    elif control_variate == "asymptotic":
        signal = ovis_gamma_learning_signal(powers)
        constant = math.log1p(-1 / num_particles)
    else:
        signal = vimco_learning_signal(powers, leave_one_out=control_variate)
    if alpha == 0:
        return signal
    # The bound and its control variate are those of the tempered weights over 1 - alpha; v is not.
    loo = leave_one_out(powers)
    signal = signal + alpha / (1 - alpha) * (signal + loo.weights + constant)
    if control_variate == "none":
        return jnp.where(jnp.all(jnp.isneginf(log_weights), axis=0), 0.0, signal)
    return at_zero_weights(loo, signal)


def _limit_at_one(
    log_weights: Float[Array, " K *batch"], control_variate: str
) -> Float[Array, " K *batch"]:
    num_particles = log_weights.shape[0]
    is_zero = jnp.isneginf(log_weights)
    log_weights = jnp.where(is_zero, 0.0, log_weights)
    # Hundreds of nats that all particles share would round away what tells them apart.
    shift = log_weights.max(axis=0)
    mean = (log_weights - shift).mean(axis=0)
    if control_variate == "none":
        signal = shift + mean - 1 / num_particles + jnp.zeros_like(log_weights)
    else:
        # Minus the mean of the others, over K: (lw - mean) / (K - 1).
        signal = (log_weights - shift - mean) / (num_particles - 1) - 1 / num_particles
        if control_variate == "asymptotic":
            signal = signal - math.log1p(-1 / num_particles)
    # With a weight of zero the average is -inf: there is nothing to follow.
    return jnp.where(jnp.any(is_zero, axis=0), 0.0, signal)
