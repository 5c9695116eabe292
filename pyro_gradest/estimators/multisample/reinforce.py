"""Score function without a control variate.

Notation: L the importance-weighted bound, v the self-normalised weights, h_k the gradient of
log q(z_k | x) with respect to the guide's parameters.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_gradest.estimators.multisample._validation import as_log_weights
from pyro_gradest.estimators.multisample.bounds import iwae_bound, normalized_weights


def reinforce_learning_signal(
    log_weights: Float[Tensor, " K *batch"],
) -> Float[Tensor, " K *batch"]:
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
        >>> import torch
        >>> print(reinforce_learning_signal(torch.log(torch.tensor([1.0, 3.0]))))
        tensor([ 0.4431, -0.0569])

    References:
        Mnih and Rezende, `Variational Inference for Monte Carlo Objectives
        <https://arxiv.org/abs/1602.06725>`_, 2016, equation 8.
    """
    log_weights = as_log_weights(log_weights, caller="reinforce_learning_signal")
    bound = iwae_bound(log_weights)
    signal = bound - normalized_weights(log_weights)
    return signal.masked_fill(bound.isneginf(), 0.0)


def reinforce_leave_one_out_learning_signal(
    log_weights: Float[Tensor, " K *batch"],
) -> Float[Tensor, " K *batch"]:
    r"""Score-function learning signal of the ELBO, with the other particles for a baseline.

    .. math:: a_k = \frac1K \Big( \log w_k - \frac1{K-1} \sum_{l \ne k} \log w_l \Big)

    for the ELBO averaged over K draws. The derivative of log q in its own cost has mean zero and
    is left out, so that the gradient of the guide vanishes where it is the posterior.

    Args:
        log_weights: Unnormalised log-weights in nats, shape ``[K, *batch]``, K >= 2.

    Returns:
        Detached learning signal, the full coefficient of h_k, shape ``[K, *batch]``. Zeros where a
        weight is zero, as the ELBO is -inf.

    Raises:
        TypeError: If ``log_weights`` is not of a floating dtype.
        ValueError: If K < 2.

    Bias and variance:
        Unbiased for the gradient of the ELBO. The variance falls as 1/K.

    Cost:
        O(K) time and memory per batch element.

    Example:
        >>> import torch
        >>> log_weights = torch.log(torch.tensor([1.0, 3.0]))
        >>> print(reinforce_leave_one_out_learning_signal(log_weights))
        tensor([-0.5493,  0.5493])

    References:
        Kool, van Hoof and Welling, `Buy 4 REINFORCE Samples, Get a Baseline for Free!
        <https://openreview.net/forum?id=r1lgTGL5DE>`_, 2019, equation 8. Salimans and Knowles,
        `On Using Control Variates with Stochastic Approximation for Variational Bayes
        <https://arxiv.org/abs/1401.1022>`_, 2014, for the term left out.
    """
    caller = "reinforce_leave_one_out_learning_signal"
    log_weights = as_log_weights(log_weights, caller=caller, at_least=2)
    is_void = torch.any(torch.isneginf(log_weights), dim=0)
    log_weights = log_weights.masked_fill(is_void, 0.0)
    # Hundreds of nats that all particles share would round away what tells them apart.
    log_weights = log_weights - log_weights.amax(dim=0)
    return (log_weights - log_weights.mean(dim=0)) / (log_weights.shape[0] - 1)
