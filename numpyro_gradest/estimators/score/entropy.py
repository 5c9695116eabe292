"""The gradient of the entropy of a distribution that can only be sampled.

Notation: x_k = f(noise_k) draws of q, g_k the estimate of grad log q(x_k).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_gradest.estimators.score._validation import as_samples
from numpyro_gradest.estimators.score.stein import stein_score


def entropy_surrogate(
    samples: Float[Array, " *batch N D"],
    *,
    score_estimator: Callable[[Array], Array] | None = None,
) -> Float[Array, " *batch"]:
    r"""Scalar per batch element whose gradient is that of the entropy H[q].

    The density of q need not be known: of
    :math:`\nabla_\phi H[q] = -E[\nabla_x \log q(x)\, \partial x / \partial \phi]` only the score is
    missing, and samples give an estimate of it:

    .. math:: F = -\frac1N \sum_k \hat g_k \cdot x_k

    with :math:`\hat g` held constant. Add it to what a generator maximises to keep its samples
    diverse.

    Args:
        samples: Independent draws of q, attached to the parameters that made them, shape
            ``[*batch, N, D]``, N >= 2, float32 or float64.
        score_estimator: From detached samples ``[*batch, N, D]`` to their scores; ``None`` is
            :func:`stein_score` with its defaults. Bind options with ``functools.partial``.

    Returns:
        F, shape ``[*batch]``. Only its gradient means something: the value is no entropy.

    Raises:
        TypeError: If ``samples`` is neither float32 nor float64.
        ValueError: If N < 2, a sample is not finite, or the estimator changes the shape.

    Bias and variance:
        Biased by design, as far as the score estimator is: a score shrunk by c is an entropy
        that weighs c times as much.

    Cost:
        That of the score estimator, and O(N D).

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np
        >>> noise = jax.scipy.special.ndtri(jnp.linspace(0.01, 0.99, 50))[:, None]  # normal
        >>> gradient = jax.grad(lambda scale: entropy_surrogate(scale * noise))(2.0)
        >>> print(np.asarray(gradient).round(2))  # H = log(scale) + constant: 1 / 2 is exact
        0.49

    References:
        Li and Turner, `Gradient Estimators for Implicit Models
        <https://arxiv.org/abs/1705.07107>`_, 2018, section 2.
    """
    detached = as_samples(samples, caller="entropy_surrogate", may_be_few=True)
    scores = (stein_score if score_estimator is None else score_estimator)(detached)
    if scores.shape != samples.shape:
        raise ValueError(
            "entropy_surrogate needs a score_estimator that keeps the shape of the samples, "
            f"{samples.shape}, got {scores.shape}."
        )
    return -jnp.mean(jnp.sum(jax.lax.stop_gradient(scores) * samples, axis=-1), axis=-1)
