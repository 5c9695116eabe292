"""Implicit maximum likelihood estimation: gradients through a black-box solver.

Notation follows Niepert et al. (2021): z = MAP(theta + tau eps), lambda the step size, and
dy = dL/dz the gradient that arrives at the state.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_gradest.estimators.discrete._finite_difference import Rule, solve_with_difference
from pyro_gradest.estimators.discrete._validation import check_positive
from pyro_gradest.estimators.discrete.noise import Noise
from pyro_gradest.estimators.discrete.perturb_and_map import prepare
from pyro_gradest.estimators.discrete.solvers import Solver


@dataclass(frozen=True)
class IMLE:
    r"""Perturb-and-MAP draws whose gradient is a difference of solutions under the same noise.

    .. math::
        \nabla_\theta L \approx \frac{1}{2\lambda} \big[
            \mathrm{MAP}(\theta + \lambda\, dy + \tau\epsilon)
            - \mathrm{MAP}(\theta - \lambda\, dy + \tau\epsilon) \big]

    The solver is called and never differentiated, so that it may be anything.

    Args:
        step_size: :math:`\lambda`. Smaller is less biased and noisier: a share of about
            :math:`\lambda` of the draws has a gradient at all.
        symmetric: Whether the difference is central, as above; else it is forward,
            :math:`[z - \mathrm{MAP}(\theta - \lambda\, dy + \tau\epsilon)] / \lambda`, and keeps
            a bias at any step size.
        noise: Law of :math:`\epsilon`; ``None`` is the solver's own, Gumbel unless it says
            otherwise.
        temperature: :math:`\tau`.

    Raises:
        ValueError: If ``step_size`` is not positive or ``temperature`` is negative.

    Bias and variance:
        Biased by design. As the step size goes to zero the expectation goes to the exact gradient
        if the objective is linear or quadratic in the state, for any solver and noise that has a
        density; with a one-hot state and Gumbel noise it goes to that of :class:`ReinMax` for any
        objective. The variance grows as one over the step size.

    Cost:
        One call of the solver forward and two (forward difference: one) backward.

    Example:
        >>> import torch
        >>> from pyro_gradest.estimators import top_k
        >>> theta = torch.tensor([0.2, 0.0, 0.1], requires_grad=True)
        >>> z = IMLE(temperature=0.0).sample(theta, top_k(1))
        >>> z, torch.autograd.grad((torch.tensor([3.0, 2.0, 1.0]) * z).sum(), theta)[0]
        (tensor([1., 0., 0.], ...), tensor([ 0.5000,  0.0000, -0.5000]))

    References:
        Niepert, Minervini and Franceschi, `Implicit MLE: Backpropagating Through Discrete
        Exponential Family Distributions <https://arxiv.org/abs/2106.01798>`_, 2021, algorithm 1
        (forward, and not divided by the step size).
    """

    step_size: float = 1.0
    symmetric: bool = True
    noise: Noise | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self.step_size, "step_size", caller="IMLE")
        check_positive(self.temperature, "temperature", caller="IMLE", or_zero=True)

    def sample(
        self,
        theta: Float[Tensor, " *batch_event"],
        solver: Solver | Callable[[Tensor], Tensor],
        *,
        num_samples: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, " *samples_batch_event"]:
        """Draw states that carry the gradient.

        Args:
            theta: Finite scores, shape ``[*batch, *event]``.
            solver: Finds the maximum, such as ``top_k(3)``, or any function from theta to states.
            num_samples: S, the number of draws along a new leading axis; ``None`` is one without.
                Average the objective over them: the gradient then has the scale of one draw's,
                and ``step_size`` its meaning.
            generator: Source of the noise; ``None`` is torch's own.

        Returns:
            States, shape ``[*batch, *event]`` or ``[S, *batch, *event]``.

        Raises:
            ValueError: As :func:`perturb_and_map`.
        """
        prepared = prepare(
            theta, solver, self.noise, self.temperature, num_samples, generator, caller="IMLE"
        )
        # The gradient of a mean over S draws is a S-th of what arrives for one.
        rule = Rule(prepared.solver, self.symmetric, self.step_size * (num_samples or 1))
        return solve_with_difference(rule, prepared.theta, prepared.perturbed)
