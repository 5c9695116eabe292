"""The gradient of the entropy of a distribution that can only be sampled.

Notation: x_k = f(noise_k) draws of q, g_k the estimate of grad log q(x_k).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_gradest.estimators.score._validation import as_samples
from pyro_gradest.estimators.score.stein import stein_score


def entropy_surrogate(
    samples: Float[Tensor, " *batch N D"],
    *,
    score_estimator: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, " *batch"]:
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
        >>> import torch
        >>> noise = torch.special.ndtri(torch.linspace(0.01, 0.99, 50))[:, None]  # normal
        >>> scale = torch.tensor(2.0, requires_grad=True)
        >>> entropy_surrogate(scale * noise).backward()
        >>> print(scale.grad.round(decimals=2))  # H = log(scale) + constant: 1 / 2 is exact
        tensor(0.4900)

    References:
        Li and Turner, `Gradient Estimators for Implicit Models
        <https://arxiv.org/abs/1705.07107>`_, 2018, section 2.
    """
    detached = as_samples(samples, caller="entropy_surrogate", may_be_few=True)
    scores = (stein_score if score_estimator is None else score_estimator)(detached)
    if scores.shape != samples.shape:
        raise ValueError(
            "entropy_surrogate needs a score_estimator that keeps the shape of the samples, "
            f"{tuple(samples.shape)}, got {tuple(scores.shape)}."
        )
    return -torch.mean(torch.sum(scores.detach() * samples, dim=-1), dim=-1)
