"""Calibration: what Stein's identity says of linear functions, imposed on estimated scores.

Notation: x_i samples with mean m and covariance S, G estimated scores, one row per sample.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_gradest.estimators.score._pairs import product
from numpyro_gradest.estimators.score._validation import as_samples
from numpyro_gradest.estimators.score.whitening import whitening_of


def calibrate_score(
    samples: Float[Array, " *batch N D"], scores: Float[Array, " *any"]
) -> Float[Array, " *batch N D"]:
    r"""Correct estimated scores so that they are exact for affine changes of the samples.

    Whatever q is, its score obeys :math:`-E[(x - m) \nabla \log q(x)^\top] = I`: stretching q
    by a matrix A changes its entropy by log \|det A\|. Estimates shrink that matrix, and a guide
    fitted with them is too narrow. The smallest linear correction restores it:

    .. math::
        G \leftarrow G - (X - m) S^{-1} (I - M), \qquad M = -\frac1N (X - m)^\top G

    Args:
        samples: Independent draws of q, shape ``[*batch, N, D]``, N >= 2, float32 or float64.
        scores: Any estimate of grad log q at the samples, same shape.

    Returns:
        Detached scores, same shape, with :math:`M = I` up to the regularisation of S; zero where
        the samples coincide and the estimate is zero.

    Raises:
        TypeError: If ``samples`` is neither float32 nor float64.
        ValueError: If N < 2, a sample is not finite, or the shapes differ.

    Bias and variance:
        Biased by design, as the estimate is, but not for the entropy's gradient along affine maps
        of the samples, so that the width of a fitted guide is right where its shape may not be.

    Cost:
        O(N D^2 + D^3) time and O(N D + D^2) memory per batch element.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> samples = jnp.array([[-1.0], [0.0], [1.0]])
        >>> scores = calibrate_score(samples, jnp.zeros((3, 1)))  # as of a Gaussian of that width
        >>> print(np.asarray(scores).T.round(2) + 0.0)
        [[ 1.5  0.  -1.5]]

    References:
        Stein, Estimation of the mean of a multivariate normal distribution, 1981, for the
        identity. The correction is ours.
    """
    points = as_samples(samples, caller="calibrate_score", may_be_few=True)
    if scores.shape != points.shape:
        raise ValueError(
            "calibrate_score needs one score per sample, that is shape "
            f"{tuple(points.shape)}, got {tuple(scores.shape)}."
        )
    scores = jax.lax.stop_gradient(scores)
    whitening = whitening_of(points)
    assert whitening.factor is not None  # of samples it has one
    whitened = whitening.points(points)
    in_whitened = product(scores, whitening.factor)
    moment = -product(whitened.mT, in_whitened) / points.shape[-2]
    missing = jnp.eye(points.shape[-1], dtype=points.dtype) - moment
    return scores - whitening.score(product(whitened, missing))
