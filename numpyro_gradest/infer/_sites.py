"""What one sample site of a trace says: whether its value is a draw, its mask, its density."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array
from numpyro import distributions as dist

Site = dict[str, Any]
Trace = dict[str, Site]
ESTIMATOR = "estimator"
"""Where in a site's ``infer`` its estimator stands."""
_WRAPPERS = (
    dist.ExpandedDistribution,
    dist.Independent,
    dist.MaskedDistribution,
    dist.TransformedDistribution,
)


def samples(trace: Trace) -> list[tuple[str, Site]]:
    """Names and messages of the sample sites of a trace."""
    return [(name, site) for name, site in trace.items() if site["type"] == "sample"]


def own_estimator(site: Site) -> Any:
    """What a site says that its estimator be."""
    return site["infer"].get(ESTIMATOR)


def is_auxiliary(site: Site) -> bool:
    """Whether the site is a draw that helps the guide and is in no model."""
    is_draw = site["type"] == "sample" and not site["is_observed"]
    return is_draw and bool(site["infer"].get("is_auxiliary"))


def is_deterministic(site: Site) -> bool:
    """Whether the site is a point mass, whose value is a parameter rather than a draw."""
    return isinstance(base_of(site["fn"]), dist.Delta)


def base_of(fn: dist.Distribution) -> dist.Distribution:
    """What a distribution wraps."""
    while isinstance(fn, _WRAPPERS):
        fn = fn.base_dist
    return fn


def mask_of(fn: dist.Distribution) -> bool | Array:
    """The mask under which a distribution lies, True where there is none."""
    if isinstance(fn, dist.MaskedDistribution):
        inner = mask_of(fn.base_dist)
        outer = fn._mask if isinstance(fn._mask, bool) else jnp.asarray(fn._mask)
        return outer if inner is True else outer & inner
    if isinstance(fn, dist.ExpandedDistribution):
        return mask_of(fn.base_dist)
    if isinstance(fn, dist.Independent):
        inner = mask_of(fn.base_dist)
        event_dims = tuple(range(-fn.reinterpreted_batch_ndims, 0))
        return inner if isinstance(inner, bool) else inner.any(event_dims)
    return True


def unmasked(fn: dist.Distribution) -> dist.Distribution:
    if isinstance(fn, dist.MaskedDistribution):
        return unmasked(fn.base_dist)
    if isinstance(fn, dist.ExpandedDistribution):
        return unmasked(fn.base_dist).expand(fn.batch_shape)
    if isinstance(fn, dist.Independent):
        return unmasked(fn.base_dist).to_event(fn.reinterpreted_batch_ndims)
    return fn


def log_prob_of(name: str, site: Site) -> Array:
    args = (site["intermediates"],) if site["intermediates"] else ()
    try:
        return jnp.asarray(site["fn"].log_prob(site["value"], *args))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"log_prob failed at site {name!r}: its value has shape {jnp.shape(site['value'])}, "
            f"its distribution batch shape {site['fn'].batch_shape} and event shape "
            f"{site['fn'].event_shape}. {error}"
        ) from error
