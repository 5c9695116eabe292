"""The seam: runs model and guide, and reads log-probabilities off their traces.

The only module that knows what a trace, a plate, a scale or a mask is. What leaves it is arrays:
one log-weight per particle and element of the *common plates*, the plates that enclose every
sample site of both model and guide.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from jaxtyping import Float
from pyro import distributions as dist
from pyro import poutine
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor

Site = Any  # a message of the host's, whose type has all fields optional
Trace = poutine.Trace
Scale = float | Tensor
Turn = tuple[int, ...]

PARTICLE_PLATE = "num_particles_vectorized"
"""The host's name for the plate over vectorised particles, the leftmost of all."""


class Program(NamedTuple):
    """What is run: a model and a guide with their arguments."""

    model: Callable
    guide: Callable
    args: tuple
    kwargs: dict[str, Any]
    reparam: str
    """``"pathwise"``, or ``"score"`` to take the score function at every random guide site."""
    is_weighted: bool
    """Whether particles are weighed against each other, so that log-weights must be whole."""
    vectorize_particles: bool
    max_plate_nesting: float
    """Number of plate dims of model and guide, that of the particles not counted."""
    refuse_enumeration: bool
    subsamples: dict[str, Tensor]
    """Subsample indices by plate, drawn once so that all particles see the same data."""


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
    bound_scale: Float[Tensor, " K *batch"]
    """What multiplies the bound: N/B of subsampled plates, and a scale common to all sites."""

    @property
    def log_weights(self) -> Float[Tensor, " K *batch"]:
        """log p(x, z) - log q(z), detached."""
        return (self.log_p - self.log_q_path - self.log_q_score).detach()


class CommonPlates(NamedTuple):
    """The plates that every sample site of model and guide lies in, leftmost dim first."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    sequential: tuple[str, ...]
    """Those that are loops (``for i in pyro.plate(...)``); each turn has a weight of its own."""
    subsample_scale: float
    """Product of N/B over the subsampled ones."""


def run_particles(program: Program, num_particles: int) -> Particles:
    """Run the guide, then the model at the guide's values, and read their log-probabilities."""
    if program.vectorize_particles and num_particles > 1:
        return read_particles(program, *trace_particles(program, num_particles), num_particles)
    runs = [read_particles(program, *trace_particles(program, 1), 1) for _ in range(num_particles)]
    return concatenate(runs)


def concatenate(runs: list[Particles]) -> Particles:
    """Join particles along axis 0."""
    return Particles(*map(torch.cat, zip(*runs, strict=True)))


def trace_particles(program: Program, num_particles: int) -> tuple[Trace, Trace]:
    """Trace the model and the guide; gradients stop at the values of score-function sites."""
    nesting = program.max_plate_nesting
    model, guide = program.model, program.guide
    if num_particles > 1:
        nesting += 1
        model, guide = (_in_particle_plate(fn, num_particles, nesting) for fn in (model, guide))
    args, kwargs = program.args, program.kwargs

    with _ShareSubsamples(program.subsamples):
        messenger = poutine.unwrap(guide)
        if isinstance(messenger, GuideMessenger):
            # It runs the model itself, with its own draws.
            with _DetachScoreSites(program.reparam):
                guide(*args, **kwargs)
            model_trace, guide_trace = messenger.get_traces()
        else:
            with _DetachScoreSites(program.reparam):
                guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(
                *args, **kwargs
            )

    _check_match(program, model_trace, guide_trace)
    if is_validation_enabled():
        check_model_guide_match(model_trace, guide_trace, nesting)
    model_trace, guide_trace = map(prune_subsample_sites, (model_trace, guide_trace))
    model_trace.compute_log_prob()
    if program.reparam == "score":
        guide_trace.compute_log_prob()
    else:
        guide_trace.compute_score_parts()
        _refuse_rejection(guide_trace)
    if is_validation_enabled():
        for _, site in samples(model_trace) + samples(guide_trace):
            check_site_shape(site, nesting)  # type: ignore[arg-type]  # may be inf
    return model_trace, guide_trace


