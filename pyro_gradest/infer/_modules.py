"""Programs that are modules, run by handlers."""

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine


def as_module(fn: Callable, handled: Callable) -> Any:
    """``handled``, which runs ``fn``, as a module with its parameters where ``fn`` is one."""
    return _Handled(fn, handled) if isinstance(fn, torch.nn.Module) else handled


def unwrapped(fn: Callable) -> Callable:
    """What handlers run, below all of them."""
    while isinstance(fn := poutine.unwrap(fn), _Handled):
        fn = fn.module
    return fn


class _Handled(torch.nn.Module):
    def __init__(self, module: torch.nn.Module, handled: Callable) -> None:
        super().__init__()
        self.module = module
        self._handled = handled

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._handled(*args, **kwargs)
