"""Runs model and guide: the guide draws, the model follows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array
from numpyro import handlers
from numpyro.primitives import Messenger
from numpyro.util import check_model_guide_match

from numpyro_gradest.infer._implicit import implicit_parents, take_implicit_sites
from numpyro_gradest.infer._plates import CommonPlates, plate_dims
from numpyro_gradest.infer._site_estimators import (
    SiteEstimators,
    check_observed,
    is_on_path,
    is_path_draw,
    is_score_site,
)
from numpyro_gradest.infer._sites import Site, Trace, is_auxiliary, is_deterministic, samples


class Program(NamedTuple):
    """What is run: a model and a guide, with their parameters and arguments."""

    model: Callable
    guide: Callable
    params: dict[str, Any]
    args: tuple
    kwargs: dict[str, Any]
    estimators: SiteEstimators
    """How the gradient at each guide site is estimated."""
    is_weighted: bool
    """Whether particles are weighed against each other, so that log-weights must be whole."""
    takes_implicit: bool = False
    """Whether implicit sites are dealt with; else they raise, as they have no density."""
    is_antithetic: bool = False
    """Whether a particle is an antithetic pair."""
    has_credits: bool = False
    """Whether it is found out what is downstream of each score-function site."""
    plate_key: Array | None = None
    """What every plate's subsample is drawn from, so that all particles see the same data."""

    def with_plate_key(self, key: Array) -> "Program":
        """Draw every plate's subsample from one key, so that all particles see the same data."""
        program = self._replace(plate_key=key)
        return program._replace(
            model=program.in_its_plates(self.model), guide=program.in_its_plates(self.guide)
        )

    def in_its_plates(self, fn: Callable) -> Callable:
        """A function whose plates draw the subsamples of the program's."""
        hidden = ["sample", "prng_key", "control_flow"]
        return handlers.seed(fn, rng_seed=self.plate_key, hide_types=hidden)

    def detached(self) -> "Program":
        """The same program without gradient."""
        params, args, kwargs = map(_without_gradient, (self.params, self.args, self.kwargs))
        return self._replace(params=params, args=args, kwargs=kwargs)


def trace_particle(program: Program, key: Array) -> tuple[Trace, Trace]:
    """Trace the model and the guide; gradients stop at the values of score-function sites."""
    guide_trace = trace_guide(program, _guide_key(key), {})
    return trace_model_at(program, key, guide_trace), guide_trace


def trace_model_at(program: Program, key: Array, guide_trace: Trace) -> Trace:
    """Trace the model at what the guide drew with this key, and deal with implicit sites."""
    model_trace = trace_model(program, _model_key(key), guide_trace)
    if program.takes_implicit:
        params = jax.tree.map(lambda leaf: leaf, program.params)
        guide = handlers.substitute(handlers.seed(program.guide, _guide_key(key)), data=params)
        parents = implicit_parents(guide, guide_trace, program.args, program.kwargs)
        take_implicit_sites(model_trace, guide_trace, parents)
    return model_trace


def trace_particle_along_paths(
    program: Program, key: Array
) -> tuple[tuple[Trace, Trace], dict[str, tuple[Trace, Trace]]]:
    """Trace model and guide at the same draws, with different gradients.

    If any site needs that. In the first pair then the parameters have a gradient and the draws
    have none. In the others it is the reverse: there is one along the paths that start at the
    reparameterised draws of a kind, and no other.
    """
    drawn = trace_guide(program, _guide_key(key), {})
    paths = {
        name: program.estimators.path_kind(site)
        for name, site in samples(drawn)
        if is_on_path(site, program.estimators)
    }
    _check_path_draws(program, drawn, has_path=bool(paths))
    if not any(is_path_draw(site, program.estimators) for _, site in samples(drawn)):
        return (trace_model_at(program, key, drawn), drawn), {}

    kinds = sorted(set(paths.values()))
    draws = {
        name: site["value"]
        for name, site in samples(drawn)
        if not (site["is_observed"] or is_deterministic(site))
    }
    guide_trace = trace_guide(program, _guide_key(key), jax.lax.stop_gradient(draws))
    explicit = trace_model(program, _model_key(key), guide_trace), guide_trace
    along = {}
    if len(kinds) == 1:
        starts = {kinds[0]: trace_guide(program.detached(), _guide_key(key), draws)}
    else:
        starts = _trace_from_each_kind(program, _guide_key(key), draws, paths)
    for kind, guide_trace in starts.items():
        along[kind] = trace_model(program.detached(), _model_key(key), guide_trace), guide_trace
    return explicit, along


