"""States that maximise a perturbed linear objective, as a distribution."""

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions.kl import register_kl

from pyro_gradest.estimators import GaussianNoise, GumbelNoise, Noise, Solver, perturb_and_map
from pyro_gradest.estimators.discrete.solvers import as_solver, is_same_solver

_NO_SHAPE = torch.Size()


class PerturbAndMAP(TorchDistribution):
    r"""The law of a solver's state under noise, for any solver; its density is unknown.

    .. math:: z = \arg\max_z \langle z, \theta + \tau \epsilon \rangle

    Use it in model and guide with the same solver, noise and temperature, the guide under ``imle``
    and ``loss=TraceMeanField_ELBO()``. The KL divergence is then replaced by that of the perturbed
    scores, of which the states are functions: an upper bound, so that the loss stays a bound on
    the evidence, though a looser one,

    .. math::
        \mathrm{KL}(q(z) \,\|\, p(z)) \le \sum_i \delta_i + e^{-\delta_i} - 1
        \quad \text{(Gumbel)}, \qquad \sum_i \delta_i^2 / 2 \quad \text{(Gaussian)},
        \qquad \delta = (\theta_q - \theta_p) / \tau.

    Args:
        theta: Scores, shape ``[*batch, *event]``.
        solver: Finds the maximum, such as ``top_k(3)``, or any function from theta to states.
        noise: Law of :math:`\epsilon`; ``None`` is the solver's own, Gumbel unless it says
            otherwise.
        temperature: :math:`\tau`.
        validate_args: As in the host.

    Raises:
        ValueError: If ``temperature`` is not positive, or theta has too few axes.

    Example:
        >>> import torch
        >>> from torch.distributions import kl_divergence
        >>> from pyro_gradest.estimators import top_k
        >>> q, p = (PerturbAndMAP(theta, top_k(2)) for theta in (torch.ones(5), torch.zeros(5)))
        >>> q.sample().sum(), kl_divergence(q, p)  # 5 / e
        (tensor(2.), tensor(1.8394))

    References:
        Papandreou and Yuille, Perturb-and-MAP random fields, 2011.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(
        self,
        theta: Tensor,
        solver: Solver | Callable[[Tensor], Tensor],
        noise: Noise | None = None,
        *,
        temperature: float = 1.0,
        validate_args: bool | None = None,
    ) -> None:
        self.solver = as_solver(solver, caller="PerturbAndMAP")
        if not temperature > 0:
            raise ValueError(f"PerturbAndMAP needs temperature > 0, got {temperature!r}.")
        if theta.dim() < self.solver.event_dim:
            raise ValueError(
                f"PerturbAndMAP needs theta of shape [*batch, *event] with "
                f"{self.solver.event_dim} event axes, got {tuple(theta.shape)}."
            )
        self.theta = theta
        self.noise = self.solver.noise if noise is None else noise
        self.temperature = temperature
        batch_dim = theta.dim() - self.solver.event_dim
        super().__init__(theta.shape[:batch_dim], theta.shape[batch_dim:], validate_args=False)

    @constraints.dependent_property
    def support(self) -> Any:
        entry = constraints.boolean if self.solver.is_binary else constraints.real
        return constraints.independent(entry, self.event_dim)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "PerturbAndMAP":
        theta = self.theta.expand(torch.Size(batch_shape) + self.event_shape)
        return type(self)(theta, self.solver, self.noise, temperature=self.temperature)

    def sample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        theta = self.theta.detach().expand(torch.Size(sample_shape) + self.theta.shape)
        return perturb_and_map(theta, self.solver, noise=self.noise, temperature=self.temperature)

    def log_prob(self, value: Tensor) -> Tensor:
        # The host evaluates it for every objective, also for those that then use the KL
        # divergence alone. What uses it gets an infinite loss, and an error as it differentiates.
        shape = value.shape[: value.dim() - self.event_dim]
        return _NoDensity.apply(self.theta, torch.broadcast_shapes(shape, self.batch_shape))


class _NoDensity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta: Tensor, shape: torch.Size) -> Tensor:
        return theta.new_full(shape, -torch.inf)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise NotImplementedError(
            "A PerturbAndMAP site has no density that could be evaluated. Sample it from "
            "PerturbAndMAP in model and guide and use loss=TraceMeanField_ELBO(), which needs a "
            "bound on the KL divergence alone."
        )


@register_kl(PerturbAndMAP, PerturbAndMAP)
def _kl_bound(q: Any, p: Any) -> Tensor:
    """Upper bound, by the data-processing inequality."""
    check_comparable(q, p)
    difference = (q.theta - p.theta) / q.temperature
    if isinstance(q.noise, GumbelNoise):
        bounds = difference + torch.expm1(-difference)
    else:
        bounds = difference**2 / 2
    return bounds.sum(dim=tuple(range(-q.event_dim, 0))) if q.event_dim else bounds


def check_comparable(q: Any, p: Any) -> None:
    """Refuse laws whose states are not the same function of noise for which a bound is known."""
    if not is_same_solver(q.solver, p.solver):
        raise ValueError(
            "The KL divergence of two PerturbAndMAP distributions is bounded only if both have the "
            "same solver. Create it once, outside of model and guide."
        )
    laws = [(side.noise, side.temperature) for side in (q, p)]
    if laws[0] != laws[1] or not isinstance(q.noise, (GumbelNoise, GaussianNoise)):
        raise ValueError(
            "The KL divergence of two PerturbAndMAP distributions is bounded only if both have the "
            f"same temperature and either Gumbel or Gaussian noise, got {laws[0]} and {laws[1]}."
        )
