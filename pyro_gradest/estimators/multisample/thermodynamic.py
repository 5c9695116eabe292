"""Thermodynamic variational objective: coefficients by a sum over a path from q to the posterior.

Notation follows Masrani et al. (2019): lw_k = log p(x, z_k) - log q(z_k | x), pi_beta the density
proportional to q^(1 - beta) p^beta, w_k = softmax(beta lw)_k its self-normalised weights, and
E_beta the expectation under these. A partition is 0 = beta_0 < beta_1 < ... < beta_{J-1} < 1, with
the widths Delta_j = beta_{j+1} - beta_j up to beta_J = 1.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pyro_gradest.estimators.multisample._validation import as_log_weights

Partition = Sequence[float] | Float[Tensor, " J"]

_BISECTIONS = 30
"""Halvings of [0, 1]: to 1e-9, below the resolution of float32."""


def thermodynamic_bound(
    log_weights: Float[Tensor, " K *batch"], *, partition: Partition
) -> Float[Tensor, " *batch"]:
    r"""Lower bound on the log-evidence by thermodynamic integration.

    .. math:: \mathrm{TVO} = \sum_{j=0}^{J-1} \Delta_j \, E_{\beta_j}[\log w]

    The integrand grows with beta, so that the left Riemann sum is a lower bound of its integral,
    the log-evidence; with the partition [0] it is the ELBO.

    Args:
        log_weights: Unnormalised log-weights in nats, shape ``[K, *batch]``, K >= 2.
        partition: Left ends of the intervals, increasing from 0 and below 1, shape ``[J]``.

    Returns:
        Detached estimate in nats, shape ``[*batch]``. -inf where a weight is zero.

    Raises:
        TypeError: If ``log_weights`` is not of a floating dtype.
        ValueError: If K < 2, or the partition is not increasing from 0 and below 1.

    Bias and variance:
        The value is a self-normalised, O(1/K) estimate of the bound.

    Cost:
        O(J K) time and memory per batch element.

    Example:
        >>> import torch
        >>> log_weights = torch.log(torch.tensor([1.0, 3.0]))
        >>> print(thermodynamic_bound(log_weights, partition=[0.0]))  # (log 1 + log 3) / 2
        tensor(0.5493)

    References:
        Masrani, Le and Wood, `The Thermodynamic Variational Objective
        <https://arxiv.org/abs/1907.00031>`_, 2019, equation 8.
    """
    terms = _terms("thermodynamic_bound", log_weights, partition)
    return torch.sum(terms.widths * terms.mean, dim=0)[0].masked_fill(terms.is_void, -torch.inf)


def thermodynamic_weights(
    log_weights: Float[Tensor, " K *batch"], *, partition: Partition
) -> Float[Tensor, " K *batch"]:
    r"""Coefficients of grad log p in the gradient of the thermodynamic bound.

    .. math::
        b_k = \sum_{j=0}^{J-1} \Delta_j \, (w_{jk} + \beta_j c_{jk}), \qquad
        c_{jk} = \tfrac{K}{K-1} \, w_{jk} \, (\log w_k - E_{\beta_j}[\log w])

    by the covariance form of the gradient,
    :math:`\nabla E_\beta[\log w] = E_\beta[\nabla \log w] +
    \mathrm{Cov}_\beta[\nabla \log \pi_\beta, \log w]`.

    Args:
        log_weights: Unnormalised log-weights in nats, shape ``[K, *batch]``, K >= 2.
        partition: Left ends of the intervals, increasing from 0 and below 1, shape ``[J]``.

    Returns:
        Detached coefficients, shape ``[K, *batch]``, summing to one over dim 0. Zeros where a
        weight is zero, as the bound is -inf.

    Raises:
        TypeError: If ``log_weights`` is not of a floating dtype.
        ValueError: If K < 2, or the partition is not increasing from 0 and below 1.

    Bias and variance:
        Asymptotically unbiased in K; exactly so with the partition [0].

    Cost:
        O(J K) time and memory per batch element.

    Example:
        >>> import torch
        >>> log_weights = torch.log(torch.tensor([1.0, 3.0]))
        >>> print(thermodynamic_weights(log_weights, partition=[0.0]))
        tensor([0.5000, 0.5000])

    References:
        Masrani, Le and Wood, `The Thermodynamic Variational Objective
        <https://arxiv.org/abs/1907.00031>`_, 2019, equation 14.
    """
    terms = _terms("thermodynamic_weights", log_weights, partition)
    coefficients = terms.weights + terms.betas * terms.covariance
    return torch.sum(terms.widths * coefficients, dim=0).masked_fill(terms.is_void, 0.0)


def thermodynamic_learning_signal(
    log_weights: Float[Tensor, " K *batch"], *, partition: Partition
) -> Float[Tensor, " K *batch"]:
    r"""Learning signal of the thermodynamic bound, by the covariance form of its gradient.

    .. math::
        a_k = \sum_{j=0}^{J-1} \Delta_j \, \big[ (1 - \beta_j) c_{jk} - w_{jk} \big], \qquad
        c_{jk} = \tfrac{K}{K-1} \, w_{jk} \, (\log w_k - E_{\beta_j}[\log w])

    Args:
        log_weights: Unnormalised log-weights in nats, shape ``[K, *batch]``, K >= 2.
        partition: Left ends of the intervals, increasing from 0 and below 1, shape ``[J]``.

    Returns:
        Detached learning signal, the full coefficient of grad log q at all sites of the guide,
        shape ``[K, *batch]``. Zeros where a weight is zero, as the bound is -inf.

    Raises:
        TypeError: If ``log_weights`` is not of a floating dtype.
        ValueError: If K < 2, or the partition is not increasing from 0 and below 1.

    Bias and variance:
        Asymptotically unbiased in K; exactly so with the partition [0], where it is the score
        function with the other particles for a baseline.

    Cost:
        O(J K) time and memory per batch element.

    Example:
        >>> import torch
        >>> log_weights = torch.log(torch.tensor([1.0, 3.0]))
        >>> print(thermodynamic_learning_signal(log_weights, partition=[0.0]))
        tensor([-1.0493,  0.0493])

    References:
        Masrani, Le and Wood, `The Thermodynamic Variational Objective
        <https://arxiv.org/abs/1907.00031>`_, 2019, equation 14.
    """
    terms = _terms("thermodynamic_learning_signal", log_weights, partition)
    coefficients = (1 - terms.betas) * terms.covariance - terms.weights
    return torch.sum(terms.widths * coefficients, dim=0).masked_fill(terms.is_void, 0.0)


def thermodynamic_partition(
    num_partitions: int, *, schedule: str = "log-uniform", smallest: float = 0.05
) -> tuple[float, ...]:
    r"""Partition of [0, 1] for the thermodynamic bound.

    Args:
        num_partitions: J, the number of intervals; 1 is the ELBO.
        schedule: ``"linear"`` for equal widths; ``"log-uniform"`` for 0 and then a geometric
            sequence from ``smallest``, as the integrand grows fastest near 0.
        smallest: The first end above 0 of the log-uniform schedule, between 0 and 1.

    Returns:
        The J left ends of the intervals, increasing from 0.

    Raises:
        ValueError: If an argument makes no sense.

    Bias and variance:
        Finer is tighter: the bound's gap to the evidence is at most the largest width times the
        sum of both KL divergences between guide and posterior. Nothing random, hence unbiased.

    Cost:
        Nothing.

    Example:
        >>> thermodynamic_partition(4, schedule="linear")
        (0.0, 0.25, 0.5, 0.75)
        >>> thermodynamic_partition(3, smallest=0.01)
        (0.0, 0.01, 0.1)

    References:
        Masrani, Le and Wood, `The Thermodynamic Variational Objective
        <https://arxiv.org/abs/1907.00031>`_, 2019, section 5.
    """
    if num_partitions < 1:
        raise ValueError(
            f"thermodynamic_partition needs num_partitions >= 1, got {num_partitions}."
        )
    if schedule not in ("linear", "log-uniform"):
        raise ValueError(
            'thermodynamic_partition needs schedule="linear" or "log-uniform", got '
            f"{schedule!r}. Any other partition can be passed as it is."
        )
    if not 0 < smallest < 1:
        raise ValueError(f"thermodynamic_partition needs smallest between 0 and 1, got {smallest}.")
    steps = range(num_partitions)
    if schedule == "linear":
        return tuple(j / num_partitions for j in steps)
    if num_partitions == 1:
        return (0.0,)
    ends = [smallest ** (1 - j / (num_partitions - 1)) for j in steps[:-1]]
    return (0.0, *ends)


def moment_matching_partition(
    log_weights: Float[Tensor, " K *batch"], *, num_partitions: int
) -> Float[Tensor, " J"]:
    r"""Partition whose intervals share the rise of the integrand equally.

    .. math:: E_{\beta_j}[\log w] = (1 - \tfrac jJ) \, E_0[\log w] + \tfrac jJ \, E_1[\log w]

    averaged over the batch and solved by bisection, as both sides are estimated from the weights
    and the left grows with beta.

    Args:
        log_weights: Unnormalised log-weights in nats, shape ``[K, *batch]``, K >= 2.
        num_partitions: J, the number of intervals.

    Returns:
        Detached left ends of the intervals, increasing from 0, shape ``[J]``.

    Raises:
        TypeError: If ``log_weights`` is not of a floating dtype.
        ValueError: If K < 2, or ``num_partitions`` is less than 1.

    Bias and variance:
        Self-normalised, O(1/K). A partition from the particles that it is used on adds to the
        bias of the gradient, which stays asymptotically unbiased in K.

    Cost:
        O(J K) memory per batch element, and 30 times as much time.

    Example:
        >>> import torch
        >>> log_weights = torch.tensor([-3.0, 0.0, 1.0])
        >>> print(moment_matching_partition(log_weights, num_partitions=2))
        tensor([0.0000, 0.2786])

    References:
        Brekelmans, Masrani, Wood, Ver Steeg and Galstyan, `All in the Exponential Family: Bregman
        Duality in Thermodynamic Variational Inference <https://arxiv.org/abs/2007.00642>`_, 2020,
        section 5.
    """
    caller = "moment_matching_partition"
    log_weights = as_log_weights(log_weights, caller=caller, at_least=2)
    if num_partitions < 1:
        raise ValueError(f"{caller} needs num_partitions >= 1, got {num_partitions}.")
    is_void = torch.any(torch.isneginf(log_weights), dim=0)
    log_weights = log_weights.masked_fill(is_void, 0.0).reshape(1, log_weights.shape[0], -1)

    def integrand(betas: Tensor) -> Tensor:
        """Averaged over the batch, ``[J]``."""
        weights = torch.softmax(betas[:, None, None] * log_weights, dim=1)
        return torch.sum(weights * log_weights, dim=1).mean(dim=1)

    share = torch.arange(num_partitions).to(log_weights) / num_partitions
    first, last = integrand(torch.stack([torch.zeros_like(share[0]), torch.ones_like(share[0])]))
    target = first + share * (last - first)
    low, high = torch.zeros_like(share), torch.ones_like(share)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        is_below = integrand(middle) < target
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    # Equal weights have nothing to share out: the ends would all be 0.
    is_flat = last <= first
    ends = torch.where(is_flat, share, (low + high) / 2)
    return torch.where(share == 0, 0.0, ends)


class _Terms(NamedTuple):
    """What the sums over intervals are made of; ``[J, K, *batch]``, or with axes of size 1."""

    betas: Float[Tensor, " J *ones"]
    widths: Float[Tensor, " J *ones"]
    weights: Float[Tensor, " J K *batch"]
    mean: Float[Tensor, " J one *batch"]
    covariance: Float[Tensor, " J K *batch"]
    """c_jk."""
    is_void: Bool[Tensor, " *batch"]


def _terms(caller: str, log_weights: Float[Tensor, " K *batch"], partition: Partition) -> _Terms:
    log_weights = as_log_weights(log_weights, caller=caller, at_least=2)
    betas = _as_partition(caller, partition).to(log_weights)
    widths = torch.cat([betas[1:], torch.ones_like(betas[:1])]) - betas
    betas, widths = (x.reshape(-1, *[1] * log_weights.ndim) for x in (betas, widths))
    is_void = torch.any(torch.isneginf(log_weights), dim=0)
    log_weights = log_weights.masked_fill(is_void, 0.0)
    weights = torch.softmax(betas * log_weights, dim=1)
    # What particles share drops out of the differences; left in, it would round them away.
    shift = torch.amax(log_weights, dim=0)
    mean = torch.sum(weights * (log_weights - shift), dim=1, keepdim=True)
    num_particles = log_weights.shape[0]
    covariance = num_particles / (num_particles - 1) * weights * (log_weights - shift - mean)
    return _Terms(betas, widths, weights, mean + shift, covariance, is_void)


def _as_partition(caller: str, partition: Partition) -> Float[Tensor, " J"]:
    if isinstance(partition, Tensor):
        return partition.detach()
    check_partition(caller, partition)
    # Not the default dtype, which may be coarser than that of the log-weights.
    return torch.tensor(list(partition), dtype=torch.float64)


def check_partition(caller: str, partition: Sequence[float]) -> None:
    """Refuse what is not increasing from 0 and below 1."""
    ends = [float(end) for end in partition]
    ascends = all(left < right for left, right in pairwise([*ends, 1.0]))
    if not ends or ends[0] != 0 or not ascends:
        raise ValueError(
            f"{caller} needs a partition that increases from 0 and stays below 1 (the left ends "
            f"of the intervals; 1 is added), got {ends}."
        )
