"""The value of the entropy of a distribution that can only be sampled.

Notation: r_i distance of x_i to its k-th nearest neighbour, V_D volume of the unit ball.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_gradest.estimators.score._pairs import squared_distances
from pyro_gradest.estimators.score._validation import as_samples


def knn_entropy(
    samples: Float[Tensor, " *batch N D"], *, num_neighbors: int = 3
) -> Float[Tensor, " *batch"]:
    r"""Kozachenko-Leonenko estimate of the differential entropy H[q] in nats.

    .. math:: \hat H = \psi(N) - \psi(k) + \log V_D + \frac DN \sum_i \log r_i

    An estimate, not a bound. Its gradient is not an estimate of the entropy's: that is
    :func:`entropy_surrogate`.

    Args:
        samples: Independent draws of q, shape ``[*batch, N, D]``, N >= 2, float32 or float64.
        num_neighbors: k; at most N - 1 are used. More mean less variance and more bias.

    Returns:
        Detached entropy in nats, shape ``[*batch]``. Where draws coincide their distance counts as
        the smallest that rounding can tell.

    Raises:
        TypeError: If ``samples`` is neither float32 nor float64.
        ValueError: If N < 2, a sample is not finite, or ``num_neighbors`` is not positive.

    Bias and variance:
        Biased by design, O((k/N)^(2/D)): slowly better in many dimensions. Variance O(1/N).

    Cost:
        O(N^2 D) time and O(N^2) memory per batch element.

    Example:
        >>> import math, torch
        >>> normal = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0))
        >>> bool(abs(knn_entropy(normal) - 0.5 * math.log(2 * math.pi * math.e)) < 0.1)
        True

    References:
        Kozachenko and Leonenko, Sample estimate of the entropy of a random vector, 1987. Kraskov,
        Stoegbauer and Grassberger, `Estimating mutual information
        <https://arxiv.org/abs/cond-mat/0305641>`_, 2004, eq. 20.
    """
    if num_neighbors < 1:
        raise ValueError(f"knn_entropy needs num_neighbors >= 1, got {num_neighbors}.")
    samples = as_samples(samples, caller="knn_entropy", may_be_few=True)
    num_samples, dim = samples.shape[-2:]
    k = min(num_neighbors, num_samples - 1)
    centred = samples - samples.mean(dim=-2, keepdim=True)
    squared_distance = squared_distances(centred, centred)
    scale = (centred**2).sum(dim=-1).mean(dim=-1)
    # A point is its own nearest neighbour, though rounding may put others as near.
    squared_distance.diagonal(dim1=-2, dim2=-1).zero_()
    squared_radius = squared_distance.kthvalue(k + 1, dim=-1).values
    smallest = torch.finfo(samples.dtype).eps * scale + torch.finfo(samples.dtype).tiny
    log_radius = 0.5 * torch.maximum(squared_radius, smallest[..., None]).log()
    log_volume = 0.5 * dim * math.log(math.pi) - math.lgamma(0.5 * dim + 1)
    counts = torch.tensor([num_samples, k], dtype=samples.dtype, device=samples.device)
    difference = -counts.digamma().diff().squeeze(-1)
    return difference + log_volume + dim * log_radius.mean(dim=-1)
