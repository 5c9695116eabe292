"""Posterior draws by importance resampling from a fitted guide.

Notation: K = num_particles draws from the guide, v their self-normalised weights.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_gradest.estimators import effective_sample_size, iwae_bound
from pyro_gradest.estimators._validation import check_count
from pyro_gradest.infer._particles import concatenate, read_particles, refuse_log_weights
from pyro_gradest.infer._plates import common_plates
from pyro_gradest.infer._site_estimators import SiteEstimators
from pyro_gradest.infer._trace import latent_axes, latent_values, trace_particles
from pyro_gradest.infer.iwae import IWAE
from pyro_gradest.infer.multisample_elbo import program_of


class ImportanceSamples(NamedTuple):
    """Draws resampled by weight, and how far to trust them.

    References:
        Rubin, The calculation of posterior distributions by data augmentation: comment, 1987.
    """

    samples: dict[str, Tensor]
    """Draws of each latent site, ``[num_samples, *site shape]``; pass to ``Predictive``."""
    effective_sample_size: Float[Tensor, " *batch"]
    """Number of particles that carry the weights, between 1 and K, per common-plate element."""
    log_evidence: Float[Tensor, " *batch"]
    """The K-sample bound in nats, per common-plate element."""


def importance_samples(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_samples: int = 1000,
    num_particles: int = 1000,
    max_plate_nesting: float = math.inf,
    vectorize_particles: bool = False,
    **kwargs: Any,
) -> ImportanceSamples:
    r"""Draw from the posterior by resampling K draws of the guide by their weights.

    Sampling importance resampling: particle k is drawn with probability v_k, independently for
    every element of the plates common to all sites of model and guide. The draws have the
    posterior's law as K grows, however poor the guide; the effective sample size says whether K
    was enough.

    Args:
        model: Pyro model.
        guide: Pyro guide.
        args: Arguments of model and guide.
        num_samples: Number of draws to return.
        num_particles: K, the number of draws from the guide.
        max_plate_nesting: As in the host's ELBO; guessed if left out.
        vectorize_particles: As in the host's ELBO: run all particles at once.
        kwargs: Keyword arguments of model and guide.

    Returns:
        :class:`ImportanceSamples`, whose ``samples`` go into
        ``Predictive(model, posterior_samples=...)``.

    Raises:
        TypeError: If a count is not an integer.
        ValueError: If a count is not positive, model and guide do not match, a log-probability
            is NaN, or all weights are zero.

    Bias and variance:
        Expectations under the draws are self-normalised, O(1/K).

    Cost:
        K evaluations of model and guide, and memory for K values of every latent.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     pyro.sample("z", dist.Normal(0.0, 2.0))
        >>> draws = importance_samples(
        ...     model, guide, torch.tensor(2.0), vectorize_particles=True
        ... )
        >>> draws.samples["z"].shape
        torch.Size([1000])
        >>> bool(abs(draws.samples["z"].mean() - 1.0) < 0.2)  # the posterior is Normal(1, 1/2)
        True

    References:
        Rubin, The calculation of posterior distributions by data augmentation: comment, 1987.
        Burda, Grosse and Salakhutdinov, `Importance Weighted Autoencoders
        <https://arxiv.org/abs/1509.00519>`_, 2016, for the bound.
    """
    check_count(num_samples, "num_samples", caller="importance_samples")
    check_count(num_particles, "num_particles", caller="importance_samples")
    elbo = IWAE(
        num_particles, max_plate_nesting=max_plate_nesting, vectorize_particles=vectorize_particles
    )
    program = program_of(elbo, model, guide, args, kwargs)
    program = program._replace(estimators=SiteEstimators("pathwise"))  # nothing is differentiated
    runs, values = [], []
    with torch.no_grad():
        for size in [num_particles] if vectorize_particles else [1] * num_particles:
            traces = trace_particles(program, size)
            runs.append(read_particles(program, *traces, size))
            values.append(latent_values(traces[0], size))
    particles = concatenate(runs)
    log_weights = particles.log_weights
    log_evidence = iwae_bound(log_weights)
    if not (log_evidence < math.inf).all():
        refuse_log_weights(particles)
    if log_evidence.isneginf().any():
        raise ValueError(
            f"importance_samples needs a particle of positive weight, but for some of the data all "
            f"{num_particles} have none. Widen the guide, or raise num_particles."
        )
    categorical = torch.distributions.Categorical(logits=log_weights.movedim(0, -1))
    choice = categorical.sample((num_samples,))
    axes = latent_axes(traces[0], common_plates(*traces, is_weighted=True))
    samples = {
        name: _choose(torch.cat([value[name] for value in values]), choice, axes[name])
        for name in axes
    }
    return ImportanceSamples(
        samples=samples,
        effective_sample_size=effective_sample_size(log_weights),
        log_evidence=log_evidence,
    )


def _choose(values: Tensor, choice: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Take ``values[choice[s, i], ..., i, ...]``, where i runs along ``axes`` of the values."""
    order = sorted(range(len(axes)), key=axes.__getitem__)
    shape = [1] * (values.dim() - 1)
    for axis, size in zip(axes, choice.shape[1:], strict=True):
        shape[axis] = size
    index = choice.permute(0, *(1 + i for i in order)).reshape(-1, *shape)
    return torch.take_along_dim(values, index, dim=0)
