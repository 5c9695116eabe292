"""What the distributions over combinatorial values have in common."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array
from numpyro import distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.util import validate_sample

from numpyro_gradest.estimators.discrete._validation import is_false


class FromLogits(dist.Distribution):
    """A discrete law with finite logits, of which an event has as many as its value has entries."""

    has_enumerate_support = True
    pytree_data_fields = ("logits",)

    def __init__(self, logits: Array, event_dim: int, validate_args: bool | None) -> None:
        caller = type(self).__name__
        logits = jnp.asarray(logits)
        if not jnp.issubdtype(logits.dtype, jnp.floating):
            raise TypeError(f"{caller} needs logits of a floating dtype, got {logits.dtype}.")
        event_shape = logits.shape[max(logits.ndim - event_dim, 0) :]
        if len(event_shape) < event_dim or 0 in event_shape or len(set(event_shape)) > 1:
            axes = ", ".join(["n"] * event_dim)
            raise ValueError(
                f"{caller} needs logits of shape [*batch, {axes}], got {logits.shape}."
            )
        is_checked = self._validate_args if validate_args is None else validate_args
        if is_checked and is_false(jnp.all(jnp.isfinite(logits))):
            raise ValueError(
                f"{caller} needs finite logits, got {logits}. Exclude a value by a large negative "
                "number such as -1e4, not by -inf; nan most often comes from too large a learning "
                "rate."
            )
        self.logits = logits
        batch_shape = logits.shape[: logits.ndim - event_dim]
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    def enumerate_support(self, expand: bool = True) -> Array:
        values = jnp.asarray(self._states())
        if jnp.issubdtype(values.dtype, jnp.floating):
            values = values.astype(self.logits.dtype)
        values = values.reshape(-1, *([1] * len(self.batch_shape)), *self.event_shape)
        shape = (values.shape[0], *self.batch_shape, *self.event_shape)
        return jnp.broadcast_to(values, shape) if expand else values

    def _states(self) -> np.ndarray:
        """All values, ``[values, *event]``."""
        raise NotImplementedError

    def _check_value(self, value: ArrayLike) -> None:
        got, needed = jnp.shape(value), self.event_shape
        if got[max(len(got) - len(needed), 0) :] != needed:
            axes = ", ".join(["*batch", *map(str, needed)])
            raise ValueError(
                f"{type(self).__name__} needs a value of shape [{axes}] for logits of shape "
                f"{self.logits.shape}, got {got}."
            )


class LinearFamily(FromLogits):
    """An exponential family whose statistic is the value itself: p(z) ~ exp(c <z, logits>)."""

    # c: one, or a half where each logit stands twice in the array.
    _scale = 1.0

    @validate_sample
    def log_prob(self, value: ArrayLike) -> Array:
        self._check_value(value)
        value = jnp.asarray(value).astype(self.logits.dtype)
        return self._inner(value, self.logits) - self._log_partition()

    @property
    def mean(self) -> Array:
        return self._marginals()

    @property
    def variance(self) -> Array:
        mean = self.mean
        return mean * (1 - mean)

    def entropy(self) -> Array:
        return self._log_partition() - self._inner(self.mean, self.logits)

    def kl_divergence(self, other: Any) -> Array:
        """KL(self || other), of another law of the same values."""
        if repr(self.support) != repr(other.support) or self.event_shape != other.event_shape:
            raise ValueError(
                f"KL(p || q) of two {type(self).__name__} needs laws of the same values, got "
                f"{self.support} of shape {tuple(self.event_shape)} and {other.support} of shape "
                f"{tuple(other.event_shape)}."
            )
        difference = self._inner(self.mean, self.logits - other.logits)
        return difference - self._log_partition() + other._log_partition()

    def _log_partition(self) -> Array:
        raise NotImplementedError

    def _marginals(self) -> Array:
        """Probability of each entry to be one."""
        raise NotImplementedError

    def _inner(self, value: Array, logits: Array) -> Array:
        axes = tuple(range(-len(self.event_shape), 0))
        return self._scale * jnp.sum(value * logits, axis=axes)


def real_array(event_dim: int) -> constraints.Constraint:
    """The constraint of logits."""
    return constraints.independent(constraints.real, event_dim)
