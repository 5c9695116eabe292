"""Multi-sample bounds and the weights that come with them.

Notation: lw_k = log p(x, z_k) - log q(z_k | x), K particles along dim 0.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_gradest.estimators.multisample._validation import as_log_weights


def iwae_bound(log_weights: Float[Tensor, " K *batch"]) -> Float[Tensor, " *batch"]:
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
        >>> import torch
        >>> print(iwae_bound(torch.log(torch.tensor([1.0, 3.0]))))  # log 2
        tensor(0.6931)

    References:
        Burda, Grosse and Salakhutdinov, `Importance Weighted Autoencoders
        <https://arxiv.org/abs/1509.00519>`_, 2016, equation 8.
    """
    as_log_weights(log_weights, caller="iwae_bound")
    return _log_mean_exp(log_weights)


def renyi_bound(
    log_weights: Float[Tensor, " K *batch"], *, alpha: float
) -> Float[Tensor, " *batch"]:
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
        >>> import torch
        >>> log_weights = torch.log(torch.tensor([1.0, 3.0]))
        >>> print(renyi_bound(log_weights, alpha=1.0))  # (log 1 + log 3) / 2
        tensor(0.5493)

    References:
        Li and Turner, `Renyi Divergence Variational Inference
        <https://arxiv.org/abs/1602.02311>`_, 2016, equation 7.
    """
    as_log_weights(log_weights, caller="renyi_bound")
    if not math.isfinite(alpha):
        raise ValueError(f"renyi_bound needs a finite alpha, got {alpha}.")
    if alpha == 1:
        return torch.mean(log_weights, dim=0)
    return _log_mean_exp((1.0 - alpha) * log_weights) / (1.0 - alpha)


def normalized_weights(log_weights: Float[Tensor, " K *batch"]) -> Float[Tensor, " K *batch"]:
    r"""Self-normalised importance weights.

    .. math:: v_k = w_k \Big/ \sum_{l=1}^K w_l

    They are the coefficients of :math:`\nabla \log p(x, z_k)` in every gradient of the
    importance-weighted bound.

    Args:
        log_weights: Unnormalised log-weights in nats, shape ``[K, *batch]``, K >= 1.

    Returns:
        Detached weights, shape ``[K, *batch]``, non-negative, summing to one over dim 0. Zeros
        where every weight is zero.

    Raises:
        TypeError: If ``log_weights`` is not of a floating dtype.
        ValueError: If ``log_weights`` has no particle axis.

    Bias and variance:
        Expectations under these weights are self-normalised, O(1/K).

    Cost:
        O(K) time and memory per batch element.

    Example:
        >>> import torch
        >>> print(normalized_weights(torch.log(torch.tensor([1.0, 3.0]))))
        tensor([0.2500, 0.7500])

    References:
        Burda, Grosse and Salakhutdinov, `Importance Weighted Autoencoders
        <https://arxiv.org/abs/1509.00519>`_, 2016, equation 14.
    """
    log_weights = as_log_weights(log_weights, caller="normalized_weights")
    all_zero = torch.all(torch.isneginf(log_weights), dim=0)
    return torch.softmax(log_weights, dim=0).masked_fill(all_zero, 0.0)


def effective_sample_size(log_weights: Float[Tensor, " K *batch"]) -> Float[Tensor, " *batch"]:
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
        >>> import torch
        >>> print(effective_sample_size(torch.log(torch.tensor([1.0, 3.0]))))
        tensor(1.6000)

    References:
        Kong, `A note on importance sampling using standardized weights
        <https://galton.uchicago.edu/techreports/tr348.pdf>`_, 1992.
    """
    as_log_weights(log_weights, caller="effective_sample_size")
    sum_of_squares = torch.sum(normalized_weights(log_weights) ** 2, dim=0)
    return torch.where(sum_of_squares > 0, 1 / sum_of_squares, 0.0)


def _log_mean_exp(log_weights: Float[Tensor, " K *batch"]) -> Float[Tensor, " *batch"]:
    # The derivative of logsumexp is 0/0 where every entry is -inf; keep it away from there.
    all_zero = torch.all(torch.isneginf(log_weights), dim=0)
    finite = torch.logsumexp(log_weights.masked_fill(all_zero, 0.0), dim=0)
    return (finite - math.log(log_weights.shape[0])).masked_fill(all_zero, -torch.inf)