def read_particles(
    program: Program, model_trace: Trace, guide_trace: Trace, num_particles: int
) -> Particles:
    """Sum the log-probabilities of all sites to one number per element of the common plates."""
    plates = common_plates(program, model_trace, guide_trace)
    terms = [_read_site("log_p", name, site, plates) for name, site in samples(model_trace)]
    for name, site in samples(guide_trace):
        part = "log_q_score" if _is_score_site(site, program.reparam) else "log_q_path"
        terms.append(_read_site(part, name, site, plates))

    common_scale = _common_scale(terms, plates)
    is_active = _is_active(terms, plates)
    totals: dict[tuple[str, Turn], list[Tensor]] = defaultdict(list)
    for term in terms:
        is_scaled = not _is_same_number(term.scale, common_scale)
        log_prob = term.scale * term.log_prob if is_scaled else term.log_prob
        total = _to_batch(log_prob, term.dims, plates)
        if is_scaled:
            total = total / common_scale
        if term.part == "log_q_score" and (is_scaled or term.mask is not True):
            density = _to_batch(_density(term.site), term.dims, plates)
            if isinstance(is_active, Tensor):
                density = density.masked_fill(~is_active, 0.0)
            totals["log_q_path", term.turn].append(total - density)
            total = density
        totals[term.part, term.turn].append(total)

    tensors = _stack_turns(totals, plates)
    if isinstance(common_scale, Tensor) and plates.sequential:
        common_scale = common_scale[..., None]
    tensors.append(torch.full_like(tensors[0], plates.subsample_scale) * common_scale)
    if PARTICLE_PLATE not in plates.names:
        tensors = [tensor.expand(num_particles, *tensor.shape) for tensor in tensors]
    particles = Particles(*tensors)
    if not (particles.log_weights < math.inf).all():
        _refuse_log_weights(terms)
    return particles


def dream_log_q(
    program: Program, num_particles: int, dream_inputs: Callable[..., tuple] | None
) -> Float[Tensor, ""]:
    """log q(z | x) at latents and data drawn from the model, summed with its scales."""
    if program.vectorize_particles and num_particles > 1:
        return _dream(program, num_particles, dream_inputs)
    dreams = [_dream(program, 1, dream_inputs) for _ in range(num_particles)]
    return torch.stack(dreams).sum()


def _dream(
    program: Program, num_particles: int, dream_inputs: Callable[..., tuple] | None
) -> Float[Tensor, ""]:
    model, guide = program.model, program.guide
    if num_particles > 1:
        dim = program.max_plate_nesting + 1
        model, guide = (_in_particle_plate(fn, num_particles, dim) for fn in (model, guide))
    with _ShareSubsamples(program.subsamples):
        with torch.no_grad():
            model_trace = poutine.trace(poutine.uncondition(model)).get_trace(
                *program.args, **program.kwargs
            )
        values = {name: site["value"] for name, site in samples(model_trace)}
        dreamt = {
            name: values.pop(name)
            for name, site in samples(model_trace)
            if site["infer"].get("was_observed")
        }
        args, kwargs = _show_dream(program, dreamt, dream_inputs)
        guide = poutine.condition(guide, data=values)
        guide_trace = prune_subsample_sites(poutine.trace(guide).get_trace(*args, **kwargs))
    for name, site in samples(guide_trace):
        if name not in values and not site["is_observed"] and not _is_deterministic(site["fn"]):
            raise ValueError(
                f"Sleep-phi trains the guide on latents drawn from the model, but guide site "
                f"{name!r} is not in the model. Use insomnia=1.0 (wake-phi only) for guides with "
                "auxiliary sites."
            )
    log_q = torch.as_tensor(guide_trace.log_prob_sum())
    for name, site in samples(guide_trace):
        if not site["log_prob_sum"].isfinite():
            raise ValueError(
                f"Sleep-phi trains the guide on latents and data drawn from the model, but there "
                f"its log-probability at site {name!r} is {site['log_prob_sum'].item()}. Let the "
                "guide cover all that the model can draw; no parameter has been updated."
            )
    return log_q


