"""Whitening: coordinates in which the samples have mean zero and covariance one.

Notation: m mean, C covariance, C = L L' with L lower triangular; u = L^-1 (x - m).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_gradest.estimators.score._validation import as_samples


class Whitening(NamedTuple):
    """An affine map to whitened coordinates; of points by ``points``, of scores by ``score``."""

    mean: Float[Tensor, " *batch D"]
    """m"""
    factor: Float[Tensor, " *batch D D"] | None
    """L, or ``None`` to centre only."""

    def points(self, points: Float[Tensor, " *batch P D"]) -> Float[Tensor, " *batch P D"]:
        """u = L^-1 (x - m) of points x in the units of the samples."""
        centred = points - self.mean[..., None, :]
        if self.factor is None:
            return centred
        return torch.linalg.solve_triangular(self.factor.mT, centred, upper=True, left=False)

    def score(self, score: Float[Tensor, " *batch P D"]) -> Float[Tensor, " *batch P D"]:
        """Gradient of log q in the units of the samples, L^-T times that in whitened ones."""
        if self.factor is None:
            return score
        return torch.linalg.solve_triangular(self.factor, score, upper=False, left=False)

    def whitened_score(self, score: Float[Tensor, " *batch P D"]) -> Float[Tensor, " *batch P D"]:
        """The reverse: gradient in whitened units, L^T times that in the units of the samples."""
        return score if self.factor is None else score @ self.factor


def fit_whitening(samples: Float[Tensor, " *batch N D"]) -> Whitening:
    r"""Whitening of samples by the Cholesky factor of their covariance.

    .. math:: u = L^{-1}(x - m), \qquad L L^\top = C + \delta\, \mathrm{diag}(C)

    with :math:`\delta = \sqrt\epsilon` of the dtype (3e-4 in float32), which bounds what directions
    without spread are stretched by. A coordinate in which all samples coincide is only centred.

    Args:
        samples: Samples, shape ``[*batch, N, D]``, N >= 2, float32 or float64.

    Returns:
        A :class:`Whitening`, detached. It maps points to whitened coordinates and scores back.

    Raises:
        TypeError: If ``samples`` is neither float32 nor float64.
        ValueError: If N < 2, or a sample is not finite.

    Bias and variance:
        Asymptotically unbiased in K for the mean and the covariance's factor; C is divided by N.

    Cost:
        O(N D^2 + D^3) time and O(N D + D^2) memory per batch element.

    Example:
        >>> import torch
        >>> samples = torch.tensor([[8.0], [12.0]])
        >>> whitening = fit_whitening(samples)
        >>> print(whitening.points(samples).T)
        tensor([[-0.9998,  0.9998]])
        >>> print(whitening.score(torch.tensor([[1.0]])))  # a gradient shrinks by what x grew
        tensor([[0.4999]])

    References:
        Kessy, Lewin and Strimmer, `Optimal Whitening and Decorrelation
        <https://arxiv.org/abs/1512.00809>`_, 2018, whose Cholesky whitening factorises the inverse.
    """
    return whitening_of(as_samples(samples, caller="fit_whitening", may_be_few=True))


def whitening_of(samples: Float[Tensor, " *batch N D"]) -> Whitening:
    """Whitening of samples that have been checked."""
    mean, centred = centre(samples)
    # Each coordinate is brought to unit scale before it is squared, which might underflow, and to
    # unit variance before coordinates are compared: only their correlation is regularised.
    largest = centred.abs().amax(dim=-2, keepdim=True)
    scale = torch.where(largest > 0, largest, 1.0)
    scale = scale * torch.sqrt(torch.mean((centred / scale) ** 2, dim=-2, keepdim=True))
    scale = torch.where(largest > 0, scale, 1.0)
    standard = centred / scale
    delta = torch.finfo(samples.dtype).eps ** 0.5
    diagonal = torch.where(largest > 0, delta, 1.0).to(samples.dtype)
    correlation = standard.mT @ standard / samples.shape[-2] + torch.diag_embed(diagonal[..., 0, :])
    return Whitening(mean=mean, factor=scale.mT * torch.linalg.cholesky(correlation))


def centre(
    samples: Float[Tensor, " *batch N D"],
) -> tuple[Float[Tensor, " *batch D"], Float[Tensor, " *batch N D"]]:
    """Mean and centred samples; those of coinciding samples are exactly zero."""
    # The mean of equal numbers may round; their difference to the first does not.
    first = samples[..., :1, :]
    mean = first + (samples - first).mean(dim=-2, keepdim=True)
    return mean.squeeze(-2), samples - mean
