"""A guide site that can be sampled but has no density to evaluate."""

from typing import Any

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

_NO_SHAPE = torch.Size()


class Implicit(TorchDistribution):
    r"""The law of a value that a guide computes from noise; its density is unknown.

    Draw the noise at an auxiliary site, push it through any function, and make the result the
    site's value::

        noise = pyro.sample("noise", dist.Normal(0, 1).expand([8]).to_event(1),
                            infer={"is_auxiliary": True})
        pyro.sample("z", Implicit(network(noise), event_dim=1))

    and train with ``loss=ImplicitELBO(...)``, which estimates the gradient of the entropy from
    the draws. Emit values in the support of the model's site, as from any guide; the objective
    itself goes to unconstrained space and back.

    Args:
        value: The value, shape ``[*batch, *event]``, floating, with its gradient attached.
        event_dim: Number of rightmost dims that make up one draw.
        validate_args: As in the host.

    Raises:
        TypeError: If ``value`` is not a floating tensor.
        ValueError: If ``event_dim`` is negative or exceeds the number of dims.

    Example:
        >>> import torch
        >>> site = Implicit(torch.zeros(3, 2), event_dim=1)
        >>> site.batch_shape, site.event_shape
        (torch.Size([3]), torch.Size([2]))

    References:
        Li and Turner, `Gradient Estimators for Implicit Models
        <https://arxiv.org/abs/1705.07107>`_, 2018, section 2.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012  # the value may have any support
    has_rsample = True

    def __init__(
        self, value: Tensor, event_dim: int = 0, *, validate_args: bool | None = None
    ) -> None:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(
                f"Implicit needs a floating tensor, whose gradient leads to the guide's "
                f"parameters, got {kind}. A discrete site has a density: sample it from its own "
                "distribution."
            )
        if not 0 <= event_dim <= value.dim():
            raise ValueError(
                f"Implicit needs 0 <= event_dim <= {value.dim()}, the number of dims of a value "
                f"of shape {tuple(value.shape)}, got {event_dim}."
            )
        self.value = value
        batch_dim = value.dim() - event_dim
        super().__init__(value.shape[:batch_dim], value.shape[batch_dim:], validate_args=False)

    @constraints.dependent_property
    def support(self) -> Any:
        return constraints.independent(constraints.real, self.event_dim)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Implicit":
        batch_shape = torch.Size(batch_shape)
        return Implicit(self.value.expand(batch_shape + self.event_shape), self.event_dim)

    def rsample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        return self.value.expand(torch.Size(sample_shape) + self.value.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        raise NotImplementedError(
            "An Implicit site has no density that could be evaluated. Train its guide with "
            "loss=ImplicitELBO(num_particles=...), which needs none; other losses and "
            "importance weights do."
        )
