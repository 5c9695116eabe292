"""Whether a guide with sites that can only be sampled has found the posterior."""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_gradest.diagnostics.implicit_report import ImplicitFitReport, ImplicitSitesCheck
from pyro_gradest.estimators import (
    fit_whitening,
    shrinkage,
    sliced_wasserstein,
    stein_identity,
)
from pyro_gradest.estimators._validation import check_count
from pyro_gradest.estimators.score.stein_discrepancy import stein_kernel_matrix
from pyro_gradest.infer._implicit import implicit_parents
from pyro_gradest.infer._model_score import ScoredGroup, score_draws
from pyro_gradest.infer._random import replayed
from pyro_gradest.infer._site_estimators import SiteEstimators
from pyro_gradest.infer.implicit_elbo import ImplicitELBO, ScoreEstimator
from pyro_gradest.infer.multisample_elbo import program_of

_LARGEST_MATRIX = 10**7
"""Entries of the kernel matrices that are formed at once."""


def check_implicit_fit(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_particles: int,
    num_samples: int = 1000,
    score_estimator: ScoreEstimator | None = None,
    reference: dict[str, Tensor] | None = None,
    max_plate_nesting: float = math.inf,
    vectorize_particles: bool = False,
    **kwargs: Any,
) -> ImplicitFitReport:
    r"""Tell whether a fit with :class:`Implicit` sites can be trusted, and what to change if not.

    Draws from the guide, in unconstrained space, and asks four questions of the implicit sites,
    of each plate element where they lie in plates. ``print`` the answer.

    - Is the score estimate of full size? The :func:`shrinkage` c of the estimator at K particles;
      between 0.9 and 1.1, as the guide's variance is off by as much. The default estimator is
      calibrated to 1, so that the next question is the one that tells.
    - Is the guide as wide as the target? Eigenvalues of :func:`stein_identity` in whitened
      coordinates, symmetrised; between 2/3 and 3/2, a standard deviation off by 22 %, beyond what
      draws of the target would show by chance.
    - Is it in the right place and shape? :func:`kernel_stein_discrepancy`, as the number of exact
      draws with one as large, :math:`E[h(x, x)] / \mathrm{KSD}^2`; 25 or more, whose mean is off
      by a fifth of a standard deviation.
    - Does it miss a mode? Nothing above can tell: only :func:`sliced_wasserstein` to reference
      draws does, such as those of MCMC; below a quarter of their standard deviation, and
      2 / sqrt(number) for chance.

    All other latents are held at the guide's draws, each element at those of the others: that a
    guide ignores correlation between plates, or with explicit sites, is not seen.

    Args:
        model: Pyro model.
        guide: Pyro guide, fitted.
        args: Arguments of model and guide, with all of the data.
        num_particles: K >= 2, as in the objective that the guide was fitted with.
        num_samples: N, the number of draws to look at, rounded up to a multiple of K; take 50 per
            dimension of the implicit sites of one plate element.
        score_estimator: As in the objective.
        reference: Draws from the posterior to compare with, by site, ``[R, *site shape]``: what the
            host's ``MCMC(...).get_samples()`` returns. With :class:`AutoImplicit` too, whose one
            implicit site joins all latents. Other sites are left out.
        max_plate_nesting: As in the host's ELBO; guessed if left out.
        vectorize_particles: As in the host's ELBO: run all draws at once.
        kwargs: Keyword arguments of model and guide.

    Returns:
        :class:`ImplicitFitReport`, with ``is_trusted``, the figures, and words when printed.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a number is too small, the guide has no implicit site or one that
            :class:`ImplicitELBO` refuses, a plate is subsampled, a draw or its score is not finite,
            or the reference draws lack a site, differ in number or have another shape.

    Bias and variance:
        Each figure is asymptotically unbiased in K of its draws, but for the shrinkage, which is
        that of the estimator at K particles. The worst of many elements is worse by chance.

    Cost:
        N evaluations of model and guide and the model's gradient; O(N^2 D) time for each element.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyro_gradest import Implicit
        >>> pyro.set_rng_seed(0)
        >>> def model():
        ...     pyro.sample("z", dist.Normal(3.0, 1.0))
        >>> def guide(scale):
        ...     noise = pyro.sample("noise", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        ...     pyro.sample("z", Implicit(3.0 + scale * noise))
        >>> options = {"num_particles": 50, "vectorize_particles": True}
        >>> check_implicit_fit(lambda scale: model(), guide, 1.0, **options).is_trusted
        True
        >>> print(check_implicit_fit(lambda scale: model(), guide, 0.5, **options))
        sites  D  shrinkage  narrowest  widest  worth draws  distance
        z      1  ...        0.2...
        Do not trust this fit:
        - z: in some direction the guide has 0.2... of the target's variance: too narrow. ...

    References:
        Li and Turner, `Gradient Estimators for Implicit Models
        <https://arxiv.org/abs/1705.07107>`_, 2018, for the estimator. Gorham and Mackey,
        `Measuring Sample Quality with Kernels <https://arxiv.org/abs/1703.01717>`_, 2017.
    """
    check_count(num_samples, "num_samples", caller="check_implicit_fit")
    elbo = ImplicitELBO(
        num_particles,
        score_estimator=score_estimator,
        max_plate_nesting=max_plate_nesting,
        vectorize_particles=vectorize_particles,
    )
    program = program_of(elbo, model, guide, args, kwargs)
    with replayed():
        parents = implicit_parents(guide, args, kwargs)
    if not parents:
        raise ValueError(
            "check_implicit_fit needs a guide with Implicit sites, but this one has none. Where "
            "every site has a density, look at the effective_sample_size of importance_samples."
        )
    program = program._replace(
        parents=parents, is_weighted=False, estimators=SiteEstimators("pathwise")
    )
    num_draws = num_particles * math.ceil(num_samples / num_particles)
    groups = score_draws(program, num_draws, reference)
    checks = (_check(group, num_particles, elbo.score_estimator) for group in groups)
    return ImplicitFitReport(tuple(checks))


