"""What one sample site of a trace says: whether its value is a draw, its mask, its density."""

from typing import Any

from pyro import distributions as dist
from pyro import poutine
from torch import Tensor

Site = Any  # a message of the host's, whose type has all fields optional
Trace = poutine.Trace
TOLD_APART = ("dreg", "stl", "split")
"""Where the gradient along the path through draws is told from all others."""


def samples(trace: Trace) -> list[tuple[str, Site]]:
    """Names and messages of the sample sites of a trace that have a density."""
    return [
        (name, site)
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not is_subsample(site)
        and not (site["infer"] or {}).get("_deterministic")
    ]


def is_score_site(site: Site, reparam: str) -> bool:
    fn = site["fn"]
    if site["is_observed"]:
        # A factor stands for a draw that the guide has made by itself.
        return isinstance(fn, dist.Unit) and not fn.has_rsample
    return not is_deterministic(fn) and (reparam == "score" or not fn.has_rsample)


def is_path_draw(site: Site, reparam: str) -> bool:
    """Whether the site is a draw whose gradient has to be told from that of densities."""
    is_draw = not (site["is_observed"] or is_deterministic(site["fn"]))
    return reparam in TOLD_APART and is_draw and not is_score_site(site, reparam)


def is_auxiliary(site: Site) -> bool:
    """Whether the site is a draw that helps the guide and is in no model."""
    return not site["is_observed"] and bool((site["infer"] or {}).get("is_auxiliary"))


def is_deterministic(fn: Any) -> bool:
    """Whether the site is a point mass, whose value is a parameter rather than a draw."""
    while hasattr(fn, "base_dist") and not isinstance(fn, dist.TransformedDistribution):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)


def is_subsample(site: Site) -> bool:
    return type(site["fn"]).__name__ == "_Subsample"


def mask_of(fn: Any) -> bool | Tensor:
    """The mask under which a distribution lies, True where there is none."""
    if isinstance(fn, dist.MaskedDistribution):
        return both(fn._mask, mask_of(fn.base_dist))
    if isinstance(fn, dist.ExpandedDistribution):
        return mask_of(fn.base_dist)
    if isinstance(fn, dist.Independent):
        inner = mask_of(fn.base_dist)
        event_dims = tuple(range(-fn.reinterpreted_batch_ndims, 0))
        return inner if isinstance(inner, bool) else inner.any(event_dims)
    return True


def both(mask: bool | Tensor, other: bool | Tensor) -> bool | Tensor:
    if mask is True:
        return other
    return mask if other is True else mask & other


def log_density(site: Site) -> Tensor:
    """Log-density of a draw, which happens whatever its scale and mask."""
    fn = _unmasked(site["fn"])
    return site["unscaled_log_prob"] if fn is site["fn"] else fn.log_prob(site["value"])


def _unmasked(fn: Any) -> Any:
    if isinstance(fn, dist.MaskedDistribution):
        return _unmasked(fn.base_dist)
    if isinstance(fn, dist.ExpandedDistribution) and mask_of(fn) is not True:
        return _unmasked(fn.base_dist).expand(fn.batch_shape)
    if isinstance(fn, dist.Independent) and mask_of(fn) is not True:
        return _unmasked(fn.base_dist).to_event(fn.reinterpreted_batch_ndims)
    return fn
