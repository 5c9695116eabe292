"""Doubly reparameterised gradients: coefficients of the path through reparameterised draws.

Notation follows Tucker et al. (2019): w_k the weights, v the self-normalised weights, h_k the
gradient of log q(z_k | x) at z_k held fixed. The path is what the parameters do to z_k.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_gradest.estimators.multisample._leave_one_out import leave_one_out
from pyro_gradest.estimators.multisample._validation import as_log_weights
from pyro_gradest.estimators.multisample.renyi import renyi_weights


def dreg_weights(
    log_weights: Float[Tensor, " K *batch"], *, alpha: float = 0.0
) -> Float[Tensor, " K *batch"]:
    r"""Doubly reparameterised weights of the importance-weighted bound.

    .. math:: u_k = v_k^2, \qquad u_k = \alpha \tilde v_k + (1 - \alpha) \tilde v_k^2

    the latter for the variational Renyi bound of order alpha, with its weights
    :func:`renyi_weights`.

    The pathwise gradient of the bound is :math:`\sum_k v_k \, \partial \log w_k` along the path
    minus :math:`\sum_k v_k h_k`. Reparameterising the latter once more turns the sum of both into
    :math:`\sum_k u_k \, \partial \log w_k` along the path alone, which has the same expectation.

    Args:
        log_weights: Unnormalised log-weights in nats, shape ``[K, *batch]``, K >= 1.
        alpha: Order of the bound, between 0 (importance-weighted) and 1 (ELBO).

    Returns:
        Detached coefficients of the path, shape ``[K, *batch]``. Zeros where every weight is zero.

    Raises:
        TypeError: If ``log_weights`` is not of a floating dtype.
        ValueError: If ``log_weights`` has no particle axis, or ``alpha`` is not in [0, 1].

    Bias and variance:
        Unbiased for the guide's gradient of the K-sample bound. In the limit of many particles its
        signal-to-noise ratio grows as sqrt(K) where the pathwise one falls as 1/sqrt(K), and its
        variance vanishes where the guide is the posterior. It is no gradient for the model's
        parameters: these keep v.

    Cost:
        O(K) time and memory per batch element.

    Example:
        >>> import torch
        >>> print(dreg_weights(torch.log(torch.tensor([1.0, 3.0]))))
        tensor([0.0625, 0.5625])

    References:
        Tucker, Lawson, Gu and Maddison, `Doubly Reparameterized Gradient Estimators for Monte Carlo
        Objectives <https://arxiv.org/abs/1810.04152>`_, 2019, equation 8. Bauer and Mnih,
        `Generalized Doubly Reparameterized Gradient Estimators <https://arxiv.org/abs/2101.11046>`_,
        2021, for guides of several layers. Daudel, Benton, Shi and Doucet, `Alpha-divergence
        Variational Inference Meets Importance Weighted Auto-Encoders
        <https://arxiv.org/abs/2210.06226>`_, 2023, for other orders.
    """
    weights = renyi_weights(log_weights, alpha=alpha)
    return weights * (alpha + (1 - alpha) * weights)


def wake_phi_dreg_weights(log_weights: Float[Tensor, " K *batch"]) -> Float[Tensor, " K *batch"]:
    r"""Doubly reparameterised weights of wake-phi.

    .. math:: u_k = v_k - v_k^2

    :math:`\sum_k u_k \, \partial \log w_k` along the path has the expectation of the wake-phi
    gradient :math:`\sum_k v_k h_k`.

    Args:
        log_weights: Unnormalised log-weights in nats, shape ``[K, *batch]``, K >= 1.

    Returns:
        Detached coefficients of the path, shape ``[K, *batch]``. Zero where one particle holds all
        the weight, and where every weight is zero.

    Raises:
        TypeError: If ``log_weights`` is not of a floating dtype.
        ValueError: If ``log_weights`` has no particle axis.

    Bias and variance:
        Self-normalised, O(1/K), for the gradient of the inclusive divergence, exactly as
        :func:`wake_phi_learning_signal` is; with a variance that vanishes where the guide is the
        posterior.

    Cost:
        O(K) time and memory per batch element.

    Example:
        >>> import torch
        >>> print(wake_phi_dreg_weights(torch.log(torch.tensor([1.0, 3.0]))))
        tensor([0.1875, 0.1875])

    References:
        Tucker, Lawson, Gu and Maddison, `Doubly Reparameterized Gradient Estimators for Monte Carlo
        Objectives <https://arxiv.org/abs/1810.04152>`_, 2019, section 5.
    """
    loo = leave_one_out(as_log_weights(log_weights, caller="wake_phi_dreg_weights"))
    # 1 - v_k from what the others weigh: it loses every digit where one particle dominates.
    others = torch.exp(-loo.log_ratio).masked_fill(loo.undefined, 0.0)
    return loo.weights * others