def _check(group: ScoredGroup, num_particles: int, estimator: ScoreEstimator) -> ImplicitSitesCheck:
    """The figures of the worst element."""
    num_elements, num_samples, dim = group.samples.shape
    step = max(1, _LARGEST_MATRIX // num_samples**2)
    parts = [slice(start, start + step) for start in range(0, num_elements, step)]
    samples = [(group.samples[part], group.model_scores[part]) for part in parts]
    columns = zip(*[_figures(*each, num_particles, estimator) for each in samples], strict=True)
    c, eigenvalues, discrepancy, equivalent = map(torch.cat, columns)
    distance, num_reference = None, 0
    if group.reference is not None:
        distance = _distances(group.samples, group.reference).max().item()
        num_reference = group.reference.shape[-2]
    return ImplicitSitesCheck(
        sites=group.sites,
        num_elements=num_elements,
        dim=dim,
        num_particles=num_particles,
        num_samples=num_samples,
        shrinkage=c[(c - 1).abs().argmax()].item(),
        narrowest=eigenvalues.min().item(),
        widest=eigenvalues.max().item(),
        kernel_stein_discrepancy=discrepancy.max().item(),
        equivalent_draws=equivalent.min().item(),
        sliced_wasserstein=distance,
        num_reference=num_reference,
    )


def _figures(
    samples: Float[Tensor, " E N D"],
    scores: Float[Tensor, " E N D"],
    num_particles: int,
    estimator: ScoreEstimator,
) -> tuple[Tensor, ...]:
    c = _shrinkages(samples, num_particles, estimator)
    return c, _width_ratios(samples, scores), *_shapes(samples, scores)


def _shrinkages(
    samples: Float[Tensor, " E N D"], num_particles: int, estimator: ScoreEstimator
) -> Float[Tensor, " E"]:
    """c of every element, of scores that are estimated from K draws at a time.

    Centred at the mean of all N draws: at that of each K the true score itself would be at 1 - 1/K,
    and a guide of the right width needs the estimate to be at 1.
    """
    sets = samples.reshape(len(samples), -1, num_particles, samples.shape[-1])
    return shrinkage(samples, estimator(sets).detach().reshape(samples.shape))


def _width_ratios(
    samples: Float[Tensor, " E N D"], scores: Float[Tensor, " E N D"]
) -> Float[Tensor, " E D"]:
    whitening = fit_whitening(samples)
    matrix = stein_identity(whitening.points(samples), whitening.whitened_score(scores))
    return torch.linalg.eigvalsh((matrix + matrix.mT) / 2)


def _shapes(
    samples: Float[Tensor, " E N D"], scores: Float[Tensor, " E N D"]
) -> tuple[Float[Tensor, " E"], Float[Tensor, " E"]]:
    """The discrepancy, and the number of exact draws with one as large."""
    stein_kernel = stein_kernel_matrix(samples, scores)
    squared = stein_kernel.mean(dim=(-2, -1))
    of_one = stein_kernel.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    # The square is that of the draws themselves at least, but for chance.
    equivalent = of_one / torch.maximum(squared, of_one / samples.shape[-2])
    return squared.clamp(min=0.0).sqrt(), equivalent


def _distances(
    samples: Float[Tensor, " E N D"], reference: Float[Tensor, " E R D"]
) -> Float[Tensor, " E"]:
    """In the standard deviations of the reference draws."""
    whitening = fit_whitening(reference)
    return sliced_wasserstein(whitening.points(samples), whitening.points(reference))
