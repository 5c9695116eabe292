"""The one place where a gradient is formed: a linear functional of the log-probabilities."""

import torch
from jaxtyping import Float
from torch import Tensor


def linear_surrogate(
    log_p: Float[Tensor, " K *batch"],
    log_q_path: Float[Tensor, " K *batch"],
    log_q_score: Float[Tensor, " K *batch"],
    *,
    weights: Float[Tensor, " K *batch"],
    learning_signal: Float[Tensor, " K *batch"],
) -> Float[Tensor, " *batch"]:
    r"""Scalar per batch element whose gradient is the multi-sample gradient.

    .. math::
        F = \sum_k b_k \big[ \log p(x, z_k) - \log q_{\mathrm{path}}(z_k) \big]
            + a_k \log q_{\mathrm{score}}(z_k)

    The coefficients b (``weights``) and a (``learning_signal``) are detached here, whatever their
    history; the log-probabilities stay attached to everything they depend on. That includes
    :math:`\log q_{\mathrm{score}}` through reparameterised values upstream of a discrete site.

    Args:
        log_p: log p(x, z_k) in nats, shape ``[K, *batch]``.
        log_q_path: log-density of the reparameterised guide sites, shape ``[K, *batch]``.
        log_q_score: log-density of the score-function guide sites, shape ``[K, *batch]``.
        weights: Coefficient of log p, shape ``[K, *batch]``.
        learning_signal: Full coefficient of log q at score-function sites, shape ``[K, *batch]``.

    Returns:
        F in nats, shape ``[*batch]``. Only its gradient means something. A coefficient of zero
        removes its term, also where the log-probability is -inf.

    Bias and variance:
        Those of the learning signal: the functional itself is unbiased for any coefficients that
        are.

    Cost:
        O(K) time and memory per batch element. Linear, so that particles may be summed in chunks.

    Example:
        >>> import torch
        >>> log_q = torch.log(torch.tensor([0.5, 0.5])).requires_grad_()
        >>> weights, signal = torch.tensor([0.25, 0.75]), torch.tensor([-0.1, 0.2])
        >>> zero = torch.zeros(2)
        >>> linear_surrogate(
        ...     zero, zero, log_q, weights=weights, learning_signal=signal
        ... ).backward()
        >>> print(log_q.grad)
        tensor([-0.1000,  0.2000])

    References:
        Mnih and Rezende, `Variational Inference for Monte Carlo Objectives
        <https://arxiv.org/abs/1602.06725>`_, 2016, equation 8.
    """
    return torch.sum(
        _weighted(weights, log_p - log_q_path) + _weighted(learning_signal, log_q_score), dim=0
    )


def _weighted(coefficient: Tensor, log_prob: Tensor) -> Tensor:
    coefficient = coefficient.detach()
    # 0 * -inf is nan, in the value and in the gradient: select before multiplying.
    return coefficient * log_prob.masked_fill(coefficient == 0, 0.0)
