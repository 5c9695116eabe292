"""Runs model and guide: the guide draws, the model follows."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
from pyro import poutine
from pyro.distributions.util import is_identically_zero
from pyro.infer.util import is_validation_enabled
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor

from pyro_gradest.infer._implicit import Parents, take_implicit_sites
from pyro_gradest.infer._modules import unwrapped
from pyro_gradest.infer._plates import PARTICLE_PLATE, CommonPlates, plate_dims
from pyro_gradest.infer._site_estimators import (
    SiteEstimators,
    check_observed,
    is_on_path,
    is_path_draw,
    is_score_site,
)
from pyro_gradest.infer._sites import (
    Site,
    Trace,
    is_auxiliary,
    is_deterministic,
    is_subsample,
    samples,
)


class Program(NamedTuple):
    """What is run: a model and a guide with their arguments."""

    model: Callable
    guide: Callable
    args: tuple
    kwargs: dict[str, Any]
    estimators: SiteEstimators
    """How the gradient at each guide site is estimated."""
    is_weighted: bool
    """Whether particles are weighed against each other, so that log-weights must be whole."""
    vectorize_particles: bool
    max_plate_nesting: float
    """Number of plate dims of model and guide, that of the particles not counted."""
    refuse_enumeration: bool
    subsamples: dict[str, Tensor]
    """Subsample indices by plate, drawn once so that all particles see the same data."""
    is_antithetic: bool = False
    """Whether a particle is an antithetic pair."""
    has_credits: bool = False
    """Whether it is found out what is downstream of each score-function site."""
    parents: Parents | None = None
    """What implicit sites are computed from; ``None`` where they are not dealt with."""


def trace_particles(program: Program, num_particles: int) -> tuple[Trace, Trace]:
    """Trace the model and the guide; gradients stop at the values of score-function sites."""
    nesting = program.max_plate_nesting
    model, guide = program.model, program.guide
    if num_particles > 1:
        nesting += 1
        model, guide = (in_particle_plate(fn, num_particles, nesting) for fn in (model, guide))
    args, kwargs = program.args, program.kwargs

    with ShareSubsamples(program.subsamples):
        messenger = unwrapped(guide)
        if isinstance(messenger, GuideMessenger):
            # It runs the model itself, with its own draws.
            _run_guide(program, guide)
            model_trace, guide_trace = messenger.get_traces()
            check_observed(guide_trace)
        else:
            guide_trace = _run_guide(program, poutine.trace(guide).get_trace)
            check_observed(guide_trace)
            model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(
                *args, **kwargs
            )

    _check_match(program, model_trace, guide_trace)
    _check_path_draws(program, guide_trace)
    if program.parents is not None:
        take_implicit_sites(model_trace, guide_trace, program.parents)
    if is_validation_enabled():
        check_model_guide_match(model_trace, guide_trace, nesting)
    model_trace, guide_trace = map(prune_subsample_sites, (model_trace, guide_trace))
    model_trace.compute_log_prob()
    path = [item for item in samples(guide_trace) if is_on_path(item[1], program.estimators)]
    if path:
        guide_trace.compute_score_parts()
        _refuse_rejection(path)
    else:
        guide_trace.compute_log_prob()
    if is_validation_enabled():
        for _, site in samples(model_trace) + samples(guide_trace):
            check_site_shape(site, nesting)  # type: ignore[arg-type]  # may be inf
    for name, site in samples(model_trace) + samples(guide_trace):
        _check_left_of_plates(name, site)
    return model_trace, guide_trace


def _run_guide(program: Program, guide: Callable) -> Any:
    """Run the guide, and once more if it shows too late that draws have to be cut."""
    is_cutting = program.estimators.splits_path or program.estimators.default in ("dreg", "stl")
    while True:
        cut = _CutPathDraws(program.estimators, is_cutting=is_cutting)
        with _DetachScoreSites(program.estimators), cut:
            result = guide(*program.args, **program.kwargs)
        if not cut.has_missed:
            return result
        is_cutting = True


def guide_sites(guide: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Site]:
    """The guide's sample sites, by a run of it alone."""
    messenger = unwrapped(guide)
    if isinstance(messenger, GuideMessenger):
        guide(*args, **kwargs)
        return dict(samples(messenger.get_traces()[1]))
    return dict(samples(poutine.trace(guide).get_trace(*args, **kwargs)))


def trace_guide_at(
    program: Program, guide_trace: Trace, num_particles: int, num_copies: int
) -> Trace:
    """Trace the guide again at the latents it drew, with other auxiliary draws.

    The plate of the particles holds ``num_copies`` of each, one group of all after the other.
    """
    guide, nesting = program.guide, program.max_plate_nesting
    size = num_particles * num_copies
    if size > 1:
        nesting += 1
        guide = in_particle_plate(guide, size, nesting)
    latents = {}
    for name, site in samples(guide_trace):
        if not (site["is_observed"] or is_auxiliary(site)):
            value = site["value"]
            if num_copies > 1:
                missing = int(nesting) + site["fn"].event_dim - value.dim()
                value = value.reshape((1,) * missing + value.shape)
                value = value.repeat(num_copies, *[1] * (value.dim() - 1))
            latents[name] = value
    with ShareSubsamples(program.subsamples), _DetachScoreSites(program.estimators):
        trace = poutine.trace(poutine.condition(guide, latents)).get_trace(
            *program.args, **program.kwargs
        )
    trace = prune_subsample_sites(trace)
    trace.compute_log_prob()
    return trace


