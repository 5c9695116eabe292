"""The seam: what leaves it is arrays, one log-weight per particle and element of the common plates.

Only this module and those it builds on know what a trace (``_trace``), a plate (``_plates``), a
scale or a mask (``_sites``) is. The common plates are those that enclose every sample site of both
model and guide.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float
from pyro.distributions.util import scale_and_mask
from pyro.ops.provenance import detach_provenance
from torch import Tensor

from pyro_gradest.infer._antithetic import antithetic_term, trace_pair
from pyro_gradest.infer._credit import Credit, TrackDraws, Upstream, upstream_sites
from pyro_gradest.infer._graph import Cut
from pyro_gradest.infer._plates import (
    PARTICLE_PLATE,
    CommonPlates,
    common_plates,
    plate_dims,
    plates_of,
    to_batch,
)
from pyro_gradest.infer._site_estimators import SiteEstimators, is_apart, is_score_site
from pyro_gradest.infer._sites import (
    Site,
    Trace,
    both,
    log_density,
    mask_of,
    samples,
)
from pyro_gradest.infer._trace import Program, trace_particles

Scale = float | Tensor
Turn = tuple[int, ...]

_PARTS = ("log_p", "log_q_score", "log_q_path", "log_q_draw", "antithetic")
_NOT_DRAWN = ("log_p", "log_q_path")
"""All other parts hold the density of a draw, which happens whatever its scale and mask."""
_SIGNAL = "signal of "


class Particles(NamedTuple):
    """Log-probabilities in nats of K particles; tensors are ``[K, *batch]``."""

    log_p: Float[Tensor, " K *batch"]
    """log p(x, z), summed over all sites of the model."""
    log_q_score: Float[Tensor, " K *batch"]
    """Log-density of the draws at the guide's score-function sites, whose values are detached. A
    draw happens whatever its scale and mask: they are left out."""
    log_q_path: Float[Tensor, " K *batch"]
    """The rest of log q: the reparameterised sites, whose values are attached, and what scale and
    mask add to the score-function sites."""
    log_q_draw: Float[Tensor, " K *batch"]
    """Under ``"dreg"`` and ``"stl"``: log-density of the reparameterised draws, taken out of
    ``log_q_path``, which keeps what scale and mask add. Zeros otherwise."""
    antithetic: Float[Tensor, " K *batch"]
    """At antithetic pairs: a sum over their sites, whose gradient takes the place of that of
    ``log_q_score`` beside the learning signal. Zeros otherwise."""
    bound_scale: Float[Tensor, " K *batch"]
    """What multiplies the bound: N/B of subsampled plates, and a scale common to all sites."""
    largest: dict[str, Float[Tensor, " runs"]]
    """For each site the largest term that it adds to a log-weight: NaN or +inf show a fault."""
    paths: tuple[tuple[Cut, ...], ...]
    """Under ``"dreg"`` and ``"stl"``: the reparameterised draws of each run, in their order."""
    log_q_signals: dict[str, Float[Tensor, " K *batch"]]
    """As ``log_q_score``, of the sites with a learning signal of their own: one entry for each
    signal, by the first site that has it."""
    credits: dict[str, Credit]
    """If asked for, by score-function site: its ``log_q_score`` and what is downstream of it."""

    @property
    def log_weights(self) -> Float[Tensor, " K *batch"]:
        """log p(x, z) - log q(z), detached."""
        log_weights = self.log_p - self.log_q_path - self.log_q_score - self.log_q_draw
        return (log_weights - sum(self.log_q_signals.values())).detach()


def run_particles(program: Program, num_particles: int) -> Particles:
    """Run the guide, then the model at the guide's values, and read their log-probabilities."""
    if program.vectorize_particles and num_particles > 1:
        return _run(program, num_particles)
    return concatenate([_run(program, 1) for _ in range(num_particles)])


def _run(program: Program, num_particles: int) -> Particles:
    if program.is_antithetic:
        pair = trace_pair(program, num_particles)
        return _pair(*(read_particles(program, *traces, num_particles) for traces in pair))
    if program.has_credits:
        with TrackDraws() as tracker:
            traces = trace_particles(program, num_particles)
        tracker.note_log_probs(*traces)
        particles = read_particles(program, *traces, num_particles)
        return detach_provenance(particles)  # type: ignore[type-var]  # takes tuples, too
    return read_particles(program, *trace_particles(program, num_particles), num_particles)


