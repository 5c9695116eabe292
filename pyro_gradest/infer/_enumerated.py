"""The expected bound of programs with few discrete states, by a sum over all of them."""

from itertools import product
from math import prod
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pyro import distributions as dist
from pyro import poutine
from torch import Tensor

from pyro_gradest.estimators import renyi_bound
from pyro_gradest.infer._discrete_sites import CARRIED
from pyro_gradest.infer._particles import read_particles
from pyro_gradest.infer._plates import CommonPlates, common_plates, plate_dims
from pyro_gradest.infer._site_estimators import SiteEstimators
from pyro_gradest.infer._sites import Site, Trace, is_deterministic, samples
from pyro_gradest.infer._trace import Program, trace_particles

LARGEST_SUM = 10**5
"""Terms: tuples of states times elements of the common plates."""


class NotEnumerableError(ValueError):
    """The states can't be summed over, for the reason given."""


def expected_bound(program: Program, num_particles: int, *, alpha: float) -> Float[Tensor, ""]:
    """Expectation of the K-sample bound, whose derivatives are exact.

    The elements of the common plates are independent of each other, so that all of them go
    through the states of one together.
    """
    program = program._replace(
        estimators=SiteEstimators("score"), vectorize_particles=False, is_weighted=True
    )
    with torch.no_grad():
        model_trace, guide_trace = trace_particles(program, 1)
    try:
        plates = common_plates(model_trace, guide_trace, is_weighted=True)
    except ValueError as error:
        raise NotEnumerableError(str(error)) from error
    if plates.subsample_scale != 1 or plates.sequential:
        raise NotEnumerableError("A plate is subsampled or a loop.")
    states = _states(guide_trace, plates, num_particles)

    runs = []
    for state in states:
        guide = poutine.replay(program.guide, trace=_as_trace(state))
        traces = trace_particles(program._replace(guide=guide), 1)
        runs.append(read_particles(program, *traces, 1))
    log_q = torch.cat([run.log_q_score for run in runs])
    log_weights = torch.cat([run.log_p - run.log_q_path - run.log_q_score for run in runs])

    tuples = torch.as_tensor(np.indices((len(states),) * num_particles).reshape(num_particles, -1))
    bound = renyi_bound(log_weights[tuples], alpha=alpha)
    # Tuples without any weight are no part of the objective.
    bound = bound.masked_fill(bound.isneginf(), 0.0)
    expected = (log_q[tuples].sum(dim=0).exp() * bound).sum(dim=0)
    return (runs[0].bound_scale[0] * expected).sum()


def _states(guide_trace: Trace, plates: CommonPlates, num_particles: int) -> list[dict[str, Any]]:
    """Every combination of the values of the guide's draws."""
    values = {
        name: _values(name, site, plates)
        for name, site in samples(guide_trace)
        if not (site["is_observed"] or is_deterministic(site["fn"]))
    }
    number = prod(map(len, values.values())) ** num_particles * prod(plates.sizes)
    if number > LARGEST_SUM:
        raise NotEnumerableError(
            f"There are {number} terms to sum over, more than {LARGEST_SUM}: every tuple of "
            f"{num_particles} states, times the elements of the common plates. Take fewer "
            "particles, data or states."
        )
    return [dict(zip(values, state, strict=True)) for state in product(*values.values())]


def _values(name: str, site: Site, plates: CommonPlates) -> list[Tensor]:
    """What a site can be: the same in all elements of the common plates, all else combined."""
    fn, num_event_dims = site[CARRIED].fn if CARRIED in site else site["fn"], 0
    while isinstance(fn, dist.Independent | dist.MaskedDistribution):
        num_event_dims += getattr(fn, "reinterpreted_batch_ndims", 0)
        fn = fn.base_dist
    if not fn.has_enumerate_support:
        raise NotEnumerableError(f"Site {name!r} ({type(fn).__name__}) can't be enumerated.")
    shape, event_shape = fn.batch_shape, fn.event_shape
    support = fn.enumerate_support(expand=False).reshape(-1, *event_shape)
    dims = plate_dims(site)
    common = {len(shape) + dims[plate] - num_event_dims for plate in plates.names}
    free = [1 if axis in common else size for axis, size in enumerate(shape)]
    if len(support) ** prod(free) > LARGEST_SUM:
        raise NotEnumerableError(
            f"Site {name!r} has {len(support)}^{prod(free)} values to sum over, more than "
            f"{LARGEST_SUM}. Take a smaller one."
        )
    return [
        support[torch.tensor(choice).reshape(free)].expand((*shape, *event_shape))
        for choice in product(range(len(support)), repeat=prod(free))
    ]


def _as_trace(values: dict[str, Tensor]) -> Trace:
    trace = poutine.Trace()
    for name, value in values.items():
        trace.add_node(name, name=name, type="sample", value=value, is_observed=False, infer={})
    return trace
