"""The plates that all sites of model and guide share: their elements have weights of their own."""

import math
from typing import NamedTuple

from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from pyro_gradest.infer._sites import Site, Trace, samples

PARTICLE_PLATE = "num_particles_vectorized"
"""The host's name for the plate over vectorised particles, the leftmost of all."""


class CommonPlates(NamedTuple):
    """The plates that every sample site of model and guide lies in, leftmost dim first."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    sequential: tuple[str, ...]
    """Those that are loops (``for i in pyro.plate(...)``); each turn has a weight of its own."""
    subsample_scale: float
    """Product of N/B over the subsampled ones."""


def common_plates(model_trace: Trace, guide_trace: Trace, *, is_weighted: bool) -> CommonPlates:
    """Find the plates that enclose every sample site; weights refuse subsampling in any other."""
    traces = {"model": model_trace, "guide": guide_trace}
    sites = {
        f"{side} site {name!r}": site
        for side, trace in traces.items()
        for name, site in samples(trace)
    }
    extents = {where: _extents(site) for where, site in sites.items()}
    seen: dict[str, tuple[CondIndepStackFrame, str]] = {}
    for where, site in sites.items():
        for frame in site["cond_indep_stack"]:
            first, inside = seen.setdefault(frame.name, (frame, where))
            sizes, first_sizes = (frame.size, frame.full_size), (first.size, first.full_size)
            # A plate may be declared without a size (-1).
            if sizes != first_sizes and -1 not in (frame.size, first.size):
                raise ValueError(
                    f"Plate {frame.name!r} has size {first.size} of {first.full_size} at {inside} "
                    f"but {frame.size} of {frame.full_size} at {where}. Give the plate the same "
                    "size and subsample_size in model and guide."
                )

    frames = []
    for plate, (frame, inside) in seen.items():
        outside = [where for where in sites if extents[where].get(plate) != extents[inside][plate]]
        if not outside:
            frames.append(frame)
        elif plate == PARTICLE_PLATE:
            raise ValueError(
                f"The {outside[0]} lies outside of the plate of the particles, so that they share "
                "it. Keep it inside, or use vectorize_particles=False."
            )
        elif is_weighted and _subsample_scale(frame) != 1:
            raise ValueError(
                f"Plate {plate!r} is subsampled ({frame.size} of {frame.full_size}) but "
                f"{outside[0]} lies outside of it, while {inside} lies inside. The weights of a "
                "subsample say nothing about the rest of the data: put all sites inside the "
                f"plate, do not subsample {plate!r}, or use one particle (the ELBO; average "
                "several with num_replicates)."
            )
    vectorized = sorted((f for f in frames if f.vectorized), key=lambda frame: frame.dim or 0)
    return CommonPlates(
        names=tuple(frame.name for frame in vectorized),
        sizes=tuple(extents[seen[frame.name][1]][frame.name] for frame in vectorized),
        sequential=tuple(frame.name for frame in frames if not frame.vectorized),
        subsample_scale=math.prod(map(_subsample_scale, frames)),
    )


def to_batch(tensor: Tensor, dims: dict[str, int], plates: CommonPlates) -> Tensor:
    """Sum over all dims but those of the plates, put these in order, and repeat along others."""
    depth = max((-dim for dim in dims.values()), default=0)
    tensor = tensor.reshape((1,) * (depth - tensor.dim()) + tensor.shape)
    kept = [tensor.dim() + dims[plate] for plate in plates.names if plate in dims]
    summed = [axis for axis in range(tensor.dim()) if axis not in kept]
    tensor = tensor.sum(summed) if summed else tensor
    order = sorted(range(len(kept)), key=kept.__getitem__)
    tensor = tensor.permute([order.index(i) for i in range(len(order))])
    if len(kept) < len(plates.names):
        tensor = tensor[tuple(slice(None) if plate in dims else None for plate in plates.names)]
    return tensor.expand(plates.sizes)


def plates_of(site: Site) -> CommonPlates:
    """The plates of one site, for sums over the elements of others."""
    dims, extents = plate_dims(site), _extents(site)
    names = tuple(sorted(dims, key=dims.__getitem__))
    return CommonPlates(names, tuple(extents[name] for name in names), (), 1.0)


def plate_dims(site: Site) -> dict[str, int]:
    return {frame.name: frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}


def _extents(site: Site) -> dict[str, int]:
    """How far a site stretches along each of its plates.

    Where a plate is declared without a size, a site may be one draw for all of its elements.
    """
    shape = site["log_prob"].shape
    return {
        frame.name: shape[frame.dim] if frame.vectorized and -frame.dim <= len(shape) else 1
        for frame in site["cond_indep_stack"]
    }


def _subsample_scale(frame: CondIndepStackFrame) -> float:
    return 1.0 if frame.full_size is None else frame.full_size / frame.size
