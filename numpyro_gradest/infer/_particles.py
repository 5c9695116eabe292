"""The seam: runs model and guide, and reads log-probabilities off their traces.

The only module that knows what a trace, a plate, a scale or a mask is. What leaves it is arrays:
one log-weight per particle and element of the *common plates*, the plates that enclose every
sample site of both model and guide.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.primitives import Messenger
from numpyro.util import check_model_guide_match

Site = dict[str, Any]
Trace = dict[str, Site]
Scale = float | Array
_WRAPPERS = (
    dist.ExpandedDistribution,
    dist.Independent,
    dist.MaskedDistribution,
    dist.TransformedDistribution,
)


class Program(NamedTuple):
    """What is run: a model and a guide, with their parameters and arguments."""

    model: Callable
    guide: Callable
    params: dict[str, Any]
    args: tuple
    kwargs: dict[str, Any]
    reparam: str
    """``"pathwise"``, or ``"score"`` to take the score function at every random guide site."""
    is_weighted: bool
    """Whether particles are weighed against each other, so that log-weights must be whole."""

    def with_plate_key(self, key: Array) -> "Program":
        """Draw every plate's subsample from one key, so that all particles see the same data."""
        seed = partial(
            handlers.seed, rng_seed=key, hide_types=["sample", "prng_key", "control_flow"]
        )
        return self._replace(model=seed(self.model), guide=seed(self.guide))

    def detached(self) -> "Program":
        """The same program without gradient."""
        return self._replace(params=jax.lax.stop_gradient(self.params))


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
    bound_scale: Float[Array, " *batch"]
    """What multiplies the bound: N/B of subsampled plates, and a scale common to all sites."""
    mutable_state: dict[str, Any]
    """Values of the ``mutable`` sites after the run."""
    has_nan: dict[str, Bool[Array, " *particles"]]
    """For each sample site, whether its log-probability has a NaN."""

    @property
    def log_weights(self) -> Float[Array, " *batch"]:
        """log p(x, z) - log q(z), detached."""
        return jax.lax.stop_gradient(self.log_p - self.log_q_path - self.log_q_score)


class CommonPlates(NamedTuple):
    """The plates that every sample site of model and guide lies in, leftmost dim first."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    subsample_scale: float
    """Product of N/B over the subsampled ones."""


def run_particle(program: Program, key: Array) -> Particles:
    """Run the guide, then the model at the guide's values, and read their log-probabilities."""
    return read_particle(program, *trace_particle(program, key))


def trace_particle(program: Program, key: Array) -> tuple[Trace, Trace]:
    """Trace the model and the guide; gradients stop at the values of score-function sites."""
    model_key, guide_key = jax.random.split(key)
    # Programs update mutable state in place: every run gets containers of its own.
    params = jax.tree.map(lambda leaf: leaf, program.params)
    guide = handlers.substitute(handlers.seed(program.guide, guide_key), data=params)
    with _DetachScoreSites(program.reparam):
        guide_trace = handlers.trace(guide).get_trace(*program.args, **program.kwargs)
    # Substituted, not replayed: the host's replay does not reach sites inside of cond.
    data = params | _drawn(guide_trace) | _mutable_state(guide_trace)
    model = handlers.substitute(handlers.seed(program.model, model_key), data=data)
    model_trace = handlers.trace(model).get_trace(*program.args, **program.kwargs)
    _check_match(model_trace, guide_trace)
    return model_trace, guide_trace


def read_particle(program: Program, model_trace: Trace, guide_trace: Trace) -> Particles:
    """Sum the log-probabilities of all sites to one number per element of the common plates."""
    plates = common_plates(program, model_trace, guide_trace)
    terms = [_read_site("log_p", name, site, plates) for name, site in samples(model_trace)]
    for name, site in samples(guide_trace):
        part = "log_q_score" if _is_score_site(site, program.reparam) else "log_q_path"
        terms.append(_read_site(part, name, site, plates))

    common_scale = _common_scale(terms, plates)
    is_active = _is_active(terms, plates)
    totals = dict.fromkeys(("log_p", "log_q_path", "log_q_score"), jnp.zeros(plates.sizes))
    has_nan: dict[str, Array] = {}
    for term in terms:
        has_nan[term.name] = jnp.isnan(term.log_prob).any() | has_nan.get(term.name, False)
        is_scaled = not _is_same_number(term.scale, common_scale)
        log_prob = term.scale * term.log_prob if is_scaled else term.log_prob
        total = _to_batch(log_prob, term.dims, plates)
        if is_scaled:
            total /= common_scale
        if term.part == "log_q_score" and (is_scaled or term.mask is not True):
            drawn = term.site | {"fn": _unmasked(term.site["fn"])}
            density = _to_batch(_log_prob(term.name, drawn), term.dims, plates)
            density = jnp.where(is_active, density, 0.0)
            totals["log_q_path"] += total - density
            total = density
        totals[term.part] += total
    return Particles(
        **totals,
        bound_scale=plates.subsample_scale * common_scale * jnp.ones(plates.sizes),
        mutable_state=_mutable_state(guide_trace) | _mutable_state(model_trace),
        has_nan=has_nan,
    )


