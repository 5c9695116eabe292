"""What one sample site of a trace says: whether its value is a draw, its mask, its density."""

from typing import Any

from pyro import distributions as dist
from pyro import poutine
from torch import Tensor

Site = Any  # a message of the host's, whose type has all fields optional
Trace = poutine.Trace
ESTIMATOR = "estimator"
"""Where in a site's ``infer`` its estimator stands."""


def samples(trace: Trace) -> list[tuple[str, Site]]:
    """Names and messages of the sample sites of a trace that have a density."""
    return [
        (name, site)
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not is_subsample(site)
        and not (site["infer"] or {}).get("_deterministic")
    ]


def own_estimator(site: Site) -> Any:
    """What a site says that its estimator be."""
    return (site["infer"] or {}).get(ESTIMATOR)


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
