"""Semi-implicit guides: log q(z), an integral over noise, from several draws of the noise.

Notation: z is drawn with the noise e_0; e_1, ..., e_J are further draws of the noise. The mixture
plates are those that enclose every sample site of the guide.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_gradest.estimators import iwae_bound
from pyro_gradest.infer._plates import (
    PARTICLE_PLATE,
    CommonPlates,
    common_plates,
    plate_dims,
    to_batch,
)
from pyro_gradest.infer._site_estimators import is_score_site
from pyro_gradest.infer._sites import (
    Site,
    Trace,
    is_auxiliary,
    is_deterministic,
    log_density,
    samples,
)
from pyro_gradest.infer._trace import Program, trace_guide_at


class Mixture(NamedTuple):
    """The guide's density at K particles, by element of the plates of model and guide."""

    log_q: Float[Tensor, " K *batch"]
    """log 1/(J+1) sum_j q(z | e_j), with scale; attached."""
    log_drawn: Float[Tensor, " K *batch"]
    """Log-density of all score-function draws, those of the noise e_0, ..., e_J included."""


class _Component(NamedTuple):
    """The guide at one draw of the noise, by element of the mixture plates."""

    log_q: Float[Tensor, " K *plates"]
    """log q(z | e), masked, without scale."""
    log_drawn: Float[Tensor, " K *plates"]
    """Log-density of the score-function draws among z, which happen whatever their mask."""
    log_noise: Float[Tensor, " K *plates"]
    """Log-density of the score-function draws among the noise."""


def read_mixture(
    program: Program,
    model_trace: Trace,
    guide_trace: Trace,
    num_particles: int,
    num_mixing: int,
) -> Mixture:
    """Draw the noise anew ``num_mixing`` times, and average the latents' density over the draws.

    Raises:
        ValueError: If the guide has no noise of its own, a latent is a point mass, the latents
            differ in scale, or a plate that does not enclose all sites of the guide is subsampled.
        NotImplementedError: If the guide has a sequential plate around all of its sites.
    """
    plates = common_plates(poutine.Trace(), guide_trace, is_weighted=False)
    latents = _check_guide(model_trace, guide_trace, plates)
    scale = _common_scale(latents, plates)

    own = _read(program, guide_trace, plates, num_particles)
    copies = num_mixing if program.vectorize_particles else 1
    others: list[tuple[Tensor, ...]] = []
    for _ in range(num_mixing // copies):
        trace = trace_guide_at(program, guide_trace, num_particles, copies)
        at = common_plates(poutine.Trace(), trace, is_weighted=False)
        runs = _read(program, trace, at, num_particles * copies)
        others += zip(*(part.split(num_particles) for part in runs), strict=True)
    log_q = iwae_bound(torch.stack([own.log_q, *(log_q for log_q, _, _ in others)]))
    log_drawn = sum((log_noise for _, _, log_noise in others), own.log_drawn + own.log_noise)

    inner = [name for name in plates.names if name != PARTICLE_PLATE]
    common = common_plates(model_trace, guide_trace, is_weighted=False).names
    summed = [1 + i for i, plate in enumerate(inner) if plate not in common]
    log_q = scale * log_q
    if summed:
        log_q, log_drawn = log_q.sum(summed), log_drawn.sum(summed)
    return Mixture(log_q, log_drawn)


def _read(
    program: Program, guide_trace: Trace, plates: CommonPlates, num_particles: int
) -> _Component:
    parts: dict[str, list[Tensor]] = {part: [] for part in _Component._fields}
    for _, site in samples(guide_trace):
        dims = plate_dims(site)
        if not is_auxiliary(site):
            log_prob = scale_and_mask(site["unscaled_log_prob"], mask=site["mask"])
            parts["log_q"].append(to_batch(log_prob, dims, plates))
        if is_score_site(site, program.estimators):
            part = "log_noise" if is_auxiliary(site) else "log_drawn"
            parts[part].append(to_batch(log_density(site), dims, plates))
    zero = torch.zeros_like(parts["log_q"][0])
    sums = (sum(terms, zero) for terms in parts.values())
    if PARTICLE_PLATE not in plates.names:
        sums = (total.expand(num_particles, *total.shape) for total in sums)
    return _Component(*sums)


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
        if name in model_trace.nodes:
            raise ValueError(
                f"Guide site {name!r} is marked auxiliary, but the model has it as well. Only "
                "noise that the model does not know can be averaged over: remove the mark, or "
                "rename it."
            )
    for name, site in latents:
        if is_deterministic(site["fn"]) and not site["is_observed"]:
            raise ValueError(
                f"Guide site {name!r} is a point mass, so that given other noise its value has no "
                "density. Draw it from a distribution of some width, such as a Normal around that "
                "value; or make it an Implicit site and use ImplicitELBO."
            )
    if plates.sequential:
        raise NotImplementedError(
            f"Mixtures inside sequential plates are not implemented, got {plates.sequential}. "
            "Write them as vectorised plates: with pyro.plate(...)."
        )
    for name, site in sites:
        for frame in site["cond_indep_stack"]:
            is_subsampled = frame.full_size is not None and frame.full_size != frame.size
            if frame.name not in plates.names and is_subsampled:
                outside = next(other for other, each in sites if not _is_in(frame.name, each))
                raise ValueError(
                    f"Plate {frame.name!r} is subsampled ({frame.size} of {frame.full_size}) but "
                    f"guide site {outside!r} lies outside of it, while {name!r} lies inside: the "
                    "mixture is over all of them together, and a subsample says nothing about the "
                    f"rest. Put {outside!r} inside the plate, or do not subsample {frame.name!r}."
                )
    return latents


def _is_in(plate: str, site: Site) -> bool:
    return any(frame.name == plate for frame in site["cond_indep_stack"])


def _common_scale(latents: list[tuple[str, Site]], plates: CommonPlates) -> float | Tensor:
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


def _scale(name: str, site: Site, plates: CommonPlates) -> float | Tensor:
    scale, dims = site["scale"], plate_dims(site)
    shape = getattr(scale, "shape", ())
    common = {dims[plate] for plate in plates.names}
    if any(size > 1 and i - len(shape) not in common for i, size in enumerate(shape)):
        raise ValueError(
            f"The scale of guide site {name!r} has shape {tuple(shape)}, and differs within one "
            "mixture, which only a common factor can multiply. Let it vary only along plates that "
            "enclose every site of the guide."
        )
    return to_batch(scale, dims, plates) if shape else scale


def _is_same(scale: Any, other: Any) -> bool:
    if isinstance(scale, Tensor) or isinstance(other, Tensor):
        scale, other = torch.as_tensor(scale), torch.as_tensor(other)
        return torch.allclose(scale, other.to(scale), rtol=1e-6, atol=0.0)
    return math.isclose(scale, other, rel_tol=1e-6)
