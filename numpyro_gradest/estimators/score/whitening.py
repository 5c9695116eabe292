"""Whitening: coordinates in which the samples have mean zero and covariance one.

Notation: m mean, C covariance, C = L L' with L lower triangular; u = L^-1 (x - m).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_gradest.estimators.score._pairs import product
from numpyro_gradest.estimators.score._validation import as_samples


class Whitening(NamedTuple):
    """An affine map to whitened coordinates; of points by ``points``, of scores by ``score``."""

    mean: Float[Array, " *batch D"]
    """m"""
    factor: Float[Array, " *batch D D"] | None
    """L, or ``None`` to centre only."""

    def points(self, points: Float[Array, " *batch P D"]) -> Float[Array, " *batch P D"]:
        """u = L^-1 (x - m) of points x in the units of the samples."""
        centred = points - self.mean[..., None, :]
        if self.factor is None:
            return centred
        return _solve_from_the_right(self.factor, centred, transposed=True)

    def score(self, score: Float[Array, " *batch P D"]) -> Float[Array, " *batch P D"]:
        """Gradient of log q in the units of the samples, L^-T times that in whitened ones."""
        if self.factor is None:
            return score
        return _solve_from_the_right(self.factor, score, transposed=False)

    def whitened_score(self, score: Float[Array, " *batch P D"]) -> Float[Array, " *batch P D"]:
        """The reverse: gradient in whitened units, L^T times that in the units of the samples."""
        return score if self.factor is None else product(score, self.factor)


def fit_whitening(samples: Float[Array, " *batch N D"]) -> Whitening:
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
        >>> import jax.numpy as jnp, numpy as np
        >>> samples = jnp.array([[8.0], [12.0]])
        >>> whitening = fit_whitening(samples)
        >>> print(np.asarray(whitening.points(samples)).T.round(4))
        [[-0.9998  0.9998]]
        >>> print(np.asarray(whitening.score(jnp.array([[1.0]]))).round(4))  # gradients shrink
        [[0.4999]]

    References:
        Kessy, Lewin and Strimmer, `Optimal Whitening and Decorrelation
        <https://arxiv.org/abs/1512.00809>`_, 2018, whose Cholesky whitening factorises the inverse.
    """
    return whitening_of(as_samples(samples, caller="fit_whitening", may_be_few=True))


def whitening_of(samples: Float[Array, " *batch N D"]) -> Whitening:
    """Whitening of samples that have been checked."""
    mean, centred = centre(samples)
    # Each coordinate is brought to unit scale before it is squared, which might underflow, and to
    # unit variance before coordinates are compared: only their correlation is regularised.
    largest = jnp.max(jnp.abs(centred), axis=-2, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1.0)
    scale = scale * jnp.sqrt(jnp.mean((centred / scale) ** 2, axis=-2, keepdims=True))
    scale = jnp.where(largest > 0, scale, 1.0)
    standard = centred / scale
    delta = float(jnp.finfo(samples.dtype).eps) ** 0.5
    diagonal = jnp.where(largest > 0, delta, 1.0).astype(samples.dtype)
    correlation = product(standard.mT, standard) / samples.shape[-2]
    correlation = correlation + diagonal * jnp.eye(samples.shape[-1], dtype=samples.dtype)
    return Whitening(mean=mean, factor=scale.mT * jnp.linalg.cholesky(correlation))


def centre(
    samples: Float[Array, " *batch N D"],
) -> tuple[Float[Array, " *batch D"], Float[Array, " *batch N D"]]:
    """Mean and centred samples; those of coinciding samples are exactly zero."""
    # The mean of equal numbers may round; their difference to the first does not.
    first = samples[..., :1, :]
    mean = first + (samples - first).mean(axis=-2, keepdims=True)
    return mean[..., 0, :], samples - mean


def _solve_from_the_right(
    factor: Float[Array, " *batch D D"], rows: Float[Array, " *batch P D"], *, transposed: bool
) -> Float[Array, " *batch P D"]:
    """rows L^-1, or rows L^-T if transposed, with L lower triangular."""
    return jax.lax.linalg.triangular_solve(
        factor, rows, left_side=False, lower=True, transpose_a=transposed
    )
