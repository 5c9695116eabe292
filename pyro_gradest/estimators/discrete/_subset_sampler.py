"""The exact sampler of subsets in the form of a solver, for estimators that solve under noise.

A draw z(theta, u) is made of uniform numbers u. Its maximum is none of <z, theta + noise>, so that
u can't be added to theta; it comes after it, in entries of their own where theta, the state and
hence every gradient are zero.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_gradest.estimators.discrete import subsets
from pyro_gradest.estimators.discrete.noise import Noise
from pyro_gradest.estimators.discrete.solvers import Solver


@dataclass(frozen=True)
class SplitNoise(Noise):
    """Uniform numbers in the entries behind the items, nothing in those of the items."""

    num_items: int

    def sample_like(
        self, theta: Float[Tensor, " *shape"], *, generator: torch.Generator | None = None
    ) -> Float[Tensor, " *shape"]:
        shape = (*theta.shape[:-1], theta.shape[-1] - self.num_items)
        uniform = torch.rand(shape, generator=generator, dtype=theta.dtype, device=theta.device)
        return torch.nn.functional.pad(uniform, (self.num_items, 0))


def subset_sampler(num_items: int, num_ones: int) -> Solver:
    """Solver of :func:`with_splits` of theta, whose states are draws with :func:`with_splits`."""
    options = num_items, num_ones
    return Solver(
        partial(_solve, *options),
        noise=SplitNoise(num_items),
        marginals=partial(_marginals, *options),
        draw=partial(_draw, *options),
        is_trusted=True,
    )


def with_splits(values: Float[Tensor, " *batch n"], num_items: int) -> Float[Tensor, " *batch m"]:
    """``values`` and a zero for each uniform number of a draw."""
    return torch.nn.functional.pad(values, (0, subsets.num_splits(num_items)))


def of_items(sample: Callable[[Tensor], Tensor], num_items: int) -> Callable:
    """The function from theta of the items to their states that ``sample`` makes."""
    return lambda theta: sample(with_splits(theta, num_items))[..., :num_items]


def _solve(num_items: int, num_ones: int, theta: Tensor) -> Tensor:
    states = subsets.place(theta[..., :num_items], theta[..., num_items:], num_ones)
    return with_splits(states, num_items)


def _marginals(num_items: int, num_ones: int, theta: Tensor) -> Tensor:
    return with_splits(subsets.marginals(theta[..., :num_items], num_ones), num_items)


def _draw(
    num_items: int, num_ones: int, theta: Tensor, generator: torch.Generator | None
) -> Tensor:
    return with_splits(subsets.draw(theta[..., :num_items], num_ones, generator), num_items)
