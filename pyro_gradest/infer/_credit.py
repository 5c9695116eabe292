"""Which costs a score-function site gets the credit for: those downstream of its draw.

Only direct dependencies are read off the programs. What follows from them depends on the plates,
too: within a plate an element of one site depends on the same element of another, but by way of a
site outside of the plate on all of its elements. Where the host's provenance loses sight of a draw,
all that follows is taken to depend on it: credit for too much is no bias.
"""

import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_gradest.infer._plates import PARTICLE_PLATE
from pyro_gradest.infer._sites import Site, Trace, is_subsample, samples

Upstream = dict[str, frozenset[str]]
"""Score-function sites, and of each the plates in which only the same element matters."""


class Credit(NamedTuple):
    """Of one score-function site."""

    log_q: Float[Tensor, " K *plates"]
    """Log-density of the draws, which happen whatever their scale and mask."""
    cost: Float[Tensor, " K *plates"]
    """The terms of the log-weight downstream of the draws, with all scales, detached."""


class TrackDraws(Messenger):
    """Marks what is computed from each latent site by the host's provenance."""

    def __init__(self) -> None:
        super().__init__()
        self._hidden = _HiddenDraws()
        self._when_sampled: frozenset[str] = frozenset()

    def __enter__(self) -> "TrackDraws":
        self._hidden.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> Any:
        self._hidden.__exit__(*exception)
        return super().__exit__(*exception)

    def _pyro_post_sample(self, msg: Site) -> None:
        if is_subsample(msg):
            return
        self._when_sampled = msg["follows"] = self._hidden.draws
        if not msg["is_observed"]:
            msg["drawn_from"] = get_provenance(msg["value"])
            own = frozenset([msg["name"]])
            self._hidden.known |= own
            msg["value"] = track_provenance(detach_provenance(msg["value"]), own)

    def note_log_probs(self, *traces: Trace) -> None:
        """Count what the log-probabilities have hidden, which come after all draws."""
        for trace in traces:
            for _, site in samples(trace):
                site["follows"] |= self._hidden.draws - self._when_sampled


class _HiddenDraws(TorchFunctionMode):
    """Collects the draws that turn into Python numbers, or are written into a tensor."""

    known: frozenset[str] = frozenset()
    """All draws so far."""
    draws: frozenset[str] = frozenset()
    """Those of which the host's provenance has lost sight."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if _is_transformed():
            self.draws = self.known
        if name in _OF_SHAPES:
            return result
        if sources := _sources(args) | _sources(kwargs):
            kept = _sources(_keeper(name, args, kwargs, result))
            hidden = sources if _has_size_of_values(name, args) else sources - kept
            if hidden and not _is_called_by_host():
                self.draws |= hidden
        return result


_OF_SHAPES = {
    "__get__",
    "__len__",
    "dim",
    "element_size",
    "get_device",
    "is_complex",
    "is_contiguous",
    "is_floating_point",
    "is_same_size",
    "ndimension",
    "nelement",
    "numel",
    "result_type",
    "size",
    "stride",
}
"""Functions whose result is no value of a tensor, or a tensor again."""
_OF_ANY_SIZE = {
    "argwhere",
    "bincount",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique",
    "unique_consecutive",
}
_HOST = ("pyro.", "pyro_gradest.", "torch.distributions.")
_BETWEEN = (__name__, "torch._tensor", "torch.overrides", "jaxtyping.", "beartype.")


def _keeper(name: str, args: tuple, kwargs: dict[str, Any], result: Any) -> Any:
    """What holds the values after a call, and should remember where they are from."""
    if "out" in kwargs:
        return kwargs["out"]
    is_in_place = name.endswith("_") and not name.endswith("__")
    return args[:1] if is_in_place or name in ("__setitem__", "__set__") else result


def _has_size_of_values(name: str, args: tuple) -> bool:
    """Whether values are in the size of the result, which counts as no value."""
    if name == "__getitem__":
        parts = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(one, Tensor) and one.dtype == torch.bool for one in parts)
    return name in _OF_ANY_SIZE or (name == "where" and len(args) == 1)


def _is_transformed() -> bool:
    """Whether ``torch.func`` maps or differentiates what is run, which has no provenance inside."""
    level = getattr(torch._C._functorch, "maybe_current_level", lambda: None)
    return level() is not None


def _sources(value: Any) -> frozenset[str]:
    """As the host's ``get_provenance``, of slices too; it is asked at every operation."""
    if isinstance(value, Tensor):
        return get_provenance(value)
    if isinstance(value, slice):
        value = (value.start, value.stop, value.step)
    elif isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return frozenset()
    return frozenset().union(*map(_sources, value))


def _is_called_by_host() -> bool:
    """Whether a number is the host's own affair, which it checks arguments by."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _module(frame).startswith(_BETWEEN):
        frame = frame.f_back
    return _module(frame).startswith(_HOST)


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))


def upstream_sites(
    model_trace: Trace, guide_trace: Trace, score_sites: set[str]
) -> dict[tuple[str, str], Upstream]:
    """What the term of each site, by its part and name, is downstream of."""
    upstream: dict[tuple[str, str], Upstream] = {}
    of_draws: dict[str, Upstream] = {}
    for name, site in samples(guide_trace):
        parents = get_provenance(site["log_prob"]) | site.get("drawn_from", frozenset())
        above = _above(parents - {name}, of_draws, site)
        above |= _all_above(site["follows"], of_draws, site)
        if name in score_sites:
            above[name] = _plates(site)
        upstream["guide", name] = of_draws[name] = above
    for name, site in samples(model_trace):
        above = _above(get_provenance(site["log_prob"]), of_draws, site)
        upstream["model", name] = above | _all_above(site["follows"], of_draws, site)
    return upstream


def _above(parents: Iterable[str], of_draws: dict[str, Upstream], site: Site) -> Upstream:
    above: Upstream = {}
    for parent in parents:
        for name, plates in of_draws[parent].items():
            above[name] = above.get(name, _plates(site)) & plates
    return above


def _all_above(parents: Iterable[str], of_draws: dict[str, Upstream], site: Site) -> Upstream:
    """As ``_above``, of all elements of the draws; particles alone stay apart."""
    plates = _plates(site) & {PARTICLE_PLATE}
    return {name: plates for parent in parents for name in of_draws.get(parent, ())}


def _plates(site: Site) -> frozenset[str]:
    return frozenset(frame.name for frame in site["cond_indep_stack"])
