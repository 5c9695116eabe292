"""Posterior draws by importance resampling from a fitted guide.

Notation: K = num_particles draws from the guide, v their self-normalised weights.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_gradest.estimators import effective_sample_size, iwae_bound
from numpyro_gradest.estimators._validation import check_count
from numpyro_gradest.infer._particles import read_particle, refuse_log_weights
from numpyro_gradest.infer._plates import common_plates
from numpyro_gradest.infer._site_estimators import SiteEstimators
from numpyro_gradest.infer._trace import Program, latent_axes, latent_values, trace_particle


class ImportanceSamples(NamedTuple):
    """Draws resampled by weight, and how far to trust them.

    References:
        Rubin, The calculation of posterior distributions by data augmentation: comment, 1987.
    """

    samples: dict[str, Array]
    """Draws of each latent site, ``[num_samples, *site shape]``; pass to ``Predictive``."""
    effective_sample_size: Float[Array, " *batch"]
    """Number of particles that carry the weights, between 1 and K, per common-plate element."""
    log_evidence: Float[Array, " *batch"]
    """The K-sample bound in nats, per common-plate element."""


def importance_samples(
    rng_key: Array,
    model: Callable,
    guide: Callable,
    params: dict[str, Any],
    *args: Any,
    num_samples: int = 1000,
    num_particles: int = 1000,
    **kwargs: Any,
) -> ImportanceSamples:
    r"""Draw from the posterior by resampling K draws of the guide by their weights.

    Sampling importance resampling: particle k is drawn with probability v_k, independently for
    every element of the plates common to all sites of model and guide. The draws have the
    posterior's law as K grows, however poor the guide; the effective sample size says whether K
    was enough.

    Args:
        rng_key: Random key.
        model: NumPyro model.
        guide: NumPyro guide.
        params: Fitted parameters, ``svi_result.params`` or ``svi.get_params(state)``.
        args: Arguments of model and guide.
        num_samples: Number of draws to return.
        num_particles: K, the number of draws from the guide.
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
        >>> import numpyro
        >>> import numpyro.distributions as dist
        >>> from jax import numpy as jnp, random
        >>> def model(x):
        ...     z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     numpyro.sample("z", dist.Normal(0.0, 2.0))
        >>> draws = importance_samples(random.key(0), model, guide, {}, 2.0)
        >>> draws.samples["z"].shape
        (1000,)
        >>> bool(abs(draws.samples["z"].mean() - 1.0) < 0.2)  # the posterior is Normal(1, 1/2)
        True

    References:
        Rubin, The calculation of posterior distributions by data augmentation: comment, 1987.
        Burda, Grosse and Salakhutdinov, `Importance Weighted Autoencoders
        <https://arxiv.org/abs/1509.00519>`_, 2016, for the bound.
    """
    check_count(num_samples, "num_samples", caller="importance_samples")
    check_count(num_particles, "num_particles", caller="importance_samples")
    plate_key, particle_key, choice_key = jax.random.split(rng_key, 3)
    estimators = SiteEstimators("pathwise")  # nothing is differentiated
    program = Program(model, guide, params, args, kwargs, estimators, is_weighted=True)
    program = program.with_plate_key(plate_key)
    axes: dict[str, tuple[int, ...]] = {}

    def run(key: Array) -> tuple:
        traces = trace_particle(program, key)
        axes.update(latent_axes(traces[0], common_plates(*traces, is_weighted=True)))
        return read_particle(program, *traces), latent_values(traces[0])

    particles, values = jax.vmap(run)(jax.random.split(particle_key, num_particles))
    refuse_log_weights(particles)
    log_weights = particles.log_weights
    log_evidence = iwae_bound(log_weights)
    _refuse_no_weight(log_evidence, num_particles)
    shape = (num_samples, *log_weights.shape[1:])
    choice = jax.random.categorical(choice_key, log_weights, axis=0, shape=shape)
    return ImportanceSamples(
        samples={name: _choose(value, choice, axes[name]) for name, value in values.items()},
        effective_sample_size=effective_sample_size(log_weights),
        log_evidence=log_evidence,
    )


def _refuse_no_weight(log_evidence: Array, num_particles: int) -> None:
    """Raise where no particle can be drawn; values that are being traced pass."""
    if not isinstance(log_evidence, jax.core.Tracer) and jnp.isneginf(log_evidence).any():
        raise ValueError(
            f"importance_samples needs a particle of positive weight, but for some of the data all "
            f"{num_particles} have none. Widen the guide, or raise num_particles."
        )


def _choose(values: Array, choice: Array, axes: tuple[int, ...]) -> Array:
    """Take ``values[choice[s, i], ..., i, ...]``, where i runs along ``axes`` of the values."""
    order = sorted(range(len(axes)), key=axes.__getitem__)
    shape = [1] * (values.ndim - 1)
    for axis, size in zip(axes, choice.shape[1:], strict=True):
        shape[axis] = size
    index = choice.transpose(0, *(1 + i for i in order)).reshape(-1, *shape)
    return jnp.take_along_axis(values, index, axis=0)