def deepest_plate(model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]) -> int:
    """Number of plate dims that model and guide use, found by running them."""
    with poutine.block():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model = poutine.replay(model, trace=guide_trace)
        model_trace = poutine.trace(model).get_trace(*args, **kwargs)
    sites = [site for trace in (guide_trace, model_trace) for _, site in samples(trace)]
    return max((-dim for site in sites for dim in plate_dims(site).values()), default=0)


def latent_values(model_trace: Trace, num_particles: int) -> dict[str, Tensor]:
    """Values of the model's latent sites, ``[num_particles, *site shape]``."""
    values = {}
    for name, site in samples(model_trace):
        if site["is_observed"]:
            continue
        shape = site["value"].shape
        if num_particles > 1:
            # The particle plate lies left of all others: drop the empty dims in between.
            dims = [dim for plate, dim in plate_dims(site).items() if plate != PARTICLE_PLATE]
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
            dims, event_dim = plate_dims(site), site["fn"].event_dim
            axes[name] = tuple(dims[plate] - event_dim for plate in names)
    return axes


def in_particle_plate(fn: Callable, num_particles: int, nesting: float) -> Callable:
    return pyro.plate(PARTICLE_PLATE, num_particles, dim=-int(nesting))(fn)


class ShareSubsamples(Messenger):
    """Gives a plate the subsample it had before, if any, and remembers it."""

    def __init__(self, subsamples: dict[str, Tensor]) -> None:
        super().__init__()
        self.subsamples = subsamples

    def _pyro_sample(self, msg: Site) -> None:
        if is_subsample(msg) and msg["value"] is None and msg["name"] in self.subsamples:
            msg["value"] = self.subsamples[msg["name"]]
            msg["done"] = True

    def _pyro_post_sample(self, msg: Site) -> None:
        if is_subsample(msg):
            self.subsamples[msg["name"]] = msg["value"]


class _DetachScoreSites(Messenger):
    """Stops gradients at the values of the guide's score-function sites."""

    def __init__(self, estimators: SiteEstimators) -> None:
        super().__init__()
        self.estimators = estimators

    def _pyro_sample(self, msg: Site) -> None:
        if not is_subsample(msg):
            # These raise before anything is drawn.
            self.estimators.at(msg)
            self.estimators.check_carried(msg)

    def _pyro_post_sample(self, msg: Site) -> None:
        if not is_subsample(msg) and is_score_site(msg, self.estimators):
            # A new tensor, also where the value has no gradient: transforms remember what they
            # made it of, and by that their parameters would drop out of its log-probability.
            msg["value"] = msg["value"].detach()


class _CutPathDraws(Messenger):
    """Hands on a copy of each reparameterised draw that gradients do not pass.

    All that follows the draw depends on the copy, so that a derivative in the copies is the one
    along the path and nothing else; ``path_value`` keeps the draw as the parameters made it. Where
    no site needs that, nothing is cut; where one does, all before it have to be, too.
    """

    def __init__(self, estimators: SiteEstimators, *, is_cutting: bool) -> None:
        super().__init__()
        self.estimators = estimators
        self.is_cutting = is_cutting
        self._has_passed = False

    def _pyro_post_sample(self, msg: Site) -> None:
        if is_subsample(msg) or not is_on_path(msg, self.estimators):
            return
        self.is_cutting = self.is_cutting or is_path_draw(msg, self.estimators)
        self._has_passed = self._has_passed or not self.is_cutting
        if self.is_cutting and msg["value"].requires_grad:
            msg["path_value"] = msg["value"]
            msg["value"] = msg["value"].detach().requires_grad_()

    @property
    def has_missed(self) -> bool:
        """Whether a draw was passed that should have been cut."""
        return self.is_cutting and self._has_passed


def _check_path_draws(program: Program, guide_trace: Trace) -> None:
    reparam = program.estimators.default
    if reparam not in ("dreg", "stl"):
        return
    draws = [(name, site) for name, site in samples(guide_trace) if not site["is_observed"]]
    if not any(site["fn"].has_rsample and not is_deterministic(site["fn"]) for _, site in draws):
        raise ValueError(
            f'reparam="{reparam}" is about guide sites with a reparameterised sampler, but the '
            f"guide has none (it samples {sorted(name for name, _ in draws) or 'nothing'}). Use "
            "the default reparam, which treats other sites alike."
        )


def _check_left_of_plates(name: str, site: Site) -> None:
    """The host allows dims there, as enumeration adds them; these would be summed over."""
    shape, dims = site["log_prob"].shape, plate_dims(site)
    depth = max((-dim for dim in dims.values()), default=0)
    if math.prod(shape[: max(0, len(shape) - depth)]) == 1:
        return
    particles = dims.get(PARTICLE_PLATE)
    remedy = (
        "Put a plate around them or declare them by .to_event()."
        if particles is None
        else "With vectorize_particles=True the value of a latent holds the particles at batch dim "
        f"{particles}: compute with it so that they stay there, as (w * x).sum(-1) does and "
        "w @ x.T does not, for w of one event dim and x of a plate at -1; or use "
        "vectorize_particles=False."
    )
    raise ValueError(
        f"Site {name!r} has log-probabilities of shape {tuple(shape)}, with dims left of its "
        f"plates' ({', '.join(f'{plate} at {dim}' for plate, dim in dims.items()) or 'none'}). "
        + remedy
    )


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


def _refuse_rejection(sites: list[tuple[str, Site]]) -> None:
    for name, site in sites:
        _, score_function, entropy_term = site["score_parts"]
        if not (is_identically_zero(score_function) or is_identically_zero(entropy_term)):
            raise NotImplementedError(
                f"Guide site {name!r} ({type(site['fn']).__name__}) samples by rejection: its "
                "gradient has a score part and a path part. Use a distribution that is fully "
                'reparameterised, reparam="score", or infer={"estimator": "score"} there.'
            )