def _show_dream(
    program: Program, dreamt: dict[str, Tensor], dream_inputs: Callable[..., tuple] | None
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
    sites = {
        f"{side} site {name!r}": site
        for side, trace in traces.items()
        for name, site in samples(trace)
    }
    extents = {where: _extents(site) for where, site in sites.items()}
    seen: dict[str, tuple[CondIndepStackFrame, str]] = {}
    for where, site in sites.items():
        for frame in site["cond_indep_stack"]:
            first, inside = seen.setdefault(frame.name, (frame, where))
            sizes, first_sizes = (frame.size, frame.full_size), (first.size, first.full_size)
            # A plate may be declared without a size (-1).
            if sizes != first_sizes and -1 not in (frame.size, first.size):
                raise ValueError(
                    f"Plate {frame.name!r} has size {first.size} of {first.full_size} at {inside} "
                    f"but {frame.size} of {frame.full_size} at {where}. Give the plate the same "
                    "size and subsample_size in model and guide."
                )

    frames = []
    for plate, (frame, inside) in seen.items():
        outside = [where for where in sites if extents[where].get(plate) != extents[inside][plate]]
        if not outside:
            frames.append(frame)
        elif plate == PARTICLE_PLATE:
            raise ValueError(
                f"The {outside[0]} lies outside of the plate of the particles, so that they share "
                "it. Keep it inside, or use vectorize_particles=False."
            )
        elif program.is_weighted and _subsample_scale(frame) != 1:
            raise ValueError(
                f"Plate {plate!r} is subsampled ({frame.size} of {frame.full_size}) but "
                f"{outside[0]} lies outside of it, while {inside} lies inside. The weights of a "
                "subsample say nothing about the rest of the data: put all sites inside the "
                f"plate, do not subsample {plate!r}, or use one particle (the ELBO; average "
                "several with num_replicates)."
            )
    vectorized = sorted((f for f in frames if f.vectorized), key=lambda frame: frame.dim or 0)
    return CommonPlates(
        names=tuple(frame.name for frame in vectorized),
        sizes=tuple(extents[seen[frame.name][1]][frame.name] for frame in vectorized),
        sequential=tuple(frame.name for frame in frames if not frame.vectorized),
        subsample_scale=math.prod(map(_subsample_scale, frames)),
    )


def samples(trace: Trace) -> list[tuple[str, Site]]:
    """Names and messages of the sample sites of a trace that have a density."""
    return [
        (name, site)
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not _is_subsample(site)
        and not (site["infer"] or {}).get("_deterministic")
    ]


def latent_values(model_trace: Trace, num_particles: int) -> dict[str, Tensor]:
    """Values of the model's latent sites, ``[num_particles, *site shape]``."""
    values = {}
    for name, site in samples(model_trace):
        if site["is_observed"]:
            continue
        shape = site["value"].shape
        if num_particles > 1:
            # The particle plate lies left of all others: drop the empty dims in between.
            dims = [dim for plate, dim in _plate_dims(site).items() if plate != PARTICLE_PLATE]
            depth = max((-dim for dim in dims), default=0) + site["fn"].event_dim
            shape = shape[1:]
            while len(shape) > depth and shape[0] == 1:
                shape = shape[1:]
        values[name] = site["value"].reshape(num_particles, *shape)
    return values


def latent_axes(model_trace: Trace, plates: CommonPlates) -> dict[str, tuple[int, ...]]:
    """For each latent site, the (negative) axes of its value that are the common plates."""
    if plates.sequential:
        raise NotImplementedError(
            f"Resampling inside sequential plates is not implemented, got {plates.sequential}. "
            "Write them as vectorised plates: with pyro.plate(...)."
        )
    names = [name for name in plates.names if name != PARTICLE_PLATE]
    axes = {}
    for name, site in samples(model_trace):
        if not site["is_observed"]:
            dims, event_dim = _plate_dims(site), site["fn"].event_dim
            axes[name] = tuple(dims[plate] - event_dim for plate in names)
    return axes


class _ShareSubsamples(Messenger):
    """Gives a plate the subsample it had before, if any, and remembers it."""

    def __init__(self, subsamples: dict[str, Tensor]) -> None:
        super().__init__()
        self.subsamples = subsamples

    def _pyro_sample(self, msg: Site) -> None:
        if _is_subsample(msg) and msg["value"] is None and msg["name"] in self.subsamples:
            msg["value"] = self.subsamples[msg["name"]]
            msg["done"] = True

    def _pyro_post_sample(self, msg: Site) -> None:
        if _is_subsample(msg):
            self.subsamples[msg["name"]] = msg["value"]


class _DetachScoreSites(Messenger):
    """Stops gradients at the values of the guide's score-function sites."""

    def __init__(self, reparam: str) -> None:
        super().__init__()
        self.reparam = reparam

    def _pyro_post_sample(self, msg: Site) -> None:
        if not _is_subsample(msg) and _is_score_site(msg, self.reparam):
            # A new tensor, also where the value has no gradient: transforms remember what they
            # made it of, and by that their parameters would drop out of its log-probability.
            msg["value"] = msg["value"].detach()


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
        dims=_plate_dims(site),
        turn=tuple(counters[plate] for plate in plates.sequential),
        scale=site["scale"] / plates.subsample_scale,
        mask=_both(_mask(site["fn"]), True if site["mask"] is None else site["mask"]),
    )


