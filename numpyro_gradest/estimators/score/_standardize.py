"""What every kernel estimator does first: whiten, and give the kernel its bandwidth."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_gradest.estimators.score._pairs import pairwise_median, squared_distances
from numpyro_gradest.estimators.score.kernels import IMQ, RadialKernel
from numpyro_gradest.estimators.score.whitening import Whitening, centre, whitening_of


class Standardized(NamedTuple):
    """Samples in the coordinates in which a kernel is applied, and that kernel."""

    whitening: Whitening
    points: Float[Array, " *batch N D"]
    kernel: RadialKernel
    squared_distance: Float[Array, " *batch N N"]


def standardize(
    samples: Float[Array, " *batch N D"],
    kernel: RadialKernel | None,
    whiten: bool,
    *,
    caller: str,
) -> Standardized:
    """Whiten (or only centre) the samples; a kernel of ``None`` is IMQ at the median distance."""
    whitening = whitening_of(samples) if whiten else Whitening(centre(samples)[0], None)
    points = whitening.points(samples)
    squared_distance = squared_distances(points, points)
    kernel = IMQ() if kernel is None else kernel
    bandwidth = kernel.bandwidth
    if bandwidth is None:
        bandwidth = pairwise_median(squared_distance)
    elif not isinstance(bandwidth, jax.Array) and not 0 < bandwidth < math.inf:
        raise ValueError(
            f"{caller} needs a bandwidth that is positive and finite, got {kernel}. Leave it out "
            "to have the median distance."
        )
    batch = samples.shape[:-2]
    bandwidth = jax.lax.stop_gradient(jnp.asarray(bandwidth, dtype=samples.dtype))
    if bandwidth.shape not in ((), batch):
        raise ValueError(
            f"{caller} needs one bandwidth, or one for each batch element of shape {batch}, "
            f"got a bandwidth of shape {bandwidth.shape}."
        )
    kernel = kernel._replace(bandwidth=jnp.broadcast_to(bandwidth, batch))
    return Standardized(whitening, points, kernel, squared_distance)
