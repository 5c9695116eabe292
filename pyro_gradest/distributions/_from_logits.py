"""What the distributions over combinatorial values have in common."""

import copy
from typing import Any

import numpy as np
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions.utils import lazy_property

from pyro_gradest.estimators.discrete._validation import is_finite

_NO_SHAPE = torch.Size()


class FromLogits(TorchDistribution):
    """A discrete law with finite logits, of which an event has as many as its value has entries."""

    has_enumerate_support = True
    logits: Tensor

    def __init__(self, logits: Tensor, event_dim: int, validate_args: bool | None) -> None:
        caller = type(self).__name__
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
            raise TypeError(f"{caller} needs logits as a floating torch.Tensor, got {got}.")
        event_shape = logits.shape[max(logits.dim() - event_dim, 0) :]
        if len(event_shape) < event_dim or 0 in event_shape or len(set(event_shape)) > 1:
            axes = ", ".join(["n"] * event_dim)
            raise ValueError(
                f"{caller} needs logits of shape [*batch, {axes}], got {tuple(logits.shape)}."
            )
        is_checked = self._validate_args if validate_args is None else validate_args
        if is_checked and not is_finite(logits):
            raise ValueError(
                f"{caller} needs finite logits, got {logits.detach()}. Exclude a value by a large "
                "negative number such as -1e4, not by -inf; nan most often comes from too large a "
                "learning rate."
            )
        self.logits = logits
        super().__init__(logits.shape[: logits.dim() - event_dim], event_shape, validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        expanded = copy.copy(self)
        expanded._batch_shape = torch.Size(batch_shape)
        expanded.logits = self.logits.expand(expanded._batch_shape + self.event_shape)
        return expanded

    def enumerate_support(self, expand: bool = True) -> Tensor:
        values = torch.as_tensor(self._states(), device=self.logits.device)
        if values.is_floating_point():
            values = values.to(self.logits.dtype)
        values = values.reshape(-1, *([1] * len(self.batch_shape)), *self.event_shape)
        return values.expand(-1, *self.batch_shape, *self.event_shape) if expand else values

    def _states(self) -> np.ndarray:
        """All values, ``[values, *event]``."""
        raise NotImplementedError

    def _check_value(self, value: Tensor) -> None:
        got, needed = tuple(value.shape), tuple(self.event_shape)
        if got[max(len(got) - len(needed), 0) :] != needed:
            axes = ", ".join(["*batch", *map(str, needed)])
            raise ValueError(
                f"{type(self).__name__} needs a value of shape [{axes}] for logits of shape "
                f"{tuple(self.logits.shape)}, got {got}."
            )
        if self._validate_args:
            self._validate_sample(value)


class LinearFamily(FromLogits):
    """An exponential family whose statistic is the value itself: p(z) ~ exp(c <z, logits>)."""

    # c: one, or a half where each logit stands twice in the array.
    _scale = 1.0

    def log_prob(self, value: Tensor) -> Tensor:
        self._check_value(value)
        return self._inner(value.to(self.logits.dtype), self.logits) - self._log_partition

    @property
    def mean(self) -> Tensor:
        return self._marginals()

    @property
    def variance(self) -> Tensor:
        mean = self.mean
        return mean * (1 - mean)

    def entropy(self) -> Tensor:
        return self._log_partition - self._inner(self.mean, self.logits)

    def kl_divergence(self, other: Any) -> Tensor:
        """KL(self || other), of another law of the same values."""
        if repr(self.support) != repr(other.support) or self.event_shape != other.event_shape:
            raise ValueError(
                f"KL(p || q) of two {type(self).__name__} needs laws of the same values, got "
                f"{self.support} of shape {tuple(self.event_shape)} and {other.support} of shape "
                f"{tuple(other.event_shape)}."
            )
        difference = self._inner(self.mean, self.logits - other.logits)
        return difference - self._log_partition + other._log_partition

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        # Computed before it is expanded, not once for each copy.
        log_partition = self._log_partition
        expanded = super().expand(batch_shape)
        expanded._log_partition = log_partition.expand(expanded.batch_shape)
        return expanded

    @lazy_property
    def _log_partition(self) -> Tensor:
        return self._compute_log_partition()

    def _compute_log_partition(self) -> Tensor:
        raise NotImplementedError

    def _marginals(self) -> Tensor:
        """Probability of each entry to be one."""
        raise NotImplementedError

    def _inner(self, value: Tensor, logits: Tensor) -> Tensor:
        dims = tuple(range(-len(self.event_shape), 0))
        return self._scale * (value * logits).sum(dim=dims)


def real_array(event_dim: int) -> Any:
    """The constraint of logits."""
    return constraints.independent(constraints.real, event_dim)
