"""Checks of what arrives at a distribution, on static facts."""

from collections.abc import Sequence
from typing import Any


def check_subset_size(k: Any, shape: Sequence[int], *, caller: str) -> None:
    """Refuse a number of ones that a subset of the last axis cannot have."""
    if not isinstance(k, int) or isinstance(k, bool) or not 0 <= k <= shape[-1]:
        raise ValueError(
            f"{caller} needs k as an integer from 0 to n = {shape[-1]}, the last axis of logits "
            f"of shape {tuple(shape)}, got k={k!r}."
        )
