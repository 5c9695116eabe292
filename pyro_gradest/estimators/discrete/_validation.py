"""Checks of what arrives at a discrete estimator, once, at the public function.

Shapes, dtypes and Python numbers are always checked; values only where that is possible without
waiting for a device, which is not so while a function is being traced or mapped.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def as_theta(theta: Any, event_dim: int, *, caller: str) -> Float[Tensor, " *batch_event"]:
    """Return ``theta``, having checked that it is finite and has the solver's axes."""
    if not isinstance(theta, Tensor) or not theta.is_floating_point():
        got = theta.dtype if isinstance(theta, Tensor) else type(theta).__name__
        raise TypeError(f"{caller} needs theta as a floating torch.Tensor, got {got}.")
    if theta.ndim < event_dim:
        raise ValueError(
            f"{caller} needs theta of shape [*batch, *event] with {event_dim} event axes, which "
            f"the solver reads, got {tuple(theta.shape)}."
        )
    if not is_finite(theta):
        raise ValueError(
            f"{caller} needs finite theta, got nan or inf. Exclude a choice by a large negative "
            "number such as -1e4, not by -inf; nan most often comes from too large a learning rate."
        )
    return theta


def check_positive(number: Any, name: str, *, caller: str, or_zero: bool = False) -> None:
    """Refuse what is not a finite Python number above zero, or above or at it."""
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
    if not is_number or not math.isfinite(number) or number < 0 or (number == 0 and not or_zero):
        bound = ">= 0" if or_zero else "> 0"
        raise ValueError(f"{caller} needs {name} as a finite number {bound}, got {number!r}.")


def is_finite(array: Tensor) -> bool:
    """Whether all entries are finite, or may be for all that is known; see :func:`is_false`."""
    array = array.detach()
    # A sum takes a thirtieth of the time; where it overflows, the entries themselves are looked at.
    return not (is_false(array.sum().isfinite()) and is_false(array.isfinite().all()))


def is_false(condition: Tensor) -> bool:
    """Whether a condition is known to be false: not while it is traced, compiled, mapped, or on a
    device that would have to be waited for."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or condition.device.type != "cpu":
        return False
    try:
        return not bool(condition)
    except RuntimeError:  # torch.func.vmap has no single truth value to give
        return False