def _stack_turns(
    totals: dict[tuple[str, Turn], list[Tensor]], plates: CommonPlates
) -> list[Tensor]:
    """Sum each part, ``[*plates]``, with the turns of sequential plates as one more axis."""
    turns = sorted({turn for _, turn in totals}) or [()]
    example = next(iter(totals.values()))[0] if totals else torch.zeros(plates.sizes)
    zero = torch.zeros_like(example)
    parts = []
    for part in ("log_p", "log_q_score", "log_q_path"):
        sums = [sum(totals[part, turn], zero) for turn in turns]
        parts.append(torch.stack(sums, dim=-1) if plates.sequential else sums[0])
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
        _to_batch(torch.as_tensor(term.scale).to(term.log_prob), term.dims, plates)
        for term in terms
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
        active = active.to(mask.device) | (_to_batch(mask.int(), term.dims, plates) > 0)
    return active


def _mask(fn: Any) -> bool | Tensor:
    """The mask under which a distribution lies, True where there is none."""
    if isinstance(fn, dist.MaskedDistribution):
        return _both(fn._mask, _mask(fn.base_dist))
    if isinstance(fn, dist.ExpandedDistribution):
        return _mask(fn.base_dist)
    if isinstance(fn, dist.Independent):
        inner = _mask(fn.base_dist)
        event_dims = tuple(range(-fn.reinterpreted_batch_ndims, 0))
        return inner if isinstance(inner, bool) else inner.any(event_dims)
    return True


def _both(mask: bool | Tensor, other: bool | Tensor) -> bool | Tensor:
    if mask is True:
        return other
    return mask if other is True else mask & other


def _density(site: Site) -> Tensor:
    """Log-density of a draw, which happens whatever its scale and mask."""
    fn = _unmasked(site["fn"])
    return site["unscaled_log_prob"] if fn is site["fn"] else fn.log_prob(site["value"])


def _unmasked(fn: Any) -> Any:
    if isinstance(fn, dist.MaskedDistribution):
        return _unmasked(fn.base_dist)
    if isinstance(fn, dist.ExpandedDistribution) and _mask(fn) is not True:
        return _unmasked(fn.base_dist).expand(fn.batch_shape)
    if isinstance(fn, dist.Independent) and _mask(fn) is not True:
        return _unmasked(fn.base_dist).to_event(fn.reinterpreted_batch_ndims)
    return fn