def _trace_from_each_kind(
    program: Program, key: Array, draws: dict[str, Array], paths: dict[str, str]
) -> dict[str, Trace]:
    """Trace the guide without the parameters' gradient, but for that in the draws of one kind.

    What a parameter moves directly is told from what it moves through earlier draws: a draw has
    the derivative of the first where the earlier draws have none, and of the second where the
    parameters have none.
    """
    others = {name: value for name, value in draws.items() if name not in paths}
    others = jax.lax.stop_gradient(others)
    direct: dict[str, Array] = {}

    def detach(name: str, value: Array) -> Array:
        direct[name] = value
        return jax.lax.stop_gradient(value)

    with _ReplacePathDraws(detach, paths):
        trace_guide(program, key, others)

    traces = {}
    for kind in sorted(set(paths.values())):

        def attach(name: str, value: Array, kind: str = kind) -> Array:
            if paths[name] != kind:
                return value
            # The difference is exactly zero: it brings the gradient and leaves the value alone.
            return value + (direct[name] - jax.lax.stop_gradient(direct[name]))

        with _ReplacePathDraws(attach, paths):
            traces[kind] = trace_guide(program.detached(), key, others)
    return traces


class _ReplacePathDraws(Messenger):
    """Hands on, in the place of each reparameterised draw, a function of its name and value."""

    def __init__(self, function: Callable[[str, Array], Array], paths: dict[str, str]) -> None:
        super().__init__()
        self.function = function
        self.paths = paths

    def process_message(self, msg: Site) -> None:
        if msg["type"] == "control_flow":
            raise NotImplementedError(
                'Guide sites ask for "dreg" and for other gradients along the path in a guide with '
                "scan or cond, inside of which these can't be told apart. Choose the same for all "
                "sites with a reparameterised sampler."
            )

    def postprocess_message(self, msg: Site) -> None:
        if msg["type"] == "sample" and msg["name"] in self.paths:
            msg["value"] = self.function(msg["name"], msg["value"])
            # A log_prob computed from cached intermediates would bring the gradient back.
            msg["intermediates"] = []


def _check_path_draws(program: Program, guide_trace: Trace, *, has_path: bool) -> None:
    reparam = program.estimators.default
    if reparam not in ("dreg", "stl") or has_path:
        return
    draws = [(name, site) for name, site in samples(guide_trace) if not site["is_observed"]]
    if not any(site["fn"].has_rsample and not is_deterministic(site) for _, site in draws):
        raise ValueError(
            f'reparam="{reparam}" is about guide sites with a reparameterised sampler, but the '
            f"guide has none (it samples {sorted(name for name, _ in draws) or 'nothing'}). Use "
            "the default reparam, which treats other sites alike."
        )


def _model_key(key: Array) -> Array:
    return jax.random.split(key)[0]


def _guide_key(key: Array) -> Array:
    return jax.random.split(key)[1]


def trace_guide(program: Program, key: Array, draws: dict[str, Array]) -> Trace:
    """Trace the guide, with the given values for some of its draws."""
    # Programs update mutable state in place: every run gets containers of its own.
    params = jax.tree.map(lambda leaf: leaf, program.params)
    guide = handlers.substitute(handlers.seed(program.guide, key), data=params | draws)
    with _DetachScoreSites(program.estimators):
        trace = handlers.trace(guide).get_trace(*program.args, **program.kwargs)
    check_observed(trace)
    return trace


