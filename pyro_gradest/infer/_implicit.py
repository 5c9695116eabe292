"""Implicit sites: what they are computed from, and their draws in unconstrained space."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from pyro import distributions as dist
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Transform, biject_to

from pyro_gradest.distributions import Implicit
from pyro_gradest.infer._graph import graph_leaves
from pyro_gradest.infer._plates import plate_dims
from pyro_gradest.infer._sites import (
    Site,
    Trace,
    both,
    is_deterministic,
    is_subsample,
    mask_of,
    own_estimator,
    samples,
)

Parents = dict[str, tuple[str, ...]]
"""For each implicit site the sites that its value is computed from."""


class ImplicitGroup(NamedTuple):
    """Draws of the implicit sites that share their plates, whose entropy is joint."""

    sites: tuple[str, ...]
    samples: Float[Tensor, " K *plates D"]
    """In unconstrained space, all events flattened and side by side; attached."""
    weight: Float[Tensor, " *plates"]
    """What multiplies the entropy: scale and mask."""


def implicit_parents(guide: Any, args: tuple, kwargs: dict[str, Any]) -> Parents:
    """Run the guide once, and follow the graph of each implicit value back to other sites.

    Raises:
        ValueError: If an implicit site has no noise, depends on a site that is no noise, or on
            noise that elements of its plates share.
    """
    with torch.enable_grad(), _Cut() as cut:
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
    sites = {name: site for name, site in samples(trace) if name in cut.leaves}
    parents: Parents = {}
    for name, value in cut.implicit.items():
        leaves = {id(leaf) for leaf in graph_leaves(value)}
        parents[name] = tuple(site for site, leaf in cut.leaves.items() if id(leaf) in leaves)
        _check_parents(name, parents[name], sites)
    return parents


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
    model_sites = dict(samples(model_trace))
    noise = {parent for names in parents.values() for parent in names}
    for name, site in samples(guide_trace):
        fn, value = site["fn"], site["value"]
        if is_implicit(fn):
            transform = to_constrained((model_sites.get(name) or site)["fn"])
            unconstrained = transform.inv(value)
            log_det = transform.log_abs_det_jacobian(unconstrained, value)
            log_det = sum_rightmost(log_det, log_det.dim() - len(fn.batch_shape))
            point_mass = dist.Delta(value, -log_det, event_dim=fn.event_dim)
            site["implicit"] = unconstrained
        elif name in noise:
            point_mass = dist.Delta(value, event_dim=fn.event_dim)
        else:
            continue
        mask = mask_of(fn)
        site["fn"] = point_mass if mask is True else point_mass.mask(mask)


def implicit_groups(guide_trace: Trace, num_particles: int) -> list[ImplicitGroup]:
    """The draws of a run, by the plates that their sites lie in."""
    groups: dict[tuple[str, ...], list[tuple[str, Tensor, Tensor]]] = {}
    for name, site in samples(guide_trace):
        if "implicit" in site:
            plates, drawn, weight = _by_plate(site)
            if num_particles == 1:
                drawn = drawn[None]
            else:
                plates, weight = plates[1:], weight[0]
            groups.setdefault(plates, []).append((name, drawn, weight))
    return [_join(members) for members in groups.values()]


def concatenate_groups(runs: list[list[ImplicitGroup]]) -> list[ImplicitGroup]:
    """Join particles along axis 0."""
    return [
        groups[0]._replace(samples=torch.cat([group.samples for group in groups]))
        for groups in zip(*runs, strict=True)
    ]


def is_implicit(fn: Any) -> bool:
    """Whether a distribution, or what it wraps, can only be sampled."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Implicit)


def to_constrained(fn: Any) -> Transform:
    """The host's map from unconstrained space to the support of a distribution."""
    support = fn.support
    if type(support).__name__ == "MixtureSameFamilyConstraint":
        support = support.base_constraint  # the host knows no map to the support of mixtures
    return biject_to(support)


class _Cut(Messenger):
    """Notes the implicit values, and cuts the graph at every draw, so that it starts there."""

    def __init__(self) -> None:
        super().__init__()
        self.implicit: dict[str, Tensor] = {}
        self.leaves: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: Site) -> None:
        if is_subsample(msg):
            return
        if msg["is_observed"]:
            _refuse_observed(msg)
            return
        if is_implicit(msg["fn"]):
            self.implicit[msg["name"]] = msg["value"]
        elif is_deterministic(msg["fn"]):
            return
        if msg["value"].is_floating_point():
            msg["value"] = msg["value"].detach().requires_grad_()
        self.leaves[msg["name"]] = msg["value"]


def _refuse_observed(site: Site) -> None:
    if is_implicit(site["fn"]):
        raise ValueError(
            f"Implicit site {site['name']!r} is observed, but it has no density that an "
            "observation could be scored by. Observe a site with a density."
        )


def weight_of(site: Site) -> Tensor:
    """What multiplies the entropy of a site: its scale and mask."""
    mask = both(mask_of(site["fn"]), True if site["mask"] is None else site["mask"])
    drawn = site["implicit"]
    ones = torch.ones(site["fn"].batch_shape, dtype=drawn.dtype, device=drawn.device)
    return ones * site["scale"] * mask


def _by_plate(site: Site) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """Plates from the left, the draws ``[*plates, D]`` and their weight ``[*plates]``."""
    unconstrained, batch_shape = site["implicit"], site["fn"].batch_shape
    dims = plate_dims(site)
    plates = tuple(sorted(dims, key=dims.__getitem__))
    sizes = [batch_shape[dims[plate]] for plate in plates]
    event = unconstrained.shape[len(batch_shape) :].numel()
    return plates, unconstrained.reshape(*sizes, event), weight_of(site).reshape(sizes)


def _join(members: list[tuple[str, Tensor, Tensor]]) -> ImplicitGroup:
    names, drawn, weights = zip(*members, strict=True)
    for name, weight in zip(names, weights, strict=True):
        if weight is not weights[0] and not torch.equal(weight, weights[0]):
            raise ValueError(
                f"Implicit sites {names[0]!r} and {name!r} lie in the same plates, so that their "
                "entropy is joint, but their scale or mask differ. Give them the same."
            )
    return ImplicitGroup(names, torch.cat(drawn, dim=-1), weights[0])
