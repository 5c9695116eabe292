"""What a score does to draws of its own distribution, and so how to tell that it is not its own.

Notation: draws x_i of q with mean m, g_i a score of q there, s_i the score of the target p there.
"""

from jaxtyping import Float
from torch import Tensor

from pyro_gradest.estimators.score._validation import as_samples, as_scores


def shrinkage(
    samples: Float[Tensor, " *batch N D"], scores: Float[Tensor, " *batch N D"]
) -> Float[Tensor, " *batch"]:
    r"""Factor by which estimated scores are too small, 1 for those of the samples' own density.

    .. math:: c = -\frac{1}{N D} \sum_i g_i \cdot (x_i - \bar x)

    Partial integration makes its expectation 1 - 1/N for the true score, as the mean is that of the
    same samples; divide by that where N is small. A guide that is fitted with the estimate comes
    out with about c times the variance.

    Args:
        samples: Independent draws of q, shape ``[*batch, N, D]``, N >= 2, float32 or float64.
        scores: Estimates of grad log q at the samples, same shape.

    Returns:
        Detached c, shape ``[*batch]``: the trace of :func:`stein_identity` over D.

    Raises:
        TypeError: If ``samples`` is neither float32 nor float64, or ``scores`` has another dtype.
        ValueError: If N < 2, the shapes differ, or an entry is not finite.

    Bias and variance:
        Asymptotically unbiased in K, with the factor 1 - 1/N exactly; variance O(1/(N D)).

    Cost:
        O(N D) time and memory per batch element.

    Example:
        >>> import torch
        >>> samples = torch.tensor([[-1.0], [1.0]])
        >>> print(shrinkage(samples, -0.8 * samples))
        tensor(0.8000)

    References:
        Stein, Estimation of the mean of a multivariate normal distribution, 1981, lemma 2.
    """
    samples = as_samples(samples, caller="shrinkage")
    scores = as_scores(scores, samples, caller="shrinkage")
    centred = samples - samples.mean(dim=-2, keepdim=True)
    return -(scores * centred).mean(dim=(-2, -1))


def stein_identity(
    samples: Float[Tensor, " *batch N D"], model_scores: Float[Tensor, " *batch N D"]
) -> Float[Tensor, " *batch D D"]:
    r"""Matrix that is the unit matrix where the samples are draws of the model.

    .. math:: M = -\frac1N \sum_i s_p(x_i) (x_i - \bar x)^\top

    For draws of p its expectation is (1 - 1/N) I, as the mean is that of the same samples. Between
    a Gaussian target of covariance S and draws of covariance C it is :math:`S^{-1} C`: what is
    below one says that the draws are too narrow, what is above that they are too wide. It does not
    see where the draws are, and it looks only near them: a mode that they miss leaves no trace.

    Args:
        samples: Draws to be judged, shape ``[*batch, N, D]``, N >= 2, float32 or float64.
        model_scores: grad log p at the samples, same shape; p need not be normalised.

    Returns:
        Detached M, shape ``[*batch, D, D]``. Its eigenvalues do not depend on the units.

    Raises:
        TypeError: If ``samples`` is neither float32 nor float64, or the scores have another dtype.
        ValueError: If N < 2, the shapes differ, or an entry is not finite.

    Bias and variance:
        Asymptotically unbiased in K, with the factor 1 - 1/N exactly. For Gaussian draws of p the
        eigenvalues spread over :math:`(1 \pm \sqrt{D/N})^2`.

    Cost:
        O(N D^2) time and O(N D + D^2) memory per batch element.

    Example:
        >>> import torch
        >>> samples = torch.tensor([[-2.0], [2.0]])  # of variance 4
        >>> print(stein_identity(samples, -samples))  # the score of variance 1
        tensor([[4.]])

    References:
        Stein, Estimation of the mean of a multivariate normal distribution, 1981, lemma 2.
    """
    samples = as_samples(samples, caller="stein_identity")
    scores = as_scores(model_scores, samples, caller="stein_identity")
    centred = samples - samples.mean(dim=-2, keepdim=True)
    return -scores.mT @ centred / samples.shape[-2]
