"""The seam: what leaves it is arrays, one log-weight per particle and element of the common plates.

Only this module and those it builds on know what a trace (``_trace``), a plate (``_plates``), a
scale or a mask (``_sites``) is. The common plates are those that enclose every sample site of both
model and guide.
"""

import math
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_gradest.infer._antithetic import antithetic_term, trace_pair
from numpyro_gradest.infer._credit import Credit, Upstream, upstream_sites
from numpyro_gradest.infer._plates import (
    CommonPlates,
    check_plate_shape,
    common_plates,
    plate_dims,
    plates_of,
    to_batch,
)
from numpyro_gradest.infer._site_estimators import SiteEstimators, is_apart, is_score_site
from numpyro_gradest.infer._sites import (
    Site,
    Trace,
    log_prob_of,
    mask_of,
    samples,
    unmasked,
)
from numpyro_gradest.infer._trace import (
    Program,
    mutable_state_of,
    trace_particle_along_paths,
)

Scale = float | Array

_PARTS = ("log_p", "log_q_path", "log_q_score", "log_q_draw", "antithetic")
_NOT_DRAWN = ("log_p", "log_q_path")
"""All other parts hold the density of a draw, which happens whatever its scale and mask."""
_SIGNAL = "signal of "


class Particles(NamedTuple):
    """Log-probabilities in nats of one particle, ``[*batch]``, or of several, ``[K, *batch]``."""

    log_p: Float[Array, " *batch"]
    """log p(x, z), summed over all sites of the model."""
    log_q_score: Float[Array, " *batch"]
    """Log-density of the draws at the guide's score-function sites, whose values are detached. A
    draw happens whatever its scale and mask: they are left out."""
    log_q_path: Float[Array, " *batch"]
    """The rest of log q: the reparameterised sites, whose values are attached, and what scale and
    mask add to the score-function sites."""
    log_q_draw: Float[Array, " *batch"]
    """Under ``"dreg"`` and ``"stl"``: log-density of the reparameterised draws, taken out of
    ``log_q_path``, which keeps what scale and mask add. Zeros otherwise."""
    antithetic: Float[Array, " *batch"]
    """At antithetic pairs: a sum over their sites, whose gradient takes the place of that of
    ``log_q_score`` beside the learning signal. Zeros otherwise."""
    bound_scale: Float[Array, " *batch"]
    """What multiplies the bound: N/B of subsampled plates, and a scale common to all sites."""
    mutable_state: dict[str, Any]
    """Values of the ``mutable`` sites after the run."""
    largest: dict[str, Float[Array, " *particles"]]
    """For each site the largest term that it adds to a log-weight: NaN or +inf show a fault."""
    log_q_signals: dict[str, Float[Array, " *batch"]]
    """As ``log_q_score``, of the sites with a learning signal of their own: one entry for each
    signal, by the first site that has it."""
    credits: dict[str, Credit]
    """If asked for, by score-function site: its ``log_q_score`` and what is downstream of it."""
    along_paths: "dict[str, Particles]"
    """Under ``"dreg"`` and ``"stl"``: the same once more, with no gradient but that along the paths
    that start at the reparameterised draws of a kind."""

    @property
    def log_weights(self) -> Float[Array, " *batch"]:
        """log p(x, z) - log q(z), detached."""
        log_weights = self.log_p - self.log_q_path - self.log_q_score - self.log_q_draw
        return jax.lax.stop_gradient(log_weights - sum(self.log_q_signals.values()))


def run_particle(program: Program, key: Array) -> Particles:
    """Run the guide, then the model at the guide's values, and read their log-probabilities."""
    if program.is_antithetic:
        return _pair(*(read_particle(program, *traces) for traces in trace_pair(program, key)))
    explicit, along = trace_particle_along_paths(program, key)
    along_paths = {kind: read_particle(program, *traces) for kind, traces in along.items()}
    return read_particle(program, *explicit)._replace(along_paths=along_paths)


