"""The plates that all sites of model and guide share: their elements have weights of their own."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from numpyro_gradest.infer._sites import Site, Trace, samples


class CommonPlates(NamedTuple):
    """The plates that every sample site of model and guide lies in, leftmost dim first."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    subsample_scale: float
    """Product of N/B over the subsampled ones."""


def common_plates(model_trace: Trace, guide_trace: Trace, *, is_weighted: bool) -> CommonPlates:
    """Find the plates that enclose every sample site; weights refuse subsampling in any other."""
    traces = {"model": model_trace, "guide": guide_trace}
    sites = [(side, *item) for side, trace in traces.items() for item in samples(trace)]
    sizes: dict[str, tuple[int, str]] = {}
    full_sizes: dict[str, int] = {}
    for side, name, site in sites:
        for frame in site["cond_indep_stack"]:
            size, first = sizes.setdefault(frame.name, (frame.size, f"{side} site {name!r}"))
            if size != frame.size:
                raise ValueError(
                    f"Plate {frame.name!r} has size {size} at {first} but {frame.size} at {side} "
                    f"site {name!r}. Give the plate the same size and subsample_size in model and "
                    "guide."
                )
            plate_site = model_trace.get(frame.name) or guide_trace.get(frame.name)
            full_sizes[frame.name] = plate_site["args"][0] if plate_site else frame.size

    dims = plate_dims(sites[0][2]) if sites else {}
    for plate, (size, inside) in sizes.items():
        for side, name, site in sites:
            if plate in plate_dims(site):
                continue
            dims.pop(plate, None)
            if is_weighted and full_sizes[plate] > size:
                raise ValueError(
                    f"Plate {plate!r} is subsampled ({size} of {full_sizes[plate]}) but {side} "
                    f"site {name!r} lies outside of it, while {inside} lies inside. The weights of "
                    f"a subsample say nothing about the rest of the data: put {name!r} inside the "
                    f"plate, do not subsample {plate!r}, or use one particle (the ELBO; average "
                    "several with num_replicates)."
                )
    names = tuple(sorted(dims, key=dims.__getitem__))
    return CommonPlates(
        names=names,
        sizes=tuple(sizes[name][0] for name in names),
        subsample_scale=math.prod(full_sizes[name] / sizes[name][0] for name in names),
    )


def to_batch(array: Array, dims: dict[str, int], plates: CommonPlates) -> Array:
    """Sum over all dims but those of the plates, put these in order, and repeat along others."""
    depth = max((-dim for dim in dims.values()), default=0)
    array = array.reshape((1,) * (depth - array.ndim) + array.shape)
    kept = [array.ndim + dims[plate] for plate in plates.names if plate in dims]
    array = array.sum([axis for axis in range(array.ndim) if axis not in kept])
    order = [sorted(kept).index(axis) for axis in kept]
    array = array.transpose(order)
    if len(kept) < len(plates.names):
        array = array[tuple(slice(None) if plate in dims else None for plate in plates.names)]
    return jnp.broadcast_to(array, plates.sizes)


def plates_of(site: Site) -> CommonPlates:
    """The plates of one site, for sums over the elements of others."""
    frames = sorted(site["cond_indep_stack"], key=lambda frame: frame.dim)
    return CommonPlates(
        tuple(frame.name for frame in frames), tuple(frame.size for frame in frames), 1.0
    )


def plate_dims(site: Site) -> dict[str, int]:
    return {frame.name: frame.dim for frame in site["cond_indep_stack"]}


def check_plate_shape(name: str, site: Site, log_prob: Array) -> None:
    """Each dim of the log-probability of a site inside plates is one of these plates."""
    sizes = {frame.dim: (frame.name, frame.size) for frame in site["cond_indep_stack"]}
    shape = log_prob.shape
    for dim in range(-len(shape), 0):
        plate, size = sizes.get(dim, (None, 1))
        is_time = dim == -len(shape) and site.get("_control_flow_done", False)
        if not sizes or is_time or shape[dim] in (1, size):
            continue
        where = f"plate {plate!r} has size {size}" if plate else "no plate is declared"
        raise ValueError(
            f"The log-probability at site {name!r} has shape {shape}: at dim {dim} {where}, but "
            f"the site has size {shape[dim]}. Check the shape of its value and parameters, add a "
            "plate for that dim, or declare it part of the event with .to_event()."
        )