def dream_log_q(
    program: Program, key: Array, dream_inputs: Callable[..., tuple] | None
) -> Float[Array, ""]:
    """log q(z | x) at latents and data drawn from the model, summed with its scales."""
    model_key, guide_key = jax.random.split(key)
    params = jax.tree.map(lambda leaf: leaf, program.params)
    model = handlers.uncondition(handlers.seed(program.model, model_key))
    model = handlers.substitute(model, data=jax.lax.stop_gradient(params))
    model_trace = handlers.trace(model).get_trace(*program.args, **program.kwargs)
    values = {name: jax.lax.stop_gradient(site["value"]) for name, site in samples(model_trace)}
    dreamt = {
        name: values.pop(name)
        for name, site in samples(model_trace)
        if site["is_observed"] or site["infer"].get("was_observed")
    }

    args, kwargs = _show_dream(program, dreamt, dream_inputs)
    # The model drew the data of its own subsample: the guide must look at the same one.
    data = params | values | _of_type(model_trace, "plate")
    guide = handlers.substitute(handlers.seed(program.guide, guide_key), data=data)
    guide_trace = handlers.trace(guide).get_trace(*args, **kwargs)
    for name, site in samples(guide_trace):
        if name not in values and not site["is_observed"] and not _is_deterministic(site):
            raise ValueError(
                f"Sleep-phi trains the guide on latents drawn from the model, but guide site "
                f"{name!r} is not in the model. Use insomnia=1.0 (wake-phi only) for guides with "
                "auxiliary sites."
            )
    total = jnp.zeros(())
    for name, site in samples(guide_trace):
        scale = 1.0 if site["scale"] is None else site["scale"]
        total += jnp.sum(scale * _log_prob(name, site))
    return total


def _show_dream(
    program: Program, dreamt: dict[str, Array], dream_inputs: Callable[..., tuple] | None
) -> tuple[tuple, dict[str, Any]]:
    """Arguments that let the guide look at dreamt data."""
    if dream_inputs is not None:
        return tuple(dream_inputs(dreamt, *program.args, **program.kwargs)), program.kwargs
    if "observations" not in program.kwargs:
        raise ValueError(
            f"Sleep-phi has to show the guide the data dreamt at {sorted(dreamt)}. Pass "
            "dream_inputs=lambda dream, *args: (dream[...],), which returns the guide's arguments; "
            "or let model and guide take their data as observations={site name: value}."
        )
    return program.args, program.kwargs | {"observations": dreamt}


def common_plates(program: Program, model_trace: Trace, guide_trace: Trace) -> CommonPlates:
    """Find the plates that enclose every sample site; weights refuse subsampling in any other."""
    traces = {"model": model_trace, "guide": guide_trace}
    sites = [(side, *item) for side, trace in traces.items() for item in samples(trace)]
    sizes: dict[str, tuple[int, str]] = {}
    full_sizes: dict[str, int] = {}
    for side, name, site in sites:
        for frame in site["cond_indep_stack"]:
            size, first = sizes.setdefault(frame.name, (frame.size, f"{side} site {name!r}"))
            if size != frame.size:
                raise ValueError(
                    f"Plate {frame.name!r} has size {size} at {first} but {frame.size} at {side} "
                    f"site {name!r}. Give the plate the same size and subsample_size in model and "
                    "guide."
                )
            plate_site = model_trace.get(frame.name) or guide_trace.get(frame.name)
            full_sizes[frame.name] = plate_site["args"][0] if plate_site else frame.size

    dims = _plate_dims(sites[0][2]) if sites else {}
    for plate, (size, inside) in sizes.items():
        for side, name, site in sites:
            if plate in _plate_dims(site):
                continue
            dims.pop(plate, None)
            if program.is_weighted and full_sizes[plate] > size:
                raise ValueError(
                    f"Plate {plate!r} is subsampled ({size} of {full_sizes[plate]}) but {side} "
                    f"site {name!r} lies outside of it, while {inside} lies inside. The weights of "
                    f"a subsample say nothing about the rest of the data: put {name!r} inside the "
                    f"plate, do not subsample {plate!r}, or use one particle (the ELBO; average "
                    "several with num_replicates)."
                )
    names = tuple(sorted(dims, key=dims.__getitem__))
    return CommonPlates(
        names=names,
        sizes=tuple(sizes[name][0] for name in names),
        subsample_scale=math.prod(full_sizes[name] / sizes[name][0] for name in names),
    )


