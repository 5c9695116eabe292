"""The state of torch's random number generators, to run something twice with the same numbers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class OtherRandomNumbersError(RuntimeError):
    """A program that was run again drew other random numbers than the first time."""


def rng_state() -> list[Tensor]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


def set_rng_state(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if state[1:]:
        torch.cuda.set_rng_state_all(state[1:])


def is_rng_state(state: list[Tensor]) -> bool:
    """Whether the generators are where they were."""
    return all(map(torch.equal, rng_state(), state))


@contextmanager
def replayed(state: list[Tensor] | None = None) -> Iterator[None]:
    """Start from ``state`` (or as it is), and leave the random generators as they were."""
    outside = rng_state()
    if state is not None:
        set_rng_state(state)
    try:
        yield
    finally:
        set_rng_state(outside)
