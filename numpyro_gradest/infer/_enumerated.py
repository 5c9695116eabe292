"""The expected bound of programs with few discrete states, by a sum over all of them."""

from itertools import product
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpyro import distributions as dist

from numpyro_gradest.estimators import renyi_bound
from numpyro_gradest.infer._particles import Particles, read_particle
from numpyro_gradest.infer._plates import CommonPlates, common_plates, plate_dims
from numpyro_gradest.infer._site_estimators import SiteEstimators
from numpyro_gradest.infer._sites import Site, Trace, is_deterministic, samples
from numpyro_gradest.infer._trace import Program, trace_guide, trace_model, trace_particle

LARGEST_SUM = 10**5
"""Terms: tuples of states times elements of the common plates."""


class NotEnumerableError(ValueError):
    """The states can't be summed over, for the reason given."""


def expected_bound(
    program: Program, key: Array, num_particles: int, *, alpha: float
) -> Float[Array, ""]:
    """Expectation of the K-sample bound, whose derivatives are exact.

    The elements of the common plates are independent of each other, so that all of them go
    through the states of one together.
    """
    program = program._replace(estimators=SiteEstimators("score"), is_weighted=True)
    model_trace, guide_trace = trace_particle(program, key)
    try:
        plates = common_plates(model_trace, guide_trace, is_weighted=True)
    except ValueError as error:
        raise NotEnumerableError(str(error)) from error
    if plates.subsample_scale != 1:
        raise NotEnumerableError("A plate is subsampled.")
    states = _states(guide_trace, plates, num_particles)

    def run(state: dict[str, Array]) -> Particles:
        guide_trace = trace_guide(program, key, state)
        return read_particle(program, trace_model(program, key, guide_trace), guide_trace)

    runs = jax.vmap(run)(states)
    log_q = runs.log_q_score
    log_weights = runs.log_p - runs.log_q_path - runs.log_q_score

    tuples = np.indices((len(log_q),) * num_particles).reshape(num_particles, -1)
    bound = renyi_bound(log_weights[tuples], alpha=alpha)
    # Tuples without any weight are no part of the objective.
    bound = jnp.where(jnp.isneginf(bound), 0.0, bound)
    expected = jnp.sum(jnp.exp(log_q[tuples].sum(axis=0)) * bound, axis=0)
    return jnp.sum(runs.bound_scale[0] * expected)


def _states(guide_trace: Trace, plates: CommonPlates, num_particles: int) -> dict[str, Array]:
    """Every combination of the values of the guide's draws, ``[states, ...]`` for each site."""
    values = {
        name: _values(name, site, plates)
        for name, site in samples(guide_trace)
        if not (site["is_observed"] or is_deterministic(site))
    }
    number = prod(map(len, values.values())) ** num_particles * prod(plates.sizes)
    if number > LARGEST_SUM:
        raise NotEnumerableError(
            f"There are {number} terms to sum over, more than {LARGEST_SUM}: every tuple of "
            f"{num_particles} states, times the elements of the common plates. Take fewer "
            "particles, data or states."
        )
    states = list(product(*(range(len(value)) for value in values.values())))
    choices = np.array(states, dtype=int).reshape(len(states), len(values))
    return {name: value[choices[:, column]] for column, (name, value) in enumerate(values.items())}


def _values(name: str, site: Site, plates: CommonPlates) -> Array:
    """What a site can be: the same in all elements of the common plates, all else combined."""
    fn, num_event_dims = site["fn"], 0
    while isinstance(fn, dist.Independent | dist.MaskedDistribution):
        num_event_dims += getattr(fn, "reinterpreted_batch_ndims", 0)
        fn = fn.base_dist
    if not fn.has_enumerate_support:
        raise NotEnumerableError(f"Site {name!r} ({type(fn).__name__}) can't be enumerated.")
    shape, event_shape = fn.batch_shape, fn.event_shape
    # The host's own enumeration of what is expanded has no place for an event of several entries.
    base = fn.base_dist if isinstance(fn, dist.ExpandedDistribution) else fn
    support = base.enumerate_support(expand=False).reshape(-1, *event_shape)
    dims = plate_dims(site)
    common = {len(shape) + dims[plate] - num_event_dims for plate in plates.names}
    free = [1 if axis in common else size for axis, size in enumerate(shape)]
    if len(support) ** prod(free) > LARGEST_SUM:
        raise NotEnumerableError(
            f"Site {name!r} has {len(support)}^{prod(free)} values to sum over, more than "
            f"{LARGEST_SUM}. Take a smaller one."
        )
    choices = np.array(list(product(range(len(support)), repeat=prod(free))))
    number = len(choices)
    return jnp.broadcast_to(support[choices.reshape(number, *free)], (number, *shape, *event_shape))
