"""The spectral Stein gradient estimator: the score in the eigenfunctions of a kernel.

Notation follows Shi, Sun and Zhu (2018): M samples (our N), K = U diag(lambda) U' with the
eigenvalues in falling order, psi_j the Nystrom estimate of the j-th eigenfunction, beta_j the
score's coefficients, J their number; <grad, K> as in the Stein estimator.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_gradest.estimators._validation import check_count
from pyro_gradest.estimators.score._pairs import squared_distances, weighted_differences
from pyro_gradest.estimators.score._standardize import standardize
from pyro_gradest.estimators.score._validation import as_points, as_samples
from pyro_gradest.estimators.score.kernels import RadialKernel
from pyro_gradest.estimators.score.whitening import Whitening


class SpectralFit(NamedTuple):
    """A fitted spectral estimator: ``scores`` at the samples, ``score(points)`` anywhere."""

    scores: Float[Tensor, " *batch N D"]
    """The estimate at the samples, in their units."""
    whitening: Whitening
    whitened: Float[Tensor, " *batch N D"]
    """The samples in whitened coordinates."""
    kernel: RadialKernel
    coefficients: Float[Tensor, " *batch N D"]
    """Of the kernel functions k(., x_m), in whitened coordinates."""

    def score(self, points: Float[Tensor, " *batch P D"]) -> Float[Tensor, " *batch P D"]:
        r"""Estimate at other points, :math:`\sum_{j \le J} \beta_j \psi_j(y)`.

        Args:
            points: Points of the dtype and batch shape of the samples, ``[*batch, P, D]``.

        Returns:
            Detached score, shape ``[*batch, P, D]``.
        """
        points = self.whitening.points(as_points(points, self.scores, caller="SpectralFit.score"))
        kernel = self.kernel.derivative(squared_distances(points, self.whitened))
        return self.whitening.score(kernel @ self.coefficients)


def fit_spectral(
    samples: Float[Tensor, " *batch N D"],
    *,
    kernel: RadialKernel | None = None,
    num_eigenfunctions: int | None = None,
    energy: float = 0.99,
    whiten: bool = True,
) -> SpectralFit:
    """Spectral estimate of the score, with what it takes to evaluate it at other points.

    As :func:`spectral_score`, which returns the estimate at the samples alone.

    Args:
        samples: Independent draws of q, shape ``[*batch, N, D]``, N >= 2, float32 or float64.
        kernel: :class:`RBF` or :class:`IMQ`; ``None`` is IMQ at the median distance.
        num_eigenfunctions: J >= 1, or ``None`` to choose it by ``energy``.
        energy: Share of the sum of eigenvalues that is kept, in (0, 1].
        whiten: Estimate in coordinates with covariance one.

    Returns:
        A :class:`SpectralFit`, detached, with the leading axes of the samples.

    Raises:
        TypeError: If ``samples`` is neither float32 nor float64.
        ValueError: If N < 2, a sample is not finite, or an option makes no sense.

    Bias and variance:
        Biased by design: what the first J eigenfunctions cannot express is left out.

    Cost:
        O(N^3 + N^2 D) time and O(N^2 + N D) memory per batch element, with one eigendecomposition;
        evaluation at P points O(N P D).

    Example:
        >>> import torch
        >>> fit = fit_spectral(torch.linspace(-2, 2, 50)[:, None])
        >>> print(fit.score(torch.tensor([[0.0]])).abs() < 1e-3)  # a symmetric density
        tensor([[True]])

    References:
        Shi, Sun and Zhu, `A Spectral Approach to Gradient Estimation for Implicit Distributions
        <https://arxiv.org/abs/1806.02925>`_, 2018, section 3.
    """
    return _fit(samples, kernel, num_eigenfunctions, energy, whiten, caller="fit_spectral")


def spectral_score(
    samples: Float[Tensor, " *batch N D"],
    *,
    kernel: RadialKernel | None = None,
    num_eigenfunctions: int | None = None,
    energy: float = 0.99,
    whiten: bool = True,
) -> Float[Tensor, " *batch N D"]:
    r"""Spectral estimate of the score of q at samples of q.

    The score is expanded in eigenfunctions of the kernel under q. Both these and, by Stein's
    identity, the score's coefficients are averages over samples:

    .. math::
        \hat g = \sum_{j=1}^J \beta_j \psi_j, \qquad
        \psi_j(x) = \frac{\sqrt M}{\lambda_j} \sum_m u_{mj} k(x, x_m), \qquad
        \beta_j = -\frac1M \sum_m \nabla \psi_j(x_m)

    At the samples that is :math:`-\sum_{j \le J} u_j u_j^\top \langle \nabla, K \rangle /
    \lambda_j`: the Stein estimate with its small eigenvalues cut off rather than damped.

    Args:
        samples: Independent draws of q, shape ``[*batch, N, D]``, N >= 2, float32 or float64.
        kernel: :class:`RBF` or :class:`IMQ`, with a bandwidth in whitened units or without one;
            ``None`` is IMQ at the median distance.
        num_eigenfunctions: J >= 1, or ``None`` to choose it by ``energy``. Above N it is N.
        energy: With ``num_eigenfunctions=None``, the fewest eigenvalues are kept whose sum is at
            least this share of all, in (0, 1]; never fewer than one. In float32 stay below 0.999.
        whiten: Estimate in coordinates with covariance one, and map the score back.

    Returns:
        Detached estimate of grad log q at each sample, in the inverse units of the samples, shape
        ``[*batch, N, D]``. Zero where all samples coincide.

    Raises:
        TypeError: If ``samples`` is neither float32 nor float64.
        ValueError: If N < 2, a sample is not finite, or an option makes no sense.

    Bias and variance:
        Biased by design: what the first J eigenfunctions cannot express is left out. More of them
        trade bias for variance: with 0.95 of the energy, modes are often taken for one.

    Cost:
        O(N^3 + N^2 D) time and O(N^2 + N D) memory per batch element, with one eigendecomposition,
        which takes several times as long as the Stein estimator's Cholesky factorisation.

    Example:
        >>> import torch
        >>> samples = torch.tensor([[-1.0], [0.0], [1.0]])
        >>> print(spectral_score(samples).T.round(decimals=2) + 0.0)
        tensor([[ 0.9600,  0.0000, -0.9600]])

    References:
        Shi, Sun and Zhu, `A Spectral Approach to Gradient Estimation for Implicit Distributions
        <https://arxiv.org/abs/1806.02925>`_, 2018, section 3. Whitening and the default kernel are
        ours; the paper's is ``RBF()``.
    """
    return _fit(samples, kernel, num_eigenfunctions, energy, whiten, caller="spectral_score").scores


def _fit(
    samples: Tensor,
    kernel: RadialKernel | None,
    num_eigenfunctions: int | None,
    energy: float,
    whiten: bool,
    *,
    caller: str,
) -> SpectralFit:
    samples = as_samples(samples, caller=caller)
    if num_eigenfunctions is not None:
        check_count(num_eigenfunctions, "num_eigenfunctions", caller=caller)
    elif not 0 < energy <= 1:
        raise ValueError(f"{caller} needs 0 < energy <= 1, got {energy}.")
    whitening, points, kernel, squared_distance = standardize(
        samples, kernel, whiten, caller=caller
    )
    value, derivative = kernel.derivatives(squared_distance, 1)
    eigenvalues, eigenvectors = torch.linalg.eigh(value)
    kept = _kept(eigenvalues, num_eigenfunctions, energy)
    inverse = torch.where(kept, 1 / torch.where(kept, eigenvalues, 1.0), 0.0)
    stein = -2 * weighted_differences(derivative, points, points)
    projected = inverse[..., None] * (eigenvectors.mT @ stein)
    return SpectralFit(
        scores=whitening.score(-(eigenvectors @ projected)),
        whitening=whitening,
        whitened=points,
        kernel=kernel,
        coefficients=-(eigenvectors @ (inverse[..., None] * projected)),
    )


def _kept(
    eigenvalues: Float[Tensor, " *batch N"], num_eigenfunctions: int | None, energy: float
) -> Tensor:
    """Which of the eigenvalues, in rising order, are kept: the largest always."""
    num_samples = eigenvalues.shape[-1]
    smallest = num_samples * torch.finfo(eigenvalues.dtype).eps
    # Rounding leaves eigenvalues of zero with either sign; they belong to no eigenfunction.
    positive = eigenvalues > smallest * eigenvalues[..., -1:]
    if num_eigenfunctions is not None:
        rank = torch.arange(num_samples, 0, -1, device=eigenvalues.device)
        return positive & (rank <= num_eigenfunctions)
    # Kept where the larger ones alone do not reach the share yet.
    falling = torch.flip(torch.clamp(eigenvalues, min=0.0), dims=(-1,))
    larger = torch.flip(torch.cumsum(falling, dim=-1) - falling, dims=(-1,))
    return positive & (larger < energy * torch.sum(falling, dim=-1, keepdim=True))