def samples(trace: Trace) -> list[tuple[str, Site]]:
    """Names and messages of the sample sites of a trace."""
    return [(name, site) for name, site in trace.items() if site["type"] == "sample"]


def latent_values(model_trace: Trace) -> dict[str, Array]:
    """Values of the model's latent sites."""
    return {name: site["value"] for name, site in samples(model_trace) if not site["is_observed"]}


def latent_axes(model_trace: Trace, plates: CommonPlates) -> dict[str, tuple[int, ...]]:
    """For each latent site, the (negative) axes of its value that are the common plates."""
    axes = {}
    for name, site in samples(model_trace):
        if not site["is_observed"]:
            dims, event_dim = _plate_dims(site), site["fn"].event_dim
            axes[name] = tuple(dims[plate] - event_dim for plate in plates.names)
    return axes


class _DetachScoreSites(Messenger):
    """Stops gradients at the values of the guide's score-function sites."""

    def __init__(self, reparam: str) -> None:
        super().__init__()
        self.reparam = reparam

    def process_message(self, msg: Site) -> None:
        if msg["type"] == "control_flow":
            # A handler sees the sites of scan and cond only when these have run; by then the
            # values have gone into what follows them inside.
            msg["kwargs"]["substitute_stack"].append(("substitute", self._detached_value))

    def postprocess_message(self, msg: Site) -> None:
        if msg["type"] == "sample" and _is_score_site(msg, self.reparam):
            msg["value"] = jax.lax.stop_gradient(msg["value"])
            # A log_prob computed from cached intermediates would bring the gradient back.
            msg["intermediates"] = []

    def _detached_value(self, site: Site) -> Array | None:
        if site["type"] != "sample" or not _is_score_site(site, self.reparam):
            return None
        value = site["value"]
        if value is None:
            value = site["fn"](*site["args"], **site["kwargs"])
        return jax.lax.stop_gradient(value)


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


def _read_site(part: str, name: str, site: Site, plates: CommonPlates) -> _Term:
    log_prob = _log_prob(name, site)
    _check_plate_shape(name, site, log_prob)
    scale = 1.0 if site["scale"] is None else site["scale"]
    return _Term(
        part=part,
        name=name,
        site=site,
        log_prob=log_prob,
        dims=_plate_dims(site),
        scale=(scale if _is_number(scale) else jnp.asarray(scale)) / plates.subsample_scale,
        mask=_mask(site["fn"]),
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
    scales = [_to_batch(jnp.asarray(term.scale), term.dims, plates) for term in terms]
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
        _to_batch(jnp.broadcast_to(term.mask, term.log_prob.shape) * 1, term.dims, plates)
        for term in terms
    ]
    return sum(masks, jnp.zeros(plates.sizes)) > 0


def _mask(fn: dist.Distribution) -> bool | Array:
    """The mask under which a distribution lies, True where there is none."""
    if isinstance(fn, dist.MaskedDistribution):
        inner = _mask(fn.base_dist)
        outer = fn._mask if isinstance(fn._mask, bool) else jnp.asarray(fn._mask)
        return outer if inner is True else outer & inner
    if isinstance(fn, dist.ExpandedDistribution):
        return _mask(fn.base_dist)
    if isinstance(fn, dist.Independent):
        inner = _mask(fn.base_dist)
        event_dims = tuple(range(-fn.reinterpreted_batch_ndims, 0))
        return inner if isinstance(inner, bool) else inner.any(event_dims)
    return True


def _unmasked(fn: dist.Distribution) -> dist.Distribution:
    if isinstance(fn, dist.MaskedDistribution):
        return _unmasked(fn.base_dist)
    if isinstance(fn, dist.ExpandedDistribution):
        return _unmasked(fn.base_dist).expand(fn.batch_shape)
    if isinstance(fn, dist.Independent):
        return _unmasked(fn.base_dist).to_event(fn.reinterpreted_batch_ndims)
    return fn


def _log_prob(name: str, site: Site) -> Array:
    args = (site["intermediates"],) if site["intermediates"] else ()
    try:
        return jnp.asarray(site["fn"].log_prob(site["value"], *args))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"log_prob failed at site {name!r}: its value has shape {jnp.shape(site['value'])}, "
            f"its distribution batch shape {site['fn'].batch_shape} and event shape "
            f"{site['fn'].event_shape}. {error}"
        ) from error


def _check_plate_shape(name: str, site: Site, log_prob: Array) -> None:
    """Each dim of the log-probability of a site inside plates is one of these plates."""
    sizes = {frame.dim: (frame.name, frame.size) for frame in site["cond_indep_stack"]}
    shape = log_prob.shape
    for dim in range(-len(shape), 0):
        plate, size = sizes.get(dim, (None, 1))
        is_time = dim == -len(shape) and site.get("_control_flow_done", False)
        if not sizes or is_time or shape[dim] in (1, size):
            continue
        where = f"plate {plate!r} has size {size}" if plate else "no plate is declared"
        raise ValueError(
            f"The log-probability at site {name!r} has shape {shape}: at dim {dim} {where}, but "
            f"the site has size {shape[dim]}. Check the shape of its value and parameters, add a "
            "plate for that dim, or declare it part of the event with .to_event()."
        )


