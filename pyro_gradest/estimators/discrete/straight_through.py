"""Draws of discrete states that carry the gradient of something differentiable."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_gradest.estimators._validation import check_count
from pyro_gradest.estimators.discrete._validation import as_theta, check_positive
from pyro_gradest.estimators.discrete.noise import Noise
from pyro_gradest.estimators.discrete.perturb_and_map import prepare
from pyro_gradest.estimators.discrete.solvers import Solver, as_solver

AnySolver = Solver | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class StraightThrough:
    """Perturb-and-MAP draws with the gradient of their mean.

    The mean is that of p(z) proportional to exp <z, theta / temperature>, such as softmax for
    ``one_hot_argmax()``, where the solver knows it; else the gradient passes to theta unchanged.

    Args:
        noise: Law of the perturbation; ``None`` is the solver's own.
        temperature: Factor of the noise.

    Raises:
        ValueError: If ``temperature`` is not positive.

    Bias and variance:
        Biased by design; unbiased if the objective is linear in the state and the mean is that of
        the draws, as for ``one_hot_argmax()`` and ``threshold()``. Perturbed maxima of ``top_k``
        and ``spanning_tree`` have another mean.

    Cost:
        One call of the solver and, where it has them, of its marginals.

    Example:
        >>> import torch
        >>> from pyro_gradest.estimators import one_hot_argmax
        >>> theta = torch.zeros(2, requires_grad=True)
        >>> z = StraightThrough().sample(theta, one_hot_argmax())
        >>> torch.autograd.grad(z[0], theta)
        (tensor([ 0.2500, -0.2500]),)

    References:
        Bengio, Leonard and Courville, `Estimating or Propagating Gradients Through Stochastic
        Neurons <https://arxiv.org/abs/1308.3432>`_, 2013.
    """

    noise: Noise | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self.temperature, "temperature", caller="StraightThrough")

    def sample(
        self,
        theta: Float[Tensor, " *batch_event"],
        solver: AnySolver,
        *,
        num_samples: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, " *samples_batch_event"]:
        """Draw states that carry the gradient; arguments as of :meth:`IMLE.sample`."""
        theta, perturbed, solver = prepare(
            theta,
            solver,
            self.noise,
            self.temperature,
            num_samples,
            generator,
            caller="StraightThrough",
        )
        mean = solver.marginals(theta / self.temperature) if solver.marginals else theta
        return with_gradient_of(solver(perturbed), mean)


@dataclass(frozen=True)
class GumbelSoftmaxST:
    """Perturb-and-MAP draws with the gradient of a relaxation under the same noise.

    Args:
        relaxation: Temperature of the relaxation, softmax((theta + noise) / relaxation) for a
            one-hot state; lower is less biased and noisier.
        noise: Law of the perturbation; ``None`` is the solver's own.

    Raises:
        ValueError: If ``relaxation`` is not positive; when drawing, if the solver knows no
            marginals to relax with.

    Bias and variance:
        Biased by design.

    Cost:
        One call of the solver and of its marginals.

    Example:
        >>> import torch
        >>> from pyro_gradest.estimators import one_hot_argmax
        >>> theta = torch.zeros(2, requires_grad=True)
        >>> GumbelSoftmaxST().sample(theta, one_hot_argmax()).sum()
        tensor(1., ...)

    References:
        Jang, Gu and Poole, `Categorical Reparameterization with Gumbel-Softmax
        <https://arxiv.org/abs/1611.01144>`_, 2017, section 2.2.
    """

    relaxation: float = 1.0
    noise: Noise | None = None

    def __post_init__(self) -> None:
        check_positive(self.relaxation, "relaxation", caller="GumbelSoftmaxST")

    def sample(
        self,
        theta: Float[Tensor, " *batch_event"],
        solver: AnySolver,
        *,
        num_samples: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, " *samples_batch_event"]:
        """Draw states that carry the gradient; arguments as of :meth:`IMLE.sample`."""
        _, perturbed, solver = prepare(
            theta, solver, self.noise, 1.0, num_samples, generator, caller="GumbelSoftmaxST"
        )
        marginals = _known(solver.marginals, "GumbelSoftmaxST")
        return with_gradient_of(solver(perturbed), marginals(perturbed / self.relaxation))


@dataclass(frozen=True)
class ReinMax:
    r"""Exact draws from :math:`p(z) \propto e^{\langle z, \theta \rangle}` with a second-order
    gradient.

    .. math:: \nabla_\theta L \approx \tfrac12 \big[ J + (z - \mu)(z - \mu)^\top \big] dy

    with mean :math:`\mu` and covariance J of the states: of a category, of a bit, and, which is
    ours, of any family whose mean is known, as those of subsets and trees are.

    Raises:
        ValueError: When drawing, if the solver knows neither the mean nor how to draw:
            ``top_k``, ``one_hot_argmax``, ``threshold`` and ``spanning_tree`` do.

    Bias and variance:
        Biased by design; unbiased if the objective is linear or quadratic in the state.

    Cost:
        As :class:`SIMPLE`.

    Example:
        >>> import torch
        >>> from pyro_gradest.estimators import one_hot_argmax
        >>> theta = torch.zeros(2, requires_grad=True)
        >>> z = ReinMax().sample(theta, one_hot_argmax())
        >>> torch.autograd.grad(z[0], theta)
        (tensor([ 0.2500, -0.2500]),)

    References:
        Liu, Dong, Liu, Yu and Gao, `Bridging Discrete and Backpropagation: Straight-Through and
        Beyond <https://arxiv.org/abs/2304.08612>`_, 2023, algorithm 2, which for a category is
        the above, written differently: :math:`2 J(\tfrac{z + \mu}{2}) - \tfrac12 J(\mu)`.
    """

    def sample(
        self,
        theta: Float[Tensor, " *batch_event"],
        solver: AnySolver,
        *,
        num_samples: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, " *samples_batch_event"]:
        """Draw states that carry the gradient; arguments as of :meth:`IMLE.sample`."""
        theta, states, mean, event_dim = _exact(
            theta, solver, num_samples, generator, caller="ReinMax"
        )
        deviation = states - mean.detach()
        along = deviation * theta
        if event_dim:
            along = along.sum(dim=tuple(range(-event_dim, 0)), keepdim=True)
        return with_gradient_of(states, (mean + deviation * along) / 2)


@dataclass(frozen=True)
class SIMPLE:
    r"""Exact draws from :math:`p(z) \propto e^{\langle z, \theta \rangle}` with the gradient of
    their mean.

    Raises:
        ValueError: When drawing, if the solver knows neither the mean nor how to draw:
            ``top_k``, ``one_hot_argmax``, ``threshold`` and ``spanning_tree`` do.

    Bias and variance:
        Biased by design; unbiased if the objective is linear in the state.

    Cost:
        O(n k) time and memory per datum for k of n items, in O(log n) steps; O(n^3) for trees of
        n nodes, in O(n).

    Example:
        >>> import torch
        >>> from pyro_gradest.estimators import top_k
        >>> theta = torch.zeros(3, requires_grad=True)
        >>> z = SIMPLE().sample(theta, top_k(2))
        >>> torch.autograd.grad(z[0], theta)  # the covariance of the first item with each
        (tensor([ 0.2222, -0.1111, -0.1111]),)

    References:
        Ahmed, Zeng, Niepert and Van den Broeck, `SIMPLE: A Gradient Estimator for k-Subset
        Sampling <https://arxiv.org/abs/2210.01941>`_, 2023, section 3.
    """

    def sample(
        self,
        theta: Float[Tensor, " *batch_event"],
        solver: AnySolver,
        *,
        num_samples: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, " *samples_batch_event"]:
        """Draw states that carry the gradient; arguments as of :meth:`IMLE.sample`."""
        _, states, mean, _ = _exact(theta, solver, num_samples, generator, caller="SIMPLE")
        return with_gradient_of(states, mean)


def _exact(
    theta: Tensor,
    solver: AnySolver,
    num_samples: int | None,
    generator: torch.Generator | None,
    *,
    caller: str,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Theta of each draw, exact draws, their mean, and the dimensions of a state."""
    solver = as_solver(solver, caller=caller)
    theta = as_theta(theta, solver.event_dim, caller=caller)
    if num_samples is not None:
        check_count(num_samples, "num_samples", caller=caller)
        theta = theta.expand(num_samples, *theta.shape)
    draw, marginals = (_known(item, caller) for item in (solver.draw, solver.marginals))
    return theta, draw(theta.detach(), generator), marginals(theta), solver.event_dim


def with_gradient_of(value: Tensor, other: Tensor) -> Tensor:
    """Exactly ``value``, with the derivative of ``other``."""
    # Not value + other - other.detach(), which rounds: a state must stay a state.
    return _GradientOf.apply(value, other)


class _GradientOf(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, other: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


def _known(item: Any, caller: str) -> Any:
    if item is None:
        raise ValueError(
            f"{caller} needs to know the mean of the states, which this solver does not: it is "
            "for top_k, one_hot_argmax, threshold and spanning_tree, or a Solver(..., marginals=, "
            "draw=). IMLE takes any solver."
        )
    return item