def concatenate(runs: list[Particles]) -> Particles:
    """Join particles along axis 0."""
    *parts, largest, paths, log_q_signals, credits = zip(*runs, strict=True)
    tensors = map(torch.cat, parts)
    by_site: dict[str, list[Tensor]] = defaultdict(list)
    for run in largest:  # particles may take branches of their own
        for site, terms in run.items():
            by_site[site].append(terms)
    joined = {site: torch.cat(terms) for site, terms in by_site.items()}
    zeros = [torch.zeros_like(log_p) for log_p in parts[0]]
    signals = {
        key: torch.cat([run.get(key, zero) for run, zero in zip(log_q_signals, zeros, strict=True)])
        for key in dict.fromkeys(key for run in log_q_signals for key in run)
    }
    if any(credits):
        _check_same_sites(largest)
    by_run = {site: [run[site] for run in credits] for site in credits[0]}
    joined_credits = {
        site: Credit._make(map(torch.cat, zip(*of_site, strict=True)))
        for site, of_site in by_run.items()
    }
    return Particles._make([*tensors, joined, sum(paths, ()), signals, joined_credits])


def read_particles(
    program: Program, model_trace: Trace, guide_trace: Trace, num_particles: int
) -> Particles:
    """Sum the log-probabilities of all sites to one number per element of the common plates."""
    plates = common_plates(model_trace, guide_trace, is_weighted=program.is_weighted)
    terms = [_read_site("log_p", name, site, plates) for name, site in samples(model_trace)]
    for name, site in samples(guide_trace):
        terms.append(_read_site(_part_of(site, program.estimators), name, site, plates))

    common_scale = _common_scale(terms, plates)
    is_active = _is_active(terms, plates)
    totals: dict[tuple[str, Turn], list[Tensor]] = defaultdict(list)
    largest: dict[str, Tensor] = {}
    for term in terms:
        is_scaled = not _is_same_number(term.scale, common_scale)
        log_prob = term.scale * term.log_prob if is_scaled else term.log_prob
        total = to_batch(log_prob, term.dims, plates)
        if is_scaled:
            total = total / common_scale
        if total.numel():
            added = total.detach() if term.part == "log_p" else -total.detach()
            largest[_where(term)] = added.amax().reshape(1)
        if term.part not in _NOT_DRAWN and (is_scaled or term.mask is not True):
            density = to_batch(log_density(term.site), term.dims, plates)
            if isinstance(is_active, Tensor):
                density = density.masked_fill(~is_active, 0.0)
            totals["log_q_path", term.turn].append(total - density)
            total = density
        totals[term.part, term.turn].append(total)
        if "partner" in term.site:
            antithetic = to_batch(antithetic_term(term.site), term.dims, plates)
            if isinstance(is_active, Tensor):
                antithetic = antithetic.masked_fill(~is_active, 0.0)
            totals["antithetic", term.turn].append(antithetic)

    parts = _stack_turns(totals, plates)
    tensors = [parts.pop(part) for part in _PARTS]
    if isinstance(common_scale, Tensor) and plates.sequential:
        common_scale = common_scale[..., None]
    tensors.append(torch.full_like(tensors[0], plates.subsample_scale) * common_scale)
    if PARTICLE_PLATE not in plates.names:
        tensors = [tensor.expand(num_particles, *tensor.shape) for tensor in tensors]
        parts = {part: total.expand(num_particles, *total.shape) for part, total in parts.items()}
    path = tuple(
        Cut(site["path_value"], site["value"], program.estimators.path_kind(site))
        for _, site in samples(guide_trace)
        if "path_value" in site
    )
    signals = {part.removeprefix(_SIGNAL): total for part, total in parts.items()}
    credits = {}
    if program.has_credits:
        score_sites = [term for term in terms if term.part == "log_q_score"]
        upstream = upstream_sites(model_trace, guide_trace, {term.name for term in score_sites})
        for term in score_sites:
            downstream = _downstream_of(term, terms, upstream)
            credits[term.name] = _read_credit(term, downstream, plates, num_particles)
    return Particles._make([*tensors, largest, (path,), signals, credits])


