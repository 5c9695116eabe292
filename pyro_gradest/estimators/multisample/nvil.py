"""NVIL: learned, running and scaled baselines for the score function.

Notation follows Mnih and Gregor (2014): L the bound, v the self-normalised weights, C(x) a baseline
that depends on the data, c and s^2 the running mean and variance of L - C(x), h_k the gradient of
log q(z_k | x).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_gradest.estimators.multisample._validation import as_log_weights
from pyro_gradest.estimators.multisample.bounds import iwae_bound, normalized_weights


class NVILState(NamedTuple):
    """Running moments of the centred bound; arrays of no dimension."""

    mean: Float[Tensor, ""]
    """c."""
    variance: Float[Tensor, ""]
    """s^2."""
    num_updates: Float[Tensor, ""]


def nvil_learning_signal(
    log_weights: Float[Tensor, " K *batch"],
    state: NVILState,
    *,
    baseline: Float[Tensor, " *broadcastable"] | float = 0.0,
    normalize_variance: bool = True,
) -> Float[Tensor, " K *batch"]:
    r"""NVIL learning signal: the bound less what could be expected of it, on a unit scale.

    .. math:: a_k = \frac{L - C(x) - c - v_k}{\max(1, s)}

    Args:
        log_weights: Unnormalised log-weights in nats, shape ``[K, *batch]``, K >= 1.
        state: Running moments of the steps before this one; a moment of the same particles would
            depend on what it is compared with.
        baseline: C(x), broadcastable to ``[*batch]``, of the data alone.
        normalize_variance: Whether to divide by max(1, s).

    Returns:
        Detached learning signal, the full coefficient of h_k, shape ``[K, *batch]``. Zero where
        every weight is zero.

    Raises:
        TypeError: If ``log_weights`` is not of a floating dtype.
        ValueError: If ``log_weights`` has no particle axis, or the baseline does not broadcast.

    Bias and variance:
        Unbiased for the gradient of the K-sample bound over max(1, s), a positive number that is
        the same for all parameters of the guide's score-function sites; without normalisation
        unbiased as such.

    Cost:
        O(K) time and memory per batch element.

    Example:
        >>> import torch
        >>> state = NVILState(torch.tensor(0.5), torch.tensor(4.0), torch.tensor(10.0))
        >>> print(nvil_learning_signal(torch.log(torch.tensor([1.0, 3.0])), state))
        tensor([-0.0284, -0.2784])

    References:
        Mnih and Gregor, `Neural Variational Inference and Learning in Belief Networks
        <https://arxiv.org/abs/1402.0030>`_, 2014, algorithm 1, for one particle. There v_k is not
        divided: with several particles the direction would then be that of another objective.
    """
    log_weights = as_log_weights(log_weights, caller="nvil_learning_signal")
    baseline = _as_baseline("nvil_learning_signal", baseline, log_weights)
    bound = iwae_bound(log_weights)
    signal = bound - baseline - state.mean.detach() - normalized_weights(log_weights)
    if normalize_variance:
        signal = signal / _scale(state)
    return signal.masked_fill(bound.isneginf(), 0.0)


def initial_nvil_state() -> NVILState:
    """State before the first step: no mean, and nothing to divide by.

    Args:

    Returns:
        Moments of zero.

    Bias and variance:
        With it the signal is the plain score function's: unbiased.

    Cost:
        Nothing.

    Example:
        >>> print(initial_nvil_state().mean)
        tensor(0.)

    References:
        Mnih and Gregor, `Neural Variational Inference and Learning in Belief Networks
        <https://arxiv.org/abs/1402.0030>`_, 2014, algorithm 1.
    """
    return NVILState(torch.zeros(()), torch.zeros(()), torch.zeros(()))


def update_nvil_state(
    state: NVILState,
    log_weights: Float[Tensor, " K *batch"],
    *,
    baseline: Float[Tensor, " *broadcastable"] | float = 0.0,
    decay: float = 0.8,
) -> NVILState:
    r"""Running moments after a step.

    .. math::
        c \leftarrow \lambda c + (1 - \lambda) \operatorname{mean}(L - C), \qquad
        s^2 \leftarrow \lambda s^2 + (1 - \lambda) \operatorname{var}(L - C)

    over the batch; the first update takes the batch's moments as they are.

    Args:
        state: Moments of the steps before.
        log_weights: Unnormalised log-weights in nats, shape ``[K, *batch]``, K >= 1.
        baseline: C(x), broadcastable to ``[*batch]``.
        decay: lambda, between 0 (the last batch alone) and 1.

    Returns:
        The new state, detached. Elements whose bound is -inf do not count.

    Raises:
        TypeError: If ``log_weights`` is not of a floating dtype.
        ValueError: If ``log_weights`` has no particle axis, the baseline does not broadcast, or
            ``decay`` is not in [0, 1).

    Bias and variance:
        What is used at the next step does not depend on its particles, which keeps that unbiased.

    Cost:
        O(K) time and memory per batch element.

    Example:
        >>> import torch
        >>> log_weights = torch.tensor([[-1.0, -3.0]])
        >>> print(update_nvil_state(initial_nvil_state(), log_weights).mean)
        tensor(-2.)

    References:
        Mnih and Gregor, `Neural Variational Inference and Learning in Belief Networks
        <https://arxiv.org/abs/1402.0030>`_, 2014, algorithm 1.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"update_nvil_state needs 0 <= decay < 1, got {decay}.")
    log_weights = as_log_weights(log_weights, caller="update_nvil_state")
    baseline = _as_baseline("update_nvil_state", baseline, log_weights)
    bound = iwae_bound(log_weights)
    counts = ~bound.isneginf()
    number = counts.sum().clamp(min=1)
    centred = (bound - baseline).masked_fill(~counts, 0.0)
    mean = centred.sum() / number
    variance = ((centred - mean) ** 2).masked_fill(~counts, 0.0).sum() / number
    old_share = decay * (state.num_updates > 0)
    return NVILState(
        mean=old_share * state.mean + (1 - old_share) * mean,
        variance=old_share * state.variance + (1 - old_share) * variance,
        num_updates=state.num_updates + 1,
    )


def _scale(state: NVILState) -> Float[Tensor, ""]:
    return state.variance.detach().sqrt().clamp(min=1.0)


def _as_baseline(
    caller: str,
    baseline: Float[Tensor, " *broadcastable"] | float,
    log_weights: Float[Tensor, " K *batch"],
) -> Float[Tensor, " *batch"]:
    baseline = torch.as_tensor(baseline).detach().to(log_weights)
    batch = log_weights.shape[1:]
    try:
        fits = torch.broadcast_shapes(baseline.shape, batch) == batch
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{caller} needs a baseline that broadcasts to the batch shape {tuple(batch)} of the "
            f"bound, got shape {tuple(baseline.shape)}. Return one number for each element of the "
            "plates that all sites share: drop a last dim of size 1 with [..., 0]."
        )
    return torch.broadcast_to(baseline, batch)