def _to_batch(array: Array, dims: dict[str, int], plates: CommonPlates) -> Array:
    """Sum over all dims but those of the common plates, and put these in order."""
    depth = max((-dim for dim in dims.values()), default=0)
    array = array.reshape((1,) * (depth - array.ndim) + array.shape)
    kept = [array.ndim + dims[plate] for plate in plates.names]
    array = array.sum([axis for axis in range(array.ndim) if axis not in kept])
    order = [sorted(kept).index(axis) for axis in kept]
    return jnp.broadcast_to(array.transpose(order), plates.sizes)


def _plate_dims(site: Site) -> dict[str, int]:
    return {frame.name: frame.dim for frame in site["cond_indep_stack"]}


def _is_number(scale: Any) -> TypeGuard[float]:
    return isinstance(scale, int | float)


def _is_same_number(scale: Scale, other: Scale) -> bool:
    return _is_number(scale) and _is_number(other) and math.isclose(scale, other, rel_tol=1e-6)


def _is_score_site(site: Site, reparam: str) -> bool:
    if site["is_observed"] or _is_deterministic(site):
        return False
    return reparam == "score" or not site["fn"].has_rsample


def _is_deterministic(site: Site) -> bool:
    """Whether the site is a point mass, whose value is a parameter rather than a draw."""
    fn = site["fn"]
    while isinstance(fn, _WRAPPERS):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)


def refuse_nan(has_nan: dict[str, Bool[Array, " particles"]]) -> None:
    """Raise if a log-probability is NaN, naming the site.

    Values that are being traced (in ``svi.run``, under ``jit``) can't be looked at without a call
    back to the host, and raising there would defeat ``stable_update``: they pass.
    """
    flags = {name: jnp.any(flag) for name, flag in has_nan.items()}
    if any(isinstance(flag, jax.core.Tracer) for flag in flags.values()):
        return
    if names := [name for name, flag in flags.items() if flag]:
        raise ValueError(
            f"The log-probability at site {names[0]!r} is NaN"
            + (f" (also at {names[1:]})" if names[1:] else "")
            + ". Check the parameters of its distribution and the data; no parameter has been "
            "updated."
        )


def _drawn(guide_trace: Trace) -> dict[str, Array]:
    """What the model takes over from the guide: its draws, and its plates' subsamples."""
    draws = {name: site["value"] for name, site in samples(guide_trace) if not site["is_observed"]}
    return draws | _of_type(guide_trace, "plate")


def _mutable_state(trace: Trace) -> dict[str, Any]:
    return _of_type(trace, "mutable")


def _of_type(trace: Trace, type_: str) -> dict[str, Any]:
    return {name: site["value"] for name, site in trace.items() if site["type"] == type_}


def _check_match(model_trace: Trace, guide_trace: Trace) -> None:
    """Every latent of the model is in the guide, and the reverse; none is enumerated."""
    in_model = {name: site for name, site in samples(model_trace) if not site["is_observed"]}
    in_guide = {name: site for name, site in samples(guide_trace) if not site["is_observed"]}
    for name, site in (in_model | in_guide).items():
        if site["infer"].get("enumerate"):
            raise ValueError(
                f"Site {name!r} is configured for enumeration, which a multi-sample objective does "
                'not do. Remove infer={"enumerate": ...} so that the guide samples it, or use '
                "TraceEnum_ELBO."
            )
    for name in in_model:
        if name not in in_guide:
            raise ValueError(
                f"Model site {name!r} is neither observed nor sampled in the guide (which samples "
                f"{sorted(in_guide) or 'nothing'}). Sample {name!r} in the guide, or observe it."
            )
    for name, site in in_guide.items():
        if name not in in_model and not site["infer"].get("is_auxiliary"):
            raise ValueError(
                f"Guide site {name!r} is not a latent site of the model (which has "
                f"{sorted(in_model) or 'none'}). Add it to the model, remove it, or mark it "
                'infer={"is_auxiliary": True} if it is a helper of the guide.'
            )
    for name, plate in guide_trace.items():
        if plate["type"] == "plate" and name in model_trace:
            size, size_in_model = plate["args"][0], model_trace[name]["args"][0]
            if size != size_in_model:
                raise ValueError(
                    f"Plate {name!r} has size {size_in_model} in the model but {size} in the "
                    "guide. Give it the same size in both."
                )
    check_model_guide_match(model_trace, guide_trace)