def read_particle(program: Program, model_trace: Trace, guide_trace: Trace) -> Particles:
    """Sum the log-probabilities of all sites to one number per element of the common plates."""
    plates = common_plates(model_trace, guide_trace, is_weighted=program.is_weighted)
    terms = [_read_site("log_p", name, site, plates) for name, site in samples(model_trace)]
    for name, site in samples(guide_trace):
        terms.append(_read_site(_part_of(site, program.estimators), name, site, plates))

    common_scale = _common_scale(terms, plates)
    is_active = _is_active(terms, plates)
    parts = dict.fromkeys([*_PARTS, *(term.part for term in terms)])
    totals = dict.fromkeys(parts, jnp.zeros(plates.sizes))
    largest: dict[str, Array] = {}
    for term in terms:
        is_scaled = not _is_same_number(term.scale, common_scale)
        log_prob = term.scale * term.log_prob if is_scaled else term.log_prob
        total = to_batch(log_prob, term.dims, plates)
        if is_scaled:
            total /= common_scale
        added = jax.lax.stop_gradient(total if term.part == "log_p" else -total)
        largest[_where(term)] = jnp.max(added, initial=-jnp.inf)
        if term.part not in _NOT_DRAWN and (is_scaled or term.mask is not True):
            drawn = term.site | {"fn": unmasked(term.site["fn"])}
            density = to_batch(log_prob_of(term.name, drawn), term.dims, plates)
            density = jnp.where(is_active, density, 0.0)
            totals["log_q_path"] += total - density
            total = density
        totals[term.part] += total
        if "partner" in term.site:
            antithetic = to_batch(antithetic_term(term.site), term.dims, plates)
            totals["antithetic"] += jnp.where(is_active, antithetic, 0.0)
    credits = {}
    if program.has_credits:
        score_sites = [term for term in terms if term.part == "log_q_score"]
        names = {term.name for term in score_sites}
        upstream = upstream_sites(program, model_trace, guide_trace, names)
        for term in score_sites:
            credits[term.name] = _read_credit(term, _downstream_of(term, terms, upstream), plates)
    return Particles(
        log_p=totals["log_p"],
        log_q_score=totals["log_q_score"],
        log_q_path=totals["log_q_path"],
        log_q_draw=totals["log_q_draw"],
        antithetic=totals["antithetic"],
        bound_scale=plates.subsample_scale * common_scale * jnp.ones(plates.sizes),
        mutable_state=mutable_state_of(guide_trace) | mutable_state_of(model_trace),
        largest=largest,
        log_q_signals={
            part.removeprefix(_SIGNAL): totals[part] for part in parts if part not in _PARTS
        },
        credits=credits,
        along_paths={},
    )


def _downstream_of(
    site: "_Term", terms: list["_Term"], upstream: dict[tuple[str, str], Upstream]
) -> list["_Term"]:
    """The terms that depend on the draw of a site; their plates are those it shares with them."""
    downstream = []
    for term in terms:
        above = upstream["model" if term.part == "log_p" else "guide", term.name]
        if site.name in above:
            dims = {plate: dim for plate, dim in term.dims.items() if plate in above[site.name]}
            downstream.append(term._replace(dims=dims))
    return downstream


def _read_credit(site: "_Term", downstream: list["_Term"], plates: CommonPlates) -> Credit:
    own_plates = plates_of(site.site)
    drawn = site.site | {"fn": unmasked(site.site["fn"])}
    log_q = to_batch(log_prob_of(site.name, drawn), site.dims, own_plates)
    log_q = jnp.where(_is_active(downstream, own_plates), log_q, 0.0)
    cost = jnp.zeros(own_plates.sizes)
    for term in downstream:
        total = to_batch(term.scale * term.log_prob, term.dims, own_plates)
        cost += total if term.part == "log_p" else -total
    return Credit(log_q, plates.subsample_scale * jax.lax.stop_gradient(cost))


def _pair(first: Particles, partner: Particles) -> Particles:
    """The two draws of a pair along one more axis of the batch, in front; each counts half."""

    def both(one: Array, other: Array) -> Array:
        return jnp.stack([one, other])

    return first._replace(
        log_p=both(first.log_p, partner.log_p),
        log_q_score=both(first.log_q_score, partner.log_q_score),
        log_q_path=both(first.log_q_path, partner.log_q_path),
        log_q_draw=both(first.log_q_draw, partner.log_q_draw),
        antithetic=both(first.antithetic, partner.antithetic),
        bound_scale=both(first.bound_scale, partner.bound_scale) / 2,
        largest={site: both(one, partner.largest[site]) for site, one in first.largest.items()},
    )


