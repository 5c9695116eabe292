"""Implicit sites: what they are computed from, and their draws in unconstrained space."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.distributions import biject_to

from numpyro_gradest.distributions import Implicit
from numpyro_gradest.infer._plates import plate_dims
from numpyro_gradest.infer._sites import Site, Trace, is_deterministic, mask_of, samples

Parents = dict[str, tuple[str, ...]]
"""For each implicit site the sites that its value is computed from."""


class ImplicitGroup(NamedTuple):
    """Draws of the implicit sites that share their plates, whose entropy is joint."""

    samples: Float[Array, " *particles *plates D"]
    """In unconstrained space, all events flattened and side by side; attached."""
    weight: Float[Array, " *particles *plates"]
    """What multiplies the entropy: scale and mask."""


def implicit_parents(
    guide: Callable, guide_trace: Trace, args: tuple, kwargs: dict[str, Any]
) -> Parents:
    """Trace the guide as a function of its draws, and see which of them each implicit value needs.

    Raises:
        ValueError: If an implicit site has no noise, depends on a site that is no noise, or on
            noise that elements of its plates share.
    """
    sites = {
        name: site
        for name, site in samples(guide_trace)
        if not site["is_observed"] and (is_implicit(site["fn"]) or not is_deterministic(site))
    }
    implicit = [name for name, site in sites.items() if is_implicit(site["fn"])]
    if not implicit:
        return {}

    def implicit_values(draws: dict[str, Array]) -> list[Array]:
        trace = handlers.trace(handlers.substitute(guide, data=draws)).get_trace(*args, **kwargs)
        return [_implicit(trace[name]["fn"]).value for name in implicit]

    draws = {name: site["value"] for name, site in sites.items()}
    needed = _inputs_by_output(jax.make_jaxpr(implicit_values)(draws).jaxpr)
    names = sorted(draws)  # as a dict is flattened
    parents = {
        name: tuple(names[i] for i in sorted(inputs))
        for name, inputs in zip(implicit, needed, strict=True)
    }
    for name in implicit:
        _check_parents(name, parents[name], sites)
    return parents


def _inputs_by_output(jaxpr: Any) -> list[set[int]]:
    """For each output of a jaxpr the inputs that it may depend on."""
    inputs: dict[Any, set[int]] = {var: {i} for i, var in enumerate(jaxpr.invars)}

    def of(var: Any) -> set[int]:
        return inputs.get(var, set()) if not hasattr(var, "val") else set()  # a literal has none

    for equation in jaxpr.eqns:
        union = set().union(*(of(var) for var in equation.invars))
        inputs.update((var, union) for var in equation.outvars)
    return [of(var) for var in jaxpr.outvars]


def _check_parents(name: str, parents: tuple[str, ...], sites: dict[str, Site]) -> None:
    if not parents:
        raise ValueError(
            f"Implicit site {name!r} is computed from no noise. Draw its noise at an auxiliary "
            'site: sample("noise", dist.Normal(0, 1).expand([...]).to_event(1), '
            'infer={"is_auxiliary": True}).'
        )
    for parent in parents:
        site = sites[parent]
        if is_implicit(site["fn"]) or not site["infer"].get("is_auxiliary"):
            raise ValueError(
                f"Implicit site {name!r} depends on the draw of site {parent!r}. Its entropy "
                f"would be that given {parent!r}, of which there is one draw for each value of "
                f"{parent!r}: too few to estimate it from. Compute {name!r} from noise alone, or "
                f"make {parent!r} and {name!r} parts of one implicit site."
            )
        if not site["fn"].has_rsample:
            raise ValueError(
                f"Implicit site {name!r} is computed from {parent!r}, a draw of "
                f"{type(site['fn']).__name__}, through which no gradient passes. Use noise that "
                "is reparameterised, such as a Normal."
            )
        shared = sorted(set(plate_dims(sites[name])) - set(plate_dims(site)))
        if shared:
            raise ValueError(
                f"Implicit site {name!r} lies in plate {shared[0]!r} but its noise {parent!r} "
                "outside of it, so that its elements are not independent and their entropies do "
                f"not add up. Draw {parent!r} inside the plate."
            )


def take_implicit_sites(
    model_trace: Trace, guide_trace: Trace, parents: Parents
) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Put point masses in the place of implicit sites and their noise, and note the draws.

    In unconstrained coordinates u an implicit site has no density to count; the Jacobian of its
    constraint, H[z] = H[u] + E log|dz/du|, is the point mass's.
    """
    noise = {parent for names in parents.values() for parent in names}
    for name, site in samples(guide_trace):
        fn, value = site["fn"], site["value"]
        if is_implicit(fn):
            if site["is_observed"]:
                raise ValueError(
                    f"Implicit site {name!r} is observed, but it has no density that an "
                    "observation could be scored by. Observe a site with a density."
                )
            support = (model_trace.get(name) or site)["fn"].support
            transform = biject_to(support)
            unconstrained = transform._inverse(value)
            log_det = transform.log_abs_det_jacobian(unconstrained, value)
            extra = jnp.ndim(log_det) - len(fn.batch_shape)
            log_det = log_det.sum(tuple(range(-extra, 0))) if extra > 0 else log_det
            site["implicit"] = unconstrained
            site["fn"] = _like(fn, dist.Delta(value, -log_det, event_dim=fn.event_dim))
            site["intermediates"] = []
        elif name in noise and not is_deterministic(site):
            site["fn"] = _like(fn, dist.Delta(value, event_dim=fn.event_dim))
            site["intermediates"] = []
    return {}


def implicit_groups(guide_trace: Trace) -> dict[tuple[str, ...], ImplicitGroup]:
    """The draws of a run, by the plates that their sites lie in."""
    groups: dict[tuple[str, ...], list[tuple[str, Array, Array]]] = {}
    for name, site in samples(guide_trace):
        if "implicit" in site:
            plates, drawn, weight = _by_plate(site)
            groups.setdefault(plates, []).append((name, drawn, weight))
    return {plates: _join(members) for plates, members in groups.items()}


def is_implicit(fn: Any) -> bool:
    """Whether a distribution, or what it wraps, can only be sampled."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Implicit)
