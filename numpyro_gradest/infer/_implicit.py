"""Implicit sites: what they are computed from, and their draws in unconstrained space."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.distributions.util import sum_rightmost

from numpyro_gradest.distributions import Implicit
from numpyro_gradest.infer._plates import plate_dims
from numpyro_gradest.infer._sites import (
    Site,
    Trace,
    is_deterministic,
    mask_of,
    own_estimator,
    samples,
)

Parents = dict[str, tuple[str, ...]]
"""For each implicit site the sites that its value is computed from."""


class ImplicitGroup(NamedTuple):
    """Draws of the implicit sites that share their plates, whose entropy is joint."""

    samples: Float[Array, " *plates D"]
    """In unconstrained space, all events flattened and side by side; attached."""
    weight: Float[Array, " *plates"]
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
        return [_unwrapped(trace[name]["fn"]).value for name in implicit]

    draws = {name: site["value"] for name, site in sites.items()}
    needed = inputs_by_output(jax.make_jaxpr(implicit_values)(draws).jaxpr)
    names = sorted(draws)  # as a dict is flattened
    parents = {
        name: tuple(names[i] for i in sorted(inputs))
        for name, inputs in zip(implicit, needed, strict=True)
    }
    for name in implicit:
        _check_parents(name, parents[name], sites)
    return parents


def inputs_by_output(jaxpr: Any) -> list[set[int]]:
    """For each output of a jaxpr the inputs that it may depend on."""
    inputs: dict[Any, set[int]] = {var: {i} for i, var in enumerate(jaxpr.invars)}

    def of(var: Any) -> set[int]:
        return inputs.get(var, set()) if not hasattr(var, "val") else set()  # a literal has none

    for equation in jaxpr.eqns:
        given = [of(var) for var in equation.invars]
        if equation.primitive.name in ("jit", "pjit"):
            inner = inputs_by_output(equation.params["jaxpr"].jaxpr)
            needed = [set().union(*(given[i] for i in indices)) for indices in inner]
        else:
            needed = [set().union(*given)] * len(equation.outvars)
        inputs.update(zip(equation.outvars, needed, strict=True))
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
        if own_estimator(site) is not None:
            raise ValueError(
                f"Implicit site {name!r} is computed from {parent!r}, whose draws its gradient "
                f"passes through. Remove the estimator {own_estimator(site)!r} of {parent!r}."
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


def take_implicit_sites(model_trace: Trace, guide_trace: Trace, parents: Parents) -> None:
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
            transform = biject_to(model_trace.get(name, site)["fn"].support)
            unconstrained = transform.inv(value)
            log_det = transform.log_abs_det_jacobian(unconstrained, value)
            log_det = sum_rightmost(log_det, jnp.ndim(log_det) - len(fn.batch_shape))
            point_mass = dist.Delta(value, -log_det, event_dim=fn.event_dim)
            site["implicit"] = unconstrained
        elif name in noise:
            point_mass = dist.Delta(value, event_dim=fn.event_dim)
        else:
            continue
        mask = mask_of(fn)
        site["fn"] = point_mass if mask is True else point_mass.mask(mask)
        site["intermediates"] = []


def implicit_groups(guide_trace: Trace) -> dict[tuple[str, ...], ImplicitGroup]:
    """The draws of one particle, by the implicit sites that lie in the same plates."""
    groups: dict[tuple[str, ...], dict[str, Site]] = {}
    for name, site in samples(guide_trace):
        if "implicit" in site:
            dims = plate_dims(site)
            plates = tuple(sorted(dims, key=dims.__getitem__))
            groups.setdefault(plates, {})[name] = site
    return {tuple(sites): _join(plates, sites) for plates, sites in groups.items()}


def is_implicit(fn: Any) -> bool:
    """Whether a distribution, or what it wraps, can only be sampled."""
    return isinstance(_unwrapped(fn), Implicit)


def _unwrapped(fn: Any) -> Any:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def _join(plates: tuple[str, ...], sites: dict[str, Site]) -> ImplicitGroup:
    _check_same_weight(sites)
    weight = [_by_plate(plates, site, weight_of(site))[..., 0] for site in sites.values()]
    drawn = [_by_plate(plates, site, site["implicit"]) for site in sites.values()]
    return ImplicitGroup(jnp.concatenate(drawn, axis=-1), weight[0])


def _by_plate(plates: tuple[str, ...], site: Site, array: Array) -> Array:
    """Bring the plates to the front, from the left, and flatten the rest."""
    dims, num_batch_dims = plate_dims(site), len(site["fn"].batch_shape)
    axes = [num_batch_dims + dims[plate] for plate in plates]
    array = jnp.moveaxis(array, axes, range(len(axes)))
    return array.reshape(*array.shape[: len(axes)], -1)


def weight_of(site: Site) -> Array:
    """What multiplies the entropy of a site: its scale and mask."""
    scale = 1.0 if site["scale"] is None else site["scale"]
    return jnp.ones(site["fn"].batch_shape) * scale * mask_of(site["fn"])


def _check_same_weight(sites: dict[str, Site]) -> None:
    (first, site), *others = sites.items()
    for name, other in others:
        scales = [1.0 if each["scale"] is None else each["scale"] for each in (site, other)]
        masks = mask_of(site["fn"]), mask_of(other["fn"])
        if not (_is_same(*scales) and _is_same(*masks)):
            raise ValueError(
                f"Implicit sites {first!r} and {name!r} lie in the same plates, so that their "
                "entropy is joint, but their scale or mask differ. Give them the same."
            )


def _is_same(one: Any, other: Any) -> bool:
    """Whether two scales or masks are the same; arrays that are traced can't be compared."""
    if any(isinstance(each, jax.core.Tracer) for each in (one, other)):
        return True
    return one is other or bool(jnp.array_equal(one, other))