class _Term(NamedTuple):
    """The contribution of one sample site."""

    part: str
    name: str
    site: Site
    log_prob: Array
    """Masked, without scale."""
    dims: dict[str, int]
    scale: Scale
    """The product of the scale handlers (and of N/B of plates that are not common)."""
    mask: bool | Array


def _part_of(site: Site, estimators: SiteEstimators) -> str:
    """Where the density of a guide site goes: a field of the particles, or the key of a signal."""
    if (key := estimators.note(site)) is not None:
        return _SIGNAL + key
    if is_score_site(site, estimators):
        return "log_q_score"
    return "log_q_draw" if is_apart(site, estimators) else "log_q_path"


def _read_site(part: str, name: str, site: Site, plates: CommonPlates) -> _Term:
    log_prob = log_prob_of(name, site)
    check_plate_shape(name, site, log_prob)
    scale = 1.0 if site["scale"] is None else site["scale"]
    return _Term(
        part=part,
        name=name,
        site=site,
        log_prob=log_prob,
        dims=plate_dims(site),
        scale=(scale if _is_number(scale) else jnp.asarray(scale)) / plates.subsample_scale,
        mask=mask_of(site["fn"]),
    )


def _common_scale(terms: list[_Term], plates: CommonPlates) -> Scale:
    """The scale that all sites share, which multiplies the bound; 1 where they do not agree.

    Scaling the whole of model and guide scales the objective. Inside the log-mean-exp the same
    factor would temper the weights instead, and the bound would no longer be one.
    """
    if not terms:
        return 1.0
    first = terms[0].scale
    if all(_is_number(term.scale) for term in terms):
        is_shared = all(_is_same_number(term.scale, first) for term in terms)
        return first if is_shared and first != 0 else 1.0
    if any(_varies_within_batch(term, plates) for term in terms):
        return 1.0
    scales = [to_batch(jnp.asarray(term.scale), term.dims, plates) for term in terms]
    is_same = [jnp.isclose(scale, scales[0], rtol=1e-6, atol=0.0) for scale in scales]
    return jnp.where(jnp.all(jnp.stack(is_same), axis=0) & (scales[0] != 0), scales[0], 1.0)


def _varies_within_batch(term: _Term, plates: CommonPlates) -> bool:
    """Whether the scale of a site differs among what one weight sums."""
    shape = jnp.shape(term.scale)
    common_dims = {term.dims[plate] for plate in plates.names}
    return any(size > 1 and i - len(shape) not in common_dims for i, size in enumerate(shape))


def _is_active(terms: list[_Term], plates: CommonPlates) -> bool | Array:
    """Whether any site counts, by element of the common plates: none does in padding."""
    if any(term.mask is True for term in terms):
        return True
    masks = [
        to_batch(jnp.broadcast_to(term.mask, term.log_prob.shape) * 1, term.dims, plates)
        for term in terms
    ]
    return sum(masks, jnp.zeros(plates.sizes)) > 0


def _is_number(scale: Any) -> TypeGuard[float]:
    return isinstance(scale, int | float)


def _is_same_number(scale: Scale, other: Scale) -> bool:
    return _is_number(scale) and _is_number(other) and math.isclose(scale, other, rel_tol=1e-6)


def _where(term: _Term) -> str:
    side = "model" if term.part == "log_p" else "guide"
    return f"{side} site {term.name!r}"


def refuse_log_weights(*runs: Particles) -> None:
    """Raise for a log-weight that is NaN or +inf, naming the site.

    Values that are being traced (in ``svi.run``, under ``jit``) can't be looked at without a call
    back to the host, and raising there would defeat ``stable_update``: they pass.
    """
    largest = [item for particles in runs for item in particles.largest.items()]
    if any(isinstance(terms, jax.core.Tracer) for _, terms in largest):
        return
    for site, terms in largest:
        if jnp.isnan(terms).any():
            raise ValueError(
                f"The log-probability at {site} is NaN. Check the parameters of its distribution "
                "and the data; no parameter has been updated."
            )
    for site, terms in largest:
        if jnp.isposinf(terms).any():
            raise ValueError(
                f"A log-weight is +inf, as the log-probability at {site} is infinite: a draw lies "
                "outside of the guide's own support, or where a density has a pole. Keep draws off "
                "the edge of the support (rounding may put them there); no parameter has been "
                "updated."
            )
