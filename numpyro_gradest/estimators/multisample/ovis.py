"""OVIS: control variates that minimise the variance of each particle's score-function term.

Notation follows Lievin et al. (2020): d_k = L - v_k is the prefactor before any control variate
and c_k the control variate; v are the self-normalised weights, h_k the gradient of log q(z_k | x)
and LOO_k the logsumexp of all log-weights but the k-th. Our coefficient is a_k = d_k - c_k.
"""

import math

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float

from numpyro_gradest.estimators.multisample._leave_one_out import (
    at_zero_weights,
    leave_one_out,
    log_ratio_minus_weight,
    tempered,
)
from numpyro_gradest.estimators.multisample._validation import as_log_weights, check_alpha


def ovis_gamma_learning_signal(
    log_weights: Float[Array, " K *batch"], *, gamma: float = 0.0
) -> Float[Array, " K *batch"]:
    r"""OVIS learning signal with the asymptotic control variate.

    .. math::
        a_k = \log\big(1 - \tfrac1K\big) - \log(1 - v_k)
              - (1 - \gamma) \big[ v_k + \log\big(1 - \tfrac1K\big) \big]

    ``gamma=0`` is the limit of the optimal control variate for many particles,
    :math:`a_k = -\log(1 - v_k) - v_k \ge 0`; ``gamma=1`` adds the wake-phi gradient
    :math:`\sum_k v_k h_k` to it, which helps where the effective sample size is near one.

    Args:
        log_weights: Unnormalised log-weights in nats, shape ``[K, *batch]``, K >= 2.
        gamma: Weight of the wake-phi term, between 0 and 1.

    Returns:
        Detached learning signal, the full coefficient of h_k, shape ``[K, *batch]``. Finite for
        any weights: where all other particles have zero weight the signal is that of
            wake-phi, 1.

    Raises:
        TypeError: If ``log_weights`` is not of a floating dtype.
        ValueError: If K < 2, or ``gamma`` is not between 0 and 1.

    Bias and variance:
        Unbiased for ``gamma=0``, and the signal-to-noise ratio of the guide's gradient grows, as
        sqrt(K) in the limit of many particles. Otherwise biased by design, by ``gamma`` times the
        expected wake-phi gradient (the constant log(1 - 1/K) multiplies a score of mean zero).

    Cost:
        O(K) time and memory per batch element.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> print(np.asarray(ovis_gamma_learning_signal(jnp.log(jnp.array([1.0, 3.0])))).round(4))
        [0.0377 0.6363]

    References:
        Lievin, Dittadi, Christensen and Winther, `Optimal Variance Control of the Score Function
        Gradient Estimator for Importance Weighted Bounds <https://arxiv.org/abs/2008.01998>`_,
        2020, section 4. The authors' code clamps 1 - v_k by a constant, which caps the signal of a
        dominating particle; this one is exact.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"ovis_gamma_learning_signal needs 0 <= gamma <= 1, got {gamma}.")
    log_weights = as_log_weights(log_weights, caller="ovis_gamma_learning_signal", at_least=2)
    loo = leave_one_out(log_weights)
    # The same formula with the terms that nearly cancel grouped: (r - v) + gamma (v + log(1-1/K)).
    wake_phi = loo.weights + math.log1p(-1 / log_weights.shape[0])
    signal = log_ratio_minus_weight(loo) + (gamma * wake_phi if gamma else 0.0)
    return at_zero_weights(loo, signal)


def ovis_mc_learning_signal(
    log_weights: Float[Array, " K *batch"],
    auxiliary_log_weights: Float[Array, " S *batch"],
    *,
    alpha: float = 0.0,
) -> Float[Array, " K *batch"]:
    r"""OVIS learning signal with the Monte Carlo control variate.

    The control variate is the expected prefactor of particle k given the others, estimated with S
    auxiliary draws :math:`z_s \sim q` that stand in for particle k:

    .. math::
        c_k = \frac1S \sum_{s=1}^S \Big[ T_{ks} - \log K - e^{\log w_s - T_{ks}} \Big],
        \qquad T_{ks} = \log\Big(w_s + \sum_{l \ne k} w_l\Big),
        \qquad a_k = L - v_k - c_k

    For the variational Renyi bound of order alpha all weights are raised to the power
    :math:`1 - \alpha`, and the bounds, L and :math:`T_{ks} - \log K`, divided by it. As alpha goes
    to 1, :math:`a_k` goes to the mean over s of :math:`(\log w_k - \log w_s) / K`.

    Args:
        log_weights: Unnormalised log-weights in nats, shape ``[K, *batch]``, K >= 2.
        auxiliary_log_weights: Log-weights of S >= 1 further independent draws from the guide,
            shape ``[S, *batch]``. They enter the control variate only.
        alpha: Order of the bound, between 0 (importance-weighted) and 1 (ELBO).

    Returns:
        Detached learning signal, the full coefficient of h_k, shape ``[K, *batch]``.

    Raises:
        TypeError: If either array is not of a floating dtype.
        ValueError: If K < 2, S < 1, the batch shapes differ, or ``alpha`` is not in [0, 1].

    Bias and variance:
        Unbiased for every S, at any order. At order 0 the variance is below that of the asymptotic
        form for few particles, and falls with S.

    Cost:
        O(K S) time and memory per batch element, and S more evaluations of model and guide
        without gradient.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> log_weights, auxiliary = jnp.log(jnp.array([1.0, 3.0])), jnp.log(jnp.array([2.0]))
        >>> print(np.asarray(ovis_mc_learning_signal(log_weights, auxiliary)).round(4))
        [-0.0731  0.2043]

    References:
        Lievin, Dittadi, Christensen and Winther, `Optimal Variance Control of the Score Function
        Gradient Estimator for Importance Weighted Bounds <https://arxiv.org/abs/2008.01998>`_,
        2020, section 4. The authors' code forms a tensor of S x K x K; this one needs S x K.
        Daudel, Benton, Shi and Doucet, `Alpha-divergence Variational Inference Meets Importance
        Weighted Auto-Encoders <https://arxiv.org/abs/2210.06226>`_, 2023, for other orders.
    """
    caller = "ovis_mc_learning_signal"
    check_alpha(caller, alpha)
    log_weights = as_log_weights(log_weights, caller=caller, at_least=2)
    auxiliary = as_log_weights(auxiliary_log_weights, caller=caller, name="auxiliary_log_weights")
    if auxiliary.shape[1:] != log_weights.shape[1:]:
        raise ValueError(
            f"{caller} needs auxiliary_log_weights of shape [S, *batch] with the batch shape of "
            f"log_weights, got {auxiliary.shape} and {log_weights.shape}."
        )
    if alpha == 1:
        return _monte_carlo_at_one(log_weights, auxiliary)
    log_weights, auxiliary = tempered(log_weights, alpha), tempered(auxiliary, alpha)
    loo = leave_one_out(log_weights)

    # [S, K, *batch]: with x = log w_s - LOO_k, the prefactor before the control variate exceeds
    # the one of draw s by LSE - T_ks, which is r_k - softplus(x) or, seen from the other side,
    # (LSE - log w_s) - softplus(-x): whichever keeps both terms small.
    log_aux = (auxiliary - loo.shift)[:, None]
    alone = loo.undefined & (jnp.isneginf(log_aux) | (loo.weights == 0))
    x = jnp.where(loo.undefined, jnp.inf, log_aux - loo.log_rest)
    below = loo.log_ratio - jax.nn.softplus(jnp.minimum(x, 0.0))
    log_sum = logsumexp(log_weights - loo.shift, axis=0)
    above = log_sum - log_aux - jax.nn.softplus(-jnp.maximum(x, 0.0))
    excess = jnp.where(x > 0, above, below) / (1 - alpha)
    signal = excess + jax.nn.sigmoid(x) - loo.weights
    return jnp.mean(at_zero_weights(loo._replace(undefined=alone), signal), axis=0)


def _monte_carlo_at_one(
    log_weights: Float[Array, " K *batch"], auxiliary: Float[Array, " S *batch"]
) -> Float[Array, " K *batch"]:
    """The limit, (lw_k - mean of lw_s) / K, over the draws that have weight."""
    is_zero, is_missing = jnp.isneginf(log_weights), jnp.isneginf(auxiliary)
    # Hundreds of nats that all particles share would round away what tells them apart.
    shift = log_weights.max(axis=0)
    shift = jnp.where(jnp.isneginf(shift), 0.0, shift)
    excess = jnp.where(is_missing, 0.0, auxiliary - shift).mean(axis=0)
    share = 1 - is_missing.astype(log_weights.dtype).mean(axis=0)
    signal = (share * jnp.where(is_zero, 0.0, log_weights - shift) - excess) / len(log_weights)
    # With a weight of zero the average is -inf: there is nothing to follow.
    return jnp.where(jnp.any(is_zero, axis=0), 0.0, signal)