def _downstream_of(
    site: "_Term", terms: list["_Term"], upstream: dict[tuple[str, str], Upstream]
) -> list["_Term"]:
    """The terms that depend on the draw of a site; their plates are those it shares with them."""
    if site.site["is_observed"]:
        raise ValueError(
            f"Guide site {site.name!r} is a factor, which stands for draws that the guide has made "
            'by itself, so that what is downstream of them is not known. Use credit="whole".'
        )
    downstream = []
    for term in terms:
        above = upstream["model" if term.part == "log_p" else "guide", term.name]
        if site.name in above:
            dims = {plate: dim for plate, dim in term.dims.items() if plate in above[site.name]}
            downstream.append(term._replace(dims=dims))
    return downstream


def _read_credit(
    site: "_Term", downstream: list["_Term"], plates: CommonPlates, num_particles: int
) -> Credit:
    own_plates = plates_of(site.site)
    log_q = to_batch(log_density(site.site), site.dims, own_plates)
    is_active = _is_active(downstream, own_plates)
    if isinstance(is_active, Tensor):
        log_q = log_q.masked_fill(~is_active, 0.0)
    cost = torch.zeros_like(log_q)
    for term in downstream:
        total = to_batch(term.scale * term.log_prob, term.dims, own_plates)
        cost = cost + (total if term.part == "log_p" else -total)
    credit = Credit(log_q, plates.subsample_scale * cost.detach())
    if PARTICLE_PLATE not in own_plates.names:
        credit = Credit._make(one.expand(num_particles, *one.shape) for one in credit)
    return credit


def _check_same_sites(runs: Iterable[dict[str, Tensor]]) -> None:
    """The costs of a site are compared between particles, all of which have to have it."""
    first, *others = map(set, runs)
    for other in others:
        if different := sorted(first ^ other):
            raise ValueError(
                f"The {different[0]} is there at some particles only: model or guide branches on a "
                'draw, but credit="downstream" compares the costs of a site between particles. Use '
                'credit="whole".'
            )


def _pair(first: Particles, partner: Particles) -> Particles:
    """The two draws of a pair along one more axis of the batch, in front; each counts half."""
    runs = [first, partner]
    *parts, largest, paths, _, _ = zip(*runs, strict=True)
    *tensors, bound_scale = (torch.stack(part, dim=1) for part in parts)
    joined = {site: torch.cat([one, largest[1][site]]) for site, one in largest[0].items()}
    return Particles._make([*tensors, bound_scale / 2, joined, sum(paths, ()), {}, {}])


class _Term(NamedTuple):
    """The contribution of one sample site."""

    part: str
    name: str
    site: Site
    log_prob: Tensor
    """Masked, without scale."""
    dims: dict[str, int]
    turn: Turn
    scale: Scale
    """The product of the scale handlers (and of N/B of plates that are not common)."""
    mask: bool | Tensor


def _part_of(site: Site, estimators: SiteEstimators) -> str:
    """Where the density of a guide site goes: a field of the particles, or the key of a signal."""
    if (key := estimators.note(site)) is not None:
        return _SIGNAL + key
    if is_score_site(site, estimators):
        return "log_q_score"
    return "log_q_draw" if is_apart(site, estimators) else "log_q_path"


def _read_site(part: str, name: str, site: Site, plates: CommonPlates) -> _Term:
    counters = {frame.name: frame.counter for frame in site["cond_indep_stack"]}
    if not site["log_prob"].is_floating_point():
        raise TypeError(
            f"The log-probability at site {name!r} has dtype {site['log_prob'].dtype}, but weights "
            "and gradients need a floating one. Convert it with .float() or .double()."
        )
    return _Term(
        part=part,
        name=name,
        site=site,
        log_prob=scale_and_mask(site["unscaled_log_prob"], mask=site["mask"]),
        dims=plate_dims(site),
        turn=tuple(counters[plate] for plate in plates.sequential),
        scale=site["scale"] / plates.subsample_scale,
        mask=both(mask_of(site["fn"]), True if site["mask"] is None else site["mask"]),
    )


