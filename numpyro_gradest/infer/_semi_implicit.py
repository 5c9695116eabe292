"""Semi-implicit guides: log q(z), an integral over noise, from several draws of the noise.

Notation: z is drawn with the noise e_0; e_1, ..., e_J are further draws of the noise. The mixture
plates are those that enclose every sample site of the guide.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_gradest.estimators import iwae_bound
from numpyro_gradest.infer._plates import CommonPlates, common_plates, plate_dims, to_batch
from numpyro_gradest.infer._site_estimators import is_score_site
from numpyro_gradest.infer._sites import (
    Site,
    Trace,
    is_auxiliary,
    is_deterministic,
    log_prob_of,
    samples,
    unmasked,
)
from numpyro_gradest.infer._trace import Program, trace_guide_at


class Mixture(NamedTuple):
    """The guide's density at one particle, by element of the plates of model and guide."""

    log_q: Float[Array, " *batch"]
    """log 1/(J+1) sum_j q(z | e_j), with scale; attached."""
    log_drawn: Float[Array, " *batch"]
    """Log-density of all score-function draws, those of the noise e_0, ..., e_J included."""


class _Component(NamedTuple):
    """The guide at one draw of the noise, by element of the mixture plates."""

    log_q: Float[Array, " *plates"]
    """log q(z | e), masked, without scale."""
    log_drawn: Float[Array, " *plates"]
    """Log-density of the score-function draws among z, which happen whatever their mask."""
    log_noise: Float[Array, " *plates"]
    """Log-density of the score-function draws among the noise."""


def read_mixture(
    program: Program,
    model_trace: Trace,
    guide_trace: Trace,
    keys: Array,
    map_fn: Callable[[Callable, Array], Any],
) -> Mixture:
    """Draw the noise anew for each key, and average the density of the latents over the draws.

    Raises:
        ValueError: If the guide has no noise of its own, a latent is a point mass, the latents
            differ in scale, or a plate that does not enclose all sites of the guide is subsampled.
    """
    plates = common_plates({}, guide_trace, is_weighted=False)
    latents = _check_guide(model_trace, guide_trace, plates)
    scale = _common_scale(latents, plates)

    def redraw(key: Array) -> _Component:
        return _read(program, trace_guide_at(program, guide_trace, key), plates)

    own, others = _read(program, guide_trace, plates), map_fn(redraw, keys)
    log_q = iwae_bound(jnp.concatenate([own.log_q[None], others.log_q]))
    log_drawn = own.log_drawn + own.log_noise + others.log_noise.sum(axis=0)
    common = common_plates(model_trace, guide_trace, is_weighted=False).names
    summed = tuple(i for i, plate in enumerate(plates.names) if plate not in common)
    return Mixture((scale * log_q).sum(summed), log_drawn.sum(summed))


def _read(program: Program, guide_trace: Trace, plates: CommonPlates) -> _Component:
    parts = dict.fromkeys(_Component._fields, jnp.zeros(plates.sizes))
    for name, site in samples(guide_trace):
        if not is_auxiliary(site):
            parts["log_q"] += to_batch(log_prob_of(name, site), plate_dims(site), plates)
        if is_score_site(site, program.estimators):
            part = "log_noise" if is_auxiliary(site) else "log_drawn"
            drawn = site | {"fn": unmasked(site["fn"])}
            parts[part] += to_batch(log_prob_of(name, drawn), plate_dims(site), plates)
    return _Component(**parts)


def _check_guide(
    model_trace: Trace, guide_trace: Trace, plates: CommonPlates
) -> list[tuple[str, Site]]:
    """The sites whose density is averaged."""
    sites = samples(guide_trace)
    noise = [item for item in sites if is_auxiliary(item[1])]
    latents = [item for item in sites if not is_auxiliary(item[1])]
    if not noise:
        raise ValueError(
            "SemiImplicitELBO needs a guide with noise to average over, but it has no auxiliary "
            'site. Draw the noise at one, sample("noise", dist.Normal(0, 1).expand([...]).'
            'to_event(1), infer={"is_auxiliary": True}), or use Trace_ELBO.'
        )
    for name, _ in noise:
        if name in model_trace:
            raise ValueError(
                f"Guide site {name!r} is marked auxiliary, but the model has it as well. Only "
                "noise that the model does not know can be averaged over: remove the mark, or "
                "rename it."
            )
    for name, site in latents:
        if is_deterministic(site) and not site["is_observed"]:
            raise ValueError(
                f"Guide site {name!r} is a point mass, so that given other noise its value has no "
                "density. Draw it from a distribution of some width, such as a Normal around that "
                "value; or make it an Implicit site and use ImplicitELBO."
            )
    for name, site in sites:
        for frame in site["cond_indep_stack"]:
            plate_site = model_trace.get(frame.name) or guide_trace.get(frame.name)
            full_size = plate_site["args"][0] if plate_site else frame.size
            if frame.name not in plates.names and full_size != frame.size:
                outside = next(other for other, each in sites if frame.name not in plate_dims(each))
                raise ValueError(
                    f"Plate {frame.name!r} is subsampled ({frame.size} of {full_size}) but guide "
                    f"site {outside!r} lies outside of it, while {name!r} lies inside: the mixture "
                    "is over all of them together, and a subsample says nothing about the rest. "
                    f"Put {outside!r} inside the plate, or do not subsample {frame.name!r}."
                )
    return latents


def _common_scale(
    latents: list[tuple[str, Site]], plates: CommonPlates
) -> float | Float[Array, " *plates"]:
    """The scale of the latents, which multiplies the log of the mixture."""
    (first, site), *others = latents
    scale = _scale(first, site, plates)
    for name, other in others:
        if not _is_same(scale, _scale(name, other, plates)):
            raise ValueError(
                f"Guide sites {first!r} and {name!r} differ in scale, but their density is that "
                "of one mixture, which only a common factor can multiply. Give them the same."
            )
    return scale


def _scale(name: str, site: Site, plates: CommonPlates) -> float | Array:
    scale = 1.0 if site["scale"] is None else site["scale"]
    dims, shape = plate_dims(site), jnp.shape(scale)
    common = {dims[plate] for plate in plates.names}
    if any(size > 1 and i - len(shape) not in common for i, size in enumerate(shape)):
        raise ValueError(
            f"The scale of guide site {name!r} has shape {shape}, and differs within one mixture, "
            "which only a common factor can multiply. Let it vary only along plates that enclose "
            "every site of the guide."
        )
    return to_batch(jnp.asarray(scale), dims, plates) if shape else scale


def _is_same(scale: Any, other: Any) -> bool:
    """Whether two scales are the same; arrays that are traced can't be compared."""
    if any(isinstance(each, jax.core.Tracer) for each in (scale, other)):
        return True
    if all(isinstance(each, int | float) for each in (scale, other)):
        return math.isclose(scale, other, rel_tol=1e-6)
    return bool(jnp.allclose(scale, other, rtol=1e-6, atol=0.0))
