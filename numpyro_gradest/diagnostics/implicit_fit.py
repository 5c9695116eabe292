"""Whether a guide with sites that can only be sampled has found the posterior."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_gradest.diagnostics.implicit_report import ImplicitFitReport, ImplicitSitesCheck
from numpyro_gradest.estimators import (
    fit_whitening,
    shrinkage,
    sliced_wasserstein,
    stein_identity,
)
from numpyro_gradest.estimators._validation import check_count
from numpyro_gradest.estimators.score.stein_discrepancy import stein_kernel_matrix
from numpyro_gradest.infer._model_score import ScoredGroup, score_draws
from numpyro_gradest.infer._site_estimators import SiteEstimators
from numpyro_gradest.infer._trace import Program
from numpyro_gradest.infer.implicit_elbo import ImplicitELBO, ScoreEstimator

_LARGEST_MATRIX = 10**7
"""Entries of the kernel matrices that are formed at once."""


def check_implicit_fit(
    rng_key: Array,
    model: Callable,
    guide: Callable,
    params: dict[str, Any],
    *args: Any,
    num_particles: int,
    num_samples: int = 1000,
    score_estimator: ScoreEstimator | None = None,
    reference: dict[str, Array] | None = None,
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
        rng_key: Random key.
        model: NumPyro model.
        guide: NumPyro guide.
        params: Fitted parameters, ``svi_result.params`` or ``svi.get_params(state)``.
        args: Arguments of model and guide, with all of the data.
        num_particles: K >= 2, as in the objective that the guide was fitted with.
        num_samples: N, the number of draws to look at, rounded up to a multiple of K; take 50 per
            dimension of the implicit sites of one plate element.
        score_estimator: As in the objective.
        reference: Draws from the posterior to compare with, by site, ``[R, *site shape]``: what the
            host's ``MCMC(...).get_samples()`` returns. With :class:`AutoImplicit` too, whose one
            implicit site joins all latents. Other sites are left out.
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
        >>> import numpyro
        >>> import numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro_gradest import Implicit
        >>> def model():
        ...     numpyro.sample("z", dist.Normal(3.0, 1.0))
        >>> def guide():
        ...     scale = numpyro.param("scale", 1.0)
        ...     noise = numpyro.sample(
        ...         "noise", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True}
        ...     )
        ...     numpyro.sample("z", Implicit(3.0 + scale * noise))
        >>> key = random.key(0)
        >>> check_implicit_fit(key, model, guide, {"scale": 1.0}, num_particles=50).is_trusted
        True
        >>> print(check_implicit_fit(key, model, guide, {"scale": 0.5}, num_particles=50))
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
    estimator = ImplicitELBO(num_particles, score_estimator=score_estimator).score_estimator
    program = Program(
        model,
        guide,
        params,
        args,
        kwargs,
        SiteEstimators("pathwise"),
        is_weighted=False,
        takes_implicit=True,
    )
    draw_key, line_key = jax.random.split(rng_key)
    num_draws = num_particles * math.ceil(num_samples / num_particles)
    groups = score_draws(program, draw_key, num_draws, reference)
    if not groups:
        raise ValueError(
            "check_implicit_fit needs a guide with Implicit sites, but this one has none. Where "
            "every site has a density, look at the effective_sample_size of importance_samples."
        )
    return ImplicitFitReport(
        tuple(_check(line_key, group, num_particles, estimator) for group in groups)
    )


def _check(
    key: Array, group: ScoredGroup, num_particles: int, estimator: ScoreEstimator
) -> ImplicitSitesCheck:
    """The figures of the worst element."""
    num_elements, num_samples, dim = group.samples.shape
    step = max(1, _LARGEST_MATRIX // num_samples**2)
    parts = [slice(start, start + step) for start in range(0, num_elements, step)]
    samples = [(group.samples[part], group.model_scores[part]) for part in parts]
    figures = jax.jit(partial(_figures, num_particles=num_particles, estimator=estimator))
    columns = zip(*[figures(*each) for each in samples], strict=True)
    c, eigenvalues, discrepancy, equivalent = map(jnp.concatenate, columns)
    distance, num_reference = None, 0
    if group.reference is not None:
        distances = jax.jit(_distances)(key, group.samples, group.reference)
        distance, num_reference = distances.max().item(), group.reference.shape[-2]
    return ImplicitSitesCheck(
        sites=group.sites,
        num_elements=num_elements,
        dim=dim,
        num_particles=num_particles,
        num_samples=num_samples,
        shrinkage=c[jnp.argmax(jnp.abs(c - 1))].item(),
        narrowest=eigenvalues.min().item(),
        widest=eigenvalues.max().item(),
        kernel_stein_discrepancy=discrepancy.max().item(),
        equivalent_draws=equivalent.min().item(),
        sliced_wasserstein=distance,
        num_reference=num_reference,
    )


def _figures(
    samples: Float[Array, " E N D"],
    scores: Float[Array, " E N D"],
    num_particles: int,
    estimator: ScoreEstimator,
) -> tuple[Array, ...]:
    c = _shrinkages(samples, num_particles, estimator)
    return c, _width_ratios(samples, scores), *_shapes(samples, scores)


def _shrinkages(
    samples: Float[Array, " E N D"], num_particles: int, estimator: ScoreEstimator
) -> Float[Array, " E"]:
    """c of every element, of scores that are estimated from K draws at a time.

    Centred at the mean of all N draws: at that of each K the true score itself would be at 1 - 1/K,
    and a guide of the right width needs the estimate to be at 1.
    """
    sets = samples.reshape(len(samples), -1, num_particles, samples.shape[-1])
    return shrinkage(samples, estimator(sets).reshape(samples.shape))


def _width_ratios(
    samples: Float[Array, " E N D"], scores: Float[Array, " E N D"]
) -> Float[Array, " E D"]:
    whitening = fit_whitening(samples)
    matrix = stein_identity(whitening.points(samples), whitening.whitened_score(scores))
    return jnp.linalg.eigvalsh((matrix + matrix.mT) / 2)


def _shapes(
    samples: Float[Array, " E N D"], scores: Float[Array, " E N D"]
) -> tuple[Float[Array, " E"], Float[Array, " E"]]:
    """The discrepancy, and the number of exact draws with one as large."""
    stein_kernel = stein_kernel_matrix(samples, scores)
    squared = stein_kernel.mean(axis=(-2, -1))
    of_one = jnp.diagonal(stein_kernel, axis1=-2, axis2=-1).mean(axis=-1)
    # The square is that of the draws themselves at least, but for chance.
    equivalent = of_one / jnp.maximum(squared, of_one / samples.shape[-2])
    return jnp.sqrt(jnp.maximum(squared, 0.0)), equivalent


def _distances(
    key: Array, samples: Float[Array, " E N D"], reference: Float[Array, " E R D"]
) -> Float[Array, " E"]:
    """In the standard deviations of the reference draws."""
    whitening = fit_whitening(reference)
    return sliced_wasserstein(key, whitening.points(samples), whitening.points(reference))
