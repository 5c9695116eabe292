"""How far draws are from reference draws, by their projections on random lines."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_gradest.estimators._validation import check_count
from pyro_gradest.estimators.score._validation import as_reference, as_samples


def sliced_wasserstein(
    samples: Float[Tensor, " *batch N D"],
    reference: Float[Tensor, " *batch P D"],
    *,
    num_projections: int = 100,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " *batch"]:
    r"""Sliced Wasserstein distance of order 2 between two sets of draws.

    .. math::
        \mathrm{SW}^2 = \frac1L \sum_l \int_0^1
        \bigl(F^{-1}_{\theta_l \cdot x}(t) - F^{-1}_{\theta_l \cdot y}(t)\bigr)^2 dt

    over directions :math:`\theta_l` uniform on the sphere. The integral over quantiles is exact,
    also where N and P differ. Unlike what needs the score alone it sees missing modes.

    Args:
        samples: Draws to be judged, shape ``[*batch, N, D]``, N >= 2, float32 or float64.
        reference: Draws of what they should be, shape ``[*batch, P, D]``, same dtype.
        num_projections: L; in one dimension one is exact.
        generator: Source of the directions; ``None`` is torch's own.

    Returns:
        Detached distance in the units of the samples, shape ``[*batch]``.

    Raises:
        TypeError: If ``samples`` is neither float32 nor float64, or ``reference`` has another
            dtype.
        ValueError: If N or P < 2, the shapes do not go together, an entry is not finite, or
            ``num_projections`` is not positive.

    Bias and variance:
        Asymptotically unbiased in K: two sets of draws of one distribution are about
        O((1/N + 1/P)^(1/2)) apart in a direction. The square is unbiased over directions.

    Cost:
        O(L (N + P) (D + log(N + P))) time and O(L (N + P)) memory per batch element.

    Example:
        >>> import torch
        >>> samples = torch.tensor([[0.0], [1.0], [2.0]])
        >>> print(sliced_wasserstein(samples, samples + 0.5))
        tensor(0.5000)

    References:
        Bonneel, Rabin, Peyre and Pfister, Sliced and Radon Wasserstein barycenters of measures,
        2015, definition 7.
    """
    check_count(num_projections, "num_projections", caller="sliced_wasserstein")
    samples = as_samples(samples, caller="sliced_wasserstein", may_be_few=True)
    reference = as_reference(reference, samples, caller="sliced_wasserstein")
    directions = random_directions(samples, num_projections, generator)
    # Centred, which keeps the digits of samples far from zero. [*batch, L, N] and [*batch, L, P].
    mean = samples.mean(dim=-2, keepdim=True)
    quantiles = torch.sort(directions @ (samples - mean).mT, dim=-1).values
    of_reference = torch.sort(directions @ (reference - mean).mT, dim=-1).values
    widths, left, right = _common_steps(samples.shape[-2], reference.shape[-2])
    differences = quantiles[..., left] - of_reference[..., right]
    weights = torch.as_tensor(widths, dtype=samples.dtype, device=samples.device)
    return (weights * differences**2).sum(dim=-1).mean(dim=-1).sqrt()


def random_directions(
    samples: Float[Tensor, " *batch N D"], number: int, generator: torch.Generator | None
) -> Float[Tensor, " L D"]:
    """Directions uniform on the sphere, for all batch elements the same."""
    normal = torch.randn(
        number, samples.shape[-1], dtype=samples.dtype, device=samples.device, generator=generator
    )
    return normal / torch.linalg.vector_norm(normal, dim=-1, keepdim=True)


def _common_steps(number: int, other: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where either of two empirical quantile functions steps: widths, and the index in each."""
    # In units of 1 / (number * other), so that equal steps are equal.
    steps = np.union1d(np.arange(number) * other, np.arange(other) * number)
    widths = np.diff(steps, append=number * other) / (number * other)
    return widths, steps // other, steps // number