def _stack_turns(
    totals: dict[tuple[str, Turn], list[Tensor]], plates: CommonPlates
) -> dict[str, Tensor]:
    """Sum each part, ``[*plates]``, with the turns of sequential plates as one more axis."""
    turns = sorted({turn for _, turn in totals}) or [()]
    example = next(iter(totals.values()))[0] if totals else torch.zeros(plates.sizes)
    zero = torch.zeros_like(example)
    parts = {}
    for part in dict.fromkeys([*_PARTS, *(part for part, _ in totals)]):
        sums = [sum(totals.get((part, turn), ()), zero) for turn in turns]
        parts[part] = torch.stack(sums, dim=-1) if plates.sequential else sums[0]
    return parts


def _common_scale(terms: list[_Term], plates: CommonPlates) -> Scale:
    """The scale that all sites share, which multiplies the bound; 1 where they do not agree.

    Scaling the whole of model and guide scales the objective. Inside the log-mean-exp the same
    factor would temper the weights instead, and the bound would no longer be one.
    """
    if not terms:
        return 1.0
    first = terms[0].scale
    if not any(isinstance(term.scale, Tensor) for term in terms):
        is_shared = all(_is_same_number(term.scale, first) for term in terms)
        return first if is_shared and first != 0 else 1.0
    if any(_varies_within_batch(term, plates) for term in terms):
        return 1.0
    scales = [
        to_batch(torch.as_tensor(term.scale).to(term.log_prob), term.dims, plates) for term in terms
    ]
    is_same = [torch.isclose(scale, scales[0], rtol=1e-6, atol=0.0) for scale in scales]
    shared = torch.stack([*is_same, scales[0] != 0]).all(dim=0)
    return torch.where(shared, scales[0], torch.ones_like(scales[0]))


def _varies_within_batch(term: _Term, plates: CommonPlates) -> bool:
    """Whether the scale of a site differs among what one weight sums."""
    shape = getattr(term.scale, "shape", ())
    common_dims = {term.dims[plate] for plate in plates.names}
    return any(size > 1 and i - len(shape) not in common_dims for i, size in enumerate(shape))


def _is_active(terms: list[_Term], plates: CommonPlates) -> bool | Tensor:
    """Whether any site counts, by element of the common plates: none does in padding."""
    if plates.sequential or any(term.mask is True for term in terms):
        return True
    active = torch.zeros(plates.sizes, dtype=torch.bool)
    for term in terms:
        mask = torch.as_tensor(term.mask, device=term.log_prob.device)
        mask = mask.expand(term.log_prob.shape)
        active = active.to(mask.device) | (to_batch(mask.int(), term.dims, plates) > 0)
    return active


def _is_same_number(scale: Scale, other: Scale) -> bool:
    if isinstance(scale, Tensor) or isinstance(other, Tensor):
        return False
    return math.isclose(scale, other, rel_tol=1e-6)


def _where(term: _Term) -> str:
    side = "model" if term.part == "log_p" else "guide"
    return f"{side} site {term.name!r}"


def refuse_log_weights(*runs: Particles) -> None:
    """Raise for a log-weight that is NaN or +inf, naming the site."""
    largest = [item for particles in runs for item in particles.largest.items()]
    for site, terms in largest:
        if terms.isnan().any():
            raise ValueError(
                f"The log-probability at {site} is NaN. Check the parameters of its distribution "
                "and the data; no parameter has been updated."
            )
    for site, terms in largest:
        if terms.isposinf().any():
            raise ValueError(
                f"A log-weight is +inf, as the log-probability at {site} is infinite: a draw lies "
                "outside of the guide's own support, or where a density has a pole. Keep draws off "
                "the edge of the support (rounding may put them there); no parameter has been "
                "updated."
            )
    if any(particles.log_weights.isneginf().any() for particles in runs):
        raise ValueError(
            "The loss is infinite, as the model gives a draw of the guide no probability at all. "
            "Keep the guide inside of the model's support, or use an objective of several weighted "
            "particles; no parameter has been updated."
        )
    raise ValueError(
        "The loss is NaN although every log-probability is a number. Check the scale handlers of "
        "model and guide; no parameter has been updated."
    )
