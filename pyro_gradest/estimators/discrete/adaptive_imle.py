"""Adaptive IMLE: the step follows how much of a state it changes.

Notation follows Minervini, Franceschi and Niepert (2023): beta the relative step, c the target.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_gradest.estimators.discrete._finite_difference import (
    Rule,
    length_of,
    solve_with_difference,
)
from pyro_gradest.estimators.discrete._validation import check_positive
from pyro_gradest.estimators.discrete.noise import Noise
from pyro_gradest.estimators.discrete.perturb_and_map import prepare
from pyro_gradest.estimators.discrete.solvers import Solver, threshold

# Beyond it a step replaces theta altogether.
_LARGEST_STEP = 1e3
# From zero no product leads back.
_LEAST_STEP = 1e-6


class AdaptiveState(NamedTuple):
    """What adaptive IMLE carries from step to step, all scalars; save it with the parameters."""

    relative_step: Float[Tensor, ""]
    """beta, the length of the step in units of the length of theta."""
    density: Float[Tensor, ""]
    """Moving average of what is aimed at: the share, or number, of entries that change."""
    previous_update: Float[Tensor, ""]
    """What was last added to beta, or to its logarithm."""


@dataclass(frozen=True)
class AdaptiveIMLE:
    r"""IMLE whose step adapts until its difference changes a given share of each state.

    The difference of :class:`IMLE` is taken over a step of

    .. math:: \lambda = \beta\, \max(\lVert \theta \rVert, \tau) / \lVert dy \rVert

    with norms over the state of each datum, so that the gradient of one does not depend on the
    others. After each backward pass :meth:`update` moves :math:`\beta` up where states changed less
    than the target, and gradients were sparse, and down where they changed more.

    Args:
        initial_step: :math:`\beta` at first.
        target: c, the share of a state that changes between the two ends of the difference: of
            the items of a subset that are exchanged, of the bits that flip, of the edges of a tree.
            Lower is less bias and more noise. Where the objective's gradient is zero at most
            entries, as along a path that is nearly right, the share is of as many entries as have
            one: no step changes many more.
        relative: Whether ``target`` is such a share, which suits states of any size; else it is
            the number of non-zero entries per datum, as in the paper. An exchange makes two, and a
            bit that flips counts as two, as in a one-hot state of two classes.
        rate: How far :math:`\beta`, or its logarithm, moves in a step.
        decay: Of the moving average of what changes.
        momentum: Share of the previous move that is added to the next.
        multiplicative: Whether the logarithm of :math:`\beta` moves, which reaches any order of
            magnitude soon; else :math:`\beta` itself does, as in the paper.
        symmetric: Whether the difference is central.
        noise: Law of the perturbation; ``None`` is the solver's own.
        temperature: :math:`\tau`.

    Raises:
        ValueError: If an option is out of its range, as a share of 1 or more is.

    Bias and variance:
        Biased by design, as :class:`IMLE` with the step that results. Data whose gradient is zero
        are not counted.

    Cost:
        That of :class:`IMLE`, and the norms.

    Example:
        >>> import torch
        >>> from pyro_gradest.estimators import top_k
        >>> estimator, theta = AdaptiveIMLE(), torch.zeros(4, 3, requires_grad=True)
        >>> state, counts = estimator.init(theta), torch.zeros(2, requires_grad=True)
        >>> z = estimator.sample(theta, top_k(1), state=state, counts=counts)
        >>> (z**2 @ torch.arange(3.0)).sum().backward()  # leaves [change, data] in counts.grad
        >>> state = estimator.update(state, counts.grad)

    References:
        Minervini, Franceschi and Niepert, `Adaptive Perturbation-Based Gradient Estimation for
        Discrete Latent Variable Models <https://arxiv.org/abs/2209.04862>`_, 2023, equations 9
        and 10 (``relative=False, target=1.0, multiplicative=False``; without the lower bound on
        the length of theta, so that scores of zero have no gradient).
    """

    initial_step: float = 0.1
    target: float = 0.5
    relative: bool = True
    rate: float = 0.05
    decay: float = 0.9
    momentum: float = 0.0
    multiplicative: bool = True
    symmetric: bool = True
    noise: Noise | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("target", "rate"):
            check_positive(getattr(self, name), name, caller="AdaptiveIMLE")
        if self.relative and self.target >= 1:
            raise ValueError(
                f"AdaptiveIMLE needs 0 < target < 1, the share of a state that changes, got "
                f"{self.target!r}. For a number of non-zero entries pass relative=False."
            )
        check_positive(
            self.initial_step,
            "initial_step",
            caller="AdaptiveIMLE",
            or_zero=not self.multiplicative,
        )
        check_positive(self.temperature, "temperature", caller="AdaptiveIMLE", or_zero=True)
        for name in ("decay", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"AdaptiveIMLE needs 0 <= {name} < 1, got {getattr(self, name)!r}."
                )

    def init(self, theta: Float[Tensor, " *batch_event"]) -> AdaptiveState:
        """The state at first, of the dtype of ``theta``."""
        first = (self.initial_step, self.target, 0.0)
        return AdaptiveState(
            *(torch.tensor(number, dtype=theta.dtype, device=theta.device) for number in first)
        )

    def sample(
        self,
        theta: Float[Tensor, " *batch_event"],
        solver: Solver | Callable[[Tensor], Tensor],
        *,
        state: AdaptiveState,
        counts: Float[Tensor, "2"] | None = None,
        num_samples: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, " *samples_batch_event"]:
        """Draw states that carry the gradient.

        Args:
            theta: Finite scores, shape ``[*batch, *event]``.
            solver: Finds the maximum, such as ``top_k(3)``, or any function from theta to states.
            state: What :meth:`init` or :meth:`update` returned.
            counts: Two zeros whose gradient becomes the sum over data of the share, or number, of
                entries that change, and the number of data, over all draws that were given them:
                what :meth:`update` takes.
            num_samples: S, the number of draws along a new leading axis; ``None`` is one without.
            generator: Source of the noise; ``None`` is torch's own.

        Returns:
            States, shape ``[*batch, *event]`` or ``[S, *batch, *event]``.

        Raises:
            ValueError: As :func:`perturb_and_map`.
        """
        prepared = prepare(
            theta,
            solver,
            self.noise,
            self.temperature,
            num_samples,
            generator,
            caller="AdaptiveIMLE",
        )
        rule = Rule(
            prepared.solver,
            self.symmetric,
            is_of_bits=prepared.solver.solve == threshold().solve,
            is_relative=self.relative,
        )
        lengths = length_of(theta.detach(), prepared.solver.event_dim)
        length = state.relative_step * lengths.clamp_min(self.temperature)
        return solve_with_difference(rule, prepared.theta, prepared.perturbed, length, counts)

    def update(self, state: AdaptiveState, counts: Float[Tensor, "2"]) -> AdaptiveState:
        """The state after a backward pass.

        Args:
            state: The state before.
            counts: Gradient of the ``counts`` that :meth:`sample` was given.

        Returns:
            The new state; the same one where no datum was counted.
        """
        with torch.no_grad():
            change, data = counts
            per_datum = change / data.clamp_min(1)
            density = self.decay * state.density + (1 - self.decay) * per_datum
            direction = torch.where(density < self.target, self.rate, -self.rate)
            update = self.momentum * state.previous_update + direction.to(density.dtype)
            step = state.relative_step
            if self.multiplicative:
                step = (step * update.exp()).clamp(_LEAST_STEP, _LARGEST_STEP)
            else:
                step = (step + update).clamp(0.0, _LARGEST_STEP)
            new = AdaptiveState(step, density, update)
            is_counted = data > 0
            return AdaptiveState(
                *(
                    torch.where(is_counted, after, before)
                    for after, before in zip(new, state, strict=True)
                )
            )
