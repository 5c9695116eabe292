"""A guide site that can be sampled but has no density to evaluate."""

from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array
from numpyro import distributions as dist
from numpyro.distributions import constraints


class Implicit(dist.Distribution):
    r"""The law of a value that a guide computes from noise; its density is unknown.

    Draw the noise at an auxiliary site, push it through any function, and make the result the
    site's value::

        noise = numpyro.sample("noise", dist.Normal(0, 1).expand([8]).to_event(1),
                               infer={"is_auxiliary": True})
        numpyro.sample("z", Implicit(network(noise), event_dim=1))

    and train with ``loss=ImplicitELBO(...)``, which estimates the gradient of the entropy from
    the draws. Emit values in the support of the model's site, as from any guide; the objective
    itself goes to unconstrained space and back.

    Args:
        value: The value, shape ``[*batch, *event]``, floating, with its gradient attached.
        event_dim: Number of rightmost dims that make up one draw.
        validate_args: As in the host.

    Raises:
        TypeError: If ``value`` is not a floating array.
        ValueError: If ``event_dim`` is negative or exceeds the number of dims.

    Example:
        >>> import jax.numpy as jnp
        >>> site = Implicit(jnp.zeros((3, 2)), event_dim=1)
        >>> site.batch_shape, site.event_shape
        ((3,), (2,))

    References:
        Li and Turner, `Gradient Estimators for Implicit Models
        <https://arxiv.org/abs/1705.07107>`_, 2018, section 2.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012  # the value may have any support
    reparametrized_params = ["value"]  # noqa: RUF012
    pytree_data_fields = ("value",)

    def __init__(
        self, value: Array, event_dim: int = 0, *, validate_args: bool | None = None
    ) -> None:
        value = jnp.asarray(value)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(
                f"Implicit needs a floating array, whose gradient leads to the guide's "
                f"parameters, got {value.dtype}. A discrete site has a density: sample it from "
                "its own distribution."
            )
        if not 0 <= event_dim <= value.ndim:
            raise ValueError(
                f"Implicit needs 0 <= event_dim <= {value.ndim}, the number of dims of a value of "
                f"shape {value.shape}, got {event_dim}."
            )
        self.value = value
        batch_dim = value.ndim - event_dim
        super().__init__(value.shape[:batch_dim], value.shape[batch_dim:], validate_args=False)

    @property
    def has_rsample(self) -> bool:
        return True

    @constraints.dependent_property
    def support(self) -> Any:
        return constraints.independent(constraints.real, self.event_dim)

    def sample(self, key: Array | None, sample_shape: tuple[int, ...] = ()) -> Array:
        return jnp.broadcast_to(self.value, sample_shape + self.value.shape)

    def log_prob(self, value: ArrayLike) -> Array:
        raise NotImplementedError(
            "An Implicit site has no density that could be evaluated. Train its guide with "
            "loss=ImplicitELBO(num_particles=...), which needs none; other losses and "
            "importance weights do."
        )