def guide_sites(program: Program, key: Array) -> dict[str, Site]:
    """The guide's sample sites, by a run of it alone."""
    return dict(samples(trace_guide(program, key, {})))


def trace_model(program: Program, key: Array, guide_trace: Trace) -> Trace:
    """Trace the model at what the guide drew."""
    params = jax.tree.map(lambda leaf: leaf, program.params)
    # Substituted, not replayed: the host's replay does not reach sites inside of cond.
    data = params | _drawn(guide_trace) | mutable_state_of(guide_trace)
    model = handlers.substitute(handlers.seed(program.model, key), data=data)
    model_trace = handlers.trace(model).get_trace(*program.args, **program.kwargs)
    _check_match(model_trace, guide_trace)
    return model_trace


def _without_gradient(tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: jax.lax.stop_gradient(leaf) if isinstance(leaf, jax.Array) else leaf, tree
    )


def trace_guide_at(program: Program, guide_trace: Trace, key: Array) -> Trace:
    """Trace the guide again at the latents and subsamples it drew, with other auxiliary draws."""
    latents = {
        name: value
        for name, value in _drawn(guide_trace).items()
        if not is_auxiliary(guide_trace[name])
    }
    params = jax.tree.map(lambda leaf: leaf, program.params)
    data = params | latents | mutable_state_of(guide_trace)
    guide = handlers.substitute(handlers.seed(program.guide, key), data=data)
    with _DetachScoreSites(program.estimators):
        return handlers.trace(guide).get_trace(*program.args, **program.kwargs)


def latent_values(model_trace: Trace) -> dict[str, Array]:
    """Values of the model's latent sites."""
    return {name: site["value"] for name, site in samples(model_trace) if not site["is_observed"]}


def latent_axes(model_trace: Trace, plates: CommonPlates) -> dict[str, tuple[int, ...]]:
    """For each latent site, the (negative) axes of its value that are the common plates."""
    axes = {}
    for name, site in samples(model_trace):
        if not site["is_observed"]:
            dims, event_dim = plate_dims(site), site["fn"].event_dim
            axes[name] = tuple(dims[plate] - event_dim for plate in plates.names)
    return axes


class _DetachScoreSites(Messenger):
    """Stops gradients at the values of the guide's score-function sites."""

    def __init__(self, estimators: SiteEstimators) -> None:
        super().__init__()
        self.estimators = estimators

    def process_message(self, msg: Site) -> None:
        if msg["type"] == "sample":
            self.estimators.at(msg)  # raises before anything is drawn
        if msg["type"] == "control_flow":
            # A handler sees the sites of scan and cond only when these have run; by then the
            # values have gone into what follows them inside.
            msg["kwargs"]["substitute_stack"].append(("substitute", self._detached_value))

    def postprocess_message(self, msg: Site) -> None:
        if msg["type"] == "sample" and is_score_site(msg, self.estimators):
            msg["value"] = jax.lax.stop_gradient(msg["value"])
            # A log_prob computed from cached intermediates would bring the gradient back.
            msg["intermediates"] = []

    def _detached_value(self, site: Site) -> Array | None:
        if site["type"] != "sample" or not is_score_site(site, self.estimators):
            return None
        value = site["value"]
        if value is None:
            value = site["fn"](*site["args"], **site["kwargs"])
        return jax.lax.stop_gradient(value)


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


def _drawn(guide_trace: Trace) -> dict[str, Array]:
    """What the model takes over from the guide: its draws, and its plates' subsamples."""
    draws = {name: site["value"] for name, site in samples(guide_trace) if not site["is_observed"]}
    return draws | of_type(guide_trace, "plate")


def mutable_state_of(trace: Trace) -> dict[str, Any]:
    return of_type(trace, "mutable")


def of_type(trace: Trace, type_: str) -> dict[str, Any]:
    return {name: site["value"] for name, site in trace.items() if site["type"] == type_}
