"""Perturb-and-MAP: draws of discrete states by maximising under noise.

Notation follows Niepert et al. (2021): z = MAP(theta + tau eps), with tau the temperature.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_gradest.estimators._validation import check_count
from pyro_gradest.estimators.discrete._validation import as_theta, check_positive
from pyro_gradest.estimators.discrete.noise import Noise
from pyro_gradest.estimators.discrete.solvers import Solver, as_solver


def perturb_and_map(
    theta: Float[Tensor, " *batch_event"],
    solver: Solver | Callable[[Tensor], Tensor],
    *,
    noise: Noise | None = None,
    temperature: float = 1.0,
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " *samples_batch_event"]:
    r"""Draw discrete states by maximising a linear objective under noise.

    .. math:: z = \arg\max_z \langle z, \theta + \tau \epsilon \rangle

    Args:
        theta: Finite scores, shape ``[*batch, *event]``.
        solver: Finds the maximum, such as ``top_k(3)``, or any function from theta to states.
        noise: Law of :math:`\epsilon`; ``None`` is the solver's own, Gumbel unless it says
            otherwise.
        temperature: :math:`\tau`; 0 draws the maximiser itself.
        num_samples: S, the number of draws along a new leading axis; ``None`` is one without.
        generator: Source of the noise; ``None`` is torch's own.

    Returns:
        Detached states, shape ``[*batch, *event]`` or ``[S, *batch, *event]``.

    Raises:
        TypeError: If theta is not floating, or the solver is neither a solver nor a function.
        ValueError: If theta is not finite or has too few axes, an option is out of its range, or
            the solver returns no valid states.

    Bias and variance:
        Unbiased for the law of the perturbed maximiser. With Gumbel noise at temperature 1 that
        is softmax(theta) for ``one_hot_argmax()``, and k draws without replacement for
        ``top_k(k)``, but not :math:`p(z) \propto e^{\langle z, \theta \rangle}` in general.

    Cost:
        One call of the solver for S states per datum, and the noise.

    Example:
        >>> import torch
        >>> from pyro_gradest.estimators import perturb_and_map, top_k
        >>> perturb_and_map(torch.tensor([1e3, 0.0, 2e3]), top_k(2))
        tensor([1., 0., 1.])

    References:
        Papandreou and Yuille, Perturb-and-MAP random fields, 2011, equation 3.
    """
    prepared = prepare(
        theta, solver, noise, temperature, num_samples, generator, caller="perturb_and_map"
    )
    return prepared.solver(prepared.perturbed)


class Prepared(NamedTuple):
    """What a draw is made from, checked."""

    theta: Tensor
    """Attached, with the axis of the samples."""
    perturbed: Tensor
    """The same, with noise times temperature added."""
    solver: Solver


def prepare(
    theta: Tensor,
    solver: Solver | Callable[[Tensor], Tensor],
    noise: Noise | None,
    temperature: float,
    num_samples: int | None,
    generator: torch.Generator | None,
    *,
    caller: str,
) -> Prepared:
    """Check the arguments of a draw, and draw its noise."""
    solver = as_solver(solver, caller=caller)
    theta = as_theta(theta, solver.event_dim, caller=caller)
    check_positive(temperature, "temperature", caller=caller, or_zero=True)
    if num_samples is not None:
        check_count(num_samples, "num_samples", caller=caller)
        theta = theta.expand(num_samples, *theta.shape)
    law = solver.noise if noise is None else noise
    sampled = law.sample_like(theta.detach(), generator=generator)
    return Prepared(theta, torch.add(theta, sampled, alpha=temperature), solver)
