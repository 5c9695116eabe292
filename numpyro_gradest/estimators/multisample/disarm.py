"""DisARM: antithetic pairs of Bernoulli draws in the place of independent ones.

Notation follows Dong, Mnih and Tucker (2020): logits alpha, b = 1[u < sigma(alpha)] and its partner
b~ = 1[1 - u < sigma(alpha)], of one uniform u; f the bound as a function of one particle, the
others given.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real

from numpyro_gradest.estimators.multisample._leave_one_out import LeaveOneOut, leave_one_out
from numpyro_gradest.estimators.multisample._validation import as_log_weights


def antithetic_probs(
    values: Real[Array, " *shape"], logits: Float[Array, " *shape"]
) -> Float[Array, " *shape"]:
    r"""Probability that the antithetic partner of a Bernoulli draw is one.

    .. math:: P(\tilde b = 1 \mid b = 0) = \min(1, e^\alpha), \qquad
        P(\tilde b = 1 \mid b = 1) = \max(0, 1 - e^{-\alpha})

    A partner drawn with it has the law of b, and differs from b as often as any such draw can.

    Args:
        values: Draws of ``Bernoulli(logits)``, zeros and ones.
        logits: Their log-odds.

    Returns:
        Detached probabilities, one for each draw.

    Bias and variance:
        Unbiased: the law of the partner is that of the draw.

    Cost:
        O(1) per draw.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> logits = jnp.log(jnp.array([0.25, 0.25, 3.0, 3.0]))
        >>> print(np.asarray(antithetic_probs(jnp.array([0, 1, 0, 1]), logits)).round(4))
        [0.25   0.     1.     0.6667]

    References:
        Dong, Mnih and Tucker, `DisARM: An Antithetic Gradient Estimator for Binary Latent Variables
        <https://arxiv.org/abs/2006.10680>`_, 2020, section 3.1.
    """
    logits = jax.lax.stop_gradient(logits)
    of_zero = jnp.exp(jnp.minimum(logits, 0.0))
    of_one = -jnp.expm1(-jnp.maximum(logits, 0.0))
    return jnp.where(values == 1, of_one, of_zero)


def antithetic_score(
    values: Real[Array, " *shape"],
    partners: Real[Array, " *shape"],
    logits: Float[Array, " *shape"],
) -> Float[Array, " *shape"]:
    r"""What stands for the derivative of log q in the logits at an antithetic pair.

    .. math:: (b - \tilde b) \, \sigma(|\alpha|)

    Times half the difference of any f at the two it is DisARM's estimate of the derivative of E f
    in the logits. The bits of a vector may be drawn together.

    Args:
        values: Draws of ``Bernoulli(logits)``, zeros and ones.
        partners: Their antithetic partners.
        logits: Their log-odds.

    Returns:
        Detached coefficients of the logits' gradients. Zero where the two draws agree.

    Bias and variance:
        Unbiased. For one bit the variance is below that of leave-one-out REINFORCE with two
        independent draws.

    Cost:
        O(1) per draw.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> values, partners = jnp.array([1, 0, 1]), jnp.array([0, 1, 1])
        >>> logits = jnp.log(jnp.array([3.0, 0.25, 3.0]))
        >>> print(np.asarray(antithetic_score(values, partners, logits)).round(4))
        [ 0.75 -0.8   0.  ]

    References:
        Dong, Mnih and Tucker, `DisARM: An Antithetic Gradient Estimator for Binary Latent Variables
        <https://arxiv.org/abs/2006.10680>`_, 2020, section 3.1. Yin, Ho, Yan, Qian and Zhou,
        `Probabilistic Best Subset Selection via Gradient-Based Optimization
        <https://arxiv.org/abs/2006.06448>`_, 2020, found the same.
    """
    logits = jax.lax.stop_gradient(logits)
    return (values - partners) * jax.nn.sigmoid(jnp.abs(logits))


def disarm_learning_signal(
    log_weights: Float[Array, " K *batch"], partner_log_weights: Float[Array, "..."]
) -> Float[Array, " K *batch"]:
    r"""Learning signal of antithetic pairs for the importance-weighted bound.

    .. math::
        a_k = \tfrac14 \big[ L(b_k, b_{-k}) - L(\tilde b_k, b_{-k})
            + L(b_k, \tilde b_{-k}) - L(\tilde b_k, \tilde b_{-k}) \big]

    with L the bound of K particles, and the others taken once from the draws and once from their
    partners. It multiplies :func:`antithetic_score`, not the derivative of log q. For K = 1 it is
    half the difference of the two log-weights, and the bound the ELBO.

    Args:
        log_weights: Unnormalised log-weights in nats, shape ``[K, *batch]``, K >= 1.
        partner_log_weights: Those of the particles' antithetic partners.

    Returns:
        Detached learning signal, shape ``[K, *batch]``. Finite for any weights: a difference in
        which a bound is -inf counts for nothing.

    Raises:
        TypeError: If log-weights are not of a floating dtype.
        ValueError: If log-weights have no particle axis, or the shapes differ.

    Bias and variance:
        Unbiased for the gradient of the K-sample bound in the logits, together with the derivative
        of the bound through its own log q.

    Cost:
        O(K) time and memory per batch element.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> weights, partners = jnp.array([1.0, 3.0]), jnp.array([2.0, 3.0])
        >>> signal = disarm_learning_signal(jnp.log(weights), jnp.log(partners))
        >>> print(np.asarray(signal).round(4))
        [-0.1116  0.    ]

    References:
        Dong, Mnih and Tucker, `DisARM: An Antithetic Gradient Estimator for Binary Latent Variables
        <https://arxiv.org/abs/2006.10680>`_, 2020, for the pairs and the bound over several
        particles. Taking the others from both sides is the average of two estimates with the same
        law, and costs nothing.
    """
    caller = "disarm_learning_signal"
    first = as_log_weights(log_weights, caller=caller)
    partner = as_log_weights(partner_log_weights, caller=caller, name="partner_log_weights")
    if first.shape != partner.shape:
        raise ValueError(
            f"{caller} needs a partner for each particle, got log_weights of shape {first.shape} "
            f"and partner_log_weights of shape {partner.shape}. Pass two of the same shape."
        )
    # Rounding is then relative to the spread of the weights, not to hundreds of nats all share.
    shift = jnp.maximum(first, partner).max(axis=0)
    shift = jnp.where(jnp.isneginf(shift), 0.0, shift)
    first, partner = first - shift, partner - shift
    given_first, given_partner = (
        _credit(leave_one_out(others), first, partner) for others in (first, partner)
    )
    return (given_first + given_partner) / 4


def _credit(
    others: LeaveOneOut, first: Float[Array, " K *batch"], partner: Float[Array, " K *batch"]
) -> Float[Array, " K *batch"]:
    """How much more the bound is with the first than with its partner, the others given."""
    rest = others.log_rest + others.shift
    credit = jnp.logaddexp(first - rest, 0.0) - jnp.logaddexp(partner - rest, 0.0)
    has_weight = ~(jnp.isneginf(first) | jnp.isneginf(partner))
    alone = jnp.where(has_weight, first, 0.0) - jnp.where(has_weight, partner, 0.0)
    return jnp.where(others.undefined, alone, credit)