def _to_batch(tensor: Tensor, dims: dict[str, int], plates: CommonPlates) -> Tensor:
    """Sum over all dims but those of the common plates, and put these in order."""
    depth = max((-dim for dim in dims.values()), default=0)
    tensor = tensor.reshape((1,) * (depth - tensor.dim()) + tensor.shape)
    kept = [tensor.dim() + dims[plate] for plate in plates.names]
    summed = [axis for axis in range(tensor.dim()) if axis not in kept]
    tensor = tensor.sum(summed) if summed else tensor
    order = sorted(range(len(kept)), key=kept.__getitem__)
    return tensor.permute([order.index(i) for i in range(len(order))]).expand(plates.sizes)


def _in_particle_plate(fn: Callable, num_particles: int, nesting: float) -> Callable:
    return pyro.plate(PARTICLE_PLATE, num_particles, dim=-int(nesting))(fn)


def _plate_dims(site: Site) -> dict[str, int]:
    return {frame.name: frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}


def _extents(site: Site) -> dict[str, int]:
    """How far a site stretches along each of its plates.

    Where a plate is declared without a size, a site may be one draw for all of its elements.
    """
    shape = site["log_prob"].shape
    return {
        frame.name: shape[frame.dim] if frame.vectorized and -frame.dim <= len(shape) else 1
        for frame in site["cond_indep_stack"]
    }


def _subsample_scale(frame: CondIndepStackFrame) -> float:
    return 1.0 if frame.full_size is None else frame.full_size / frame.size


def _is_same_number(scale: Scale, other: Scale) -> bool:
    if isinstance(scale, Tensor) or isinstance(other, Tensor):
        return False
    return math.isclose(scale, other, rel_tol=1e-6)


def _is_subsample(site: Site) -> bool:
    return type(site["fn"]).__name__ == "_Subsample"


def _is_score_site(site: Site, reparam: str) -> bool:
    fn = site["fn"]
    if site["is_observed"]:
        # A factor stands for a draw that the guide has made by itself.
        return isinstance(fn, dist.Unit) and not fn.has_rsample
    return not _is_deterministic(fn) and (reparam == "score" or not fn.has_rsample)


def _refuse_rejection(guide_trace: Trace) -> None:
    for name, site in samples(guide_trace):
        _, score_function, entropy_term = site["score_parts"]
        if not (is_identically_zero(score_function) or is_identically_zero(entropy_term)):
            raise NotImplementedError(
                f"Guide site {name!r} ({type(site['fn']).__name__}) samples by rejection: its "
                "gradient has a score part and a path part. Use a distribution that is fully "
                'reparameterised, or reparam="score".'
            )


def _is_deterministic(fn: Any) -> bool:
    """Whether the site is a point mass, whose value is a parameter rather than a draw."""
    while hasattr(fn, "base_dist") and not isinstance(fn, dist.TransformedDistribution):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)


def _check_match(program: Program, model_trace: Trace, guide_trace: Trace) -> None:
    """Every latent of the model is in the guide, and the reverse; none is enumerated."""
    in_model = {name: site for name, site in samples(model_trace) if not site["is_observed"]}
    in_guide = {name: site for name, site in samples(guide_trace) if not site["is_observed"]}
    for name, site in (in_model | in_guide).items():
        is_sampled = name in in_guide and not program.refuse_enumeration
        if site["infer"].get("enumerate") and not is_sampled:
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


def _refuse_log_weights(terms: list[_Term]) -> None:
    """Raise for log-weights that are NaN or +inf, naming the site."""
    for term in terms:
        if term.log_prob.isnan().any():
            raise ValueError(
                f"The log-probability at site {term.name!r} is NaN. Check the parameters of its "
                "distribution and the data; no parameter has been updated."
            )
    names = sorted({term.name for term in terms if _weighs_infinitely(term)})
    raise ValueError(
        f"A log-weight is not finite, as the log-probability at {names} is infinite: a draw lies "
        "outside of the guide's own support, or where a density has a pole. Keep draws off the "
        "edge of the support (rounding may put them there); no parameter has been updated."
    )


def _weighs_infinitely(term: _Term) -> bool:
    return bool(term.log_prob.isposinf().any()) or (
        term.part != "log_p" and bool(term.log_prob.isneginf().any())
    )
