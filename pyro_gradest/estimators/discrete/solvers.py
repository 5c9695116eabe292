"""Solvers: the state z that maximises <z, theta>, for a batch of theta, never differentiated."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_gradest.estimators._validation import check_count
from pyro_gradest.estimators.discrete import subsets
from pyro_gradest.estimators.discrete._validation import is_false
from pyro_gradest.estimators.discrete.noise import GumbelNoise, LogisticNoise, Noise

Solve = Callable[[Tensor], Tensor]

# Below, what a few more operations cost at all outweighs what they save.
_MANY_ENTRIES = 20_000


class Solver(NamedTuple):
    """A function from theta ``[*batch, *event]`` to the states z of the same shape, with what
    estimators may know of it.

    A plain function of such arrays can be passed wherever a solver is needed; it is then
    ``Solver(function)``. Its derivative is never asked for.
    """

    solve: Solve
    """The function itself."""
    event_dim: int = 1
    """Number of rightmost axes that make up one state."""
    noise: Noise = GumbelNoise()
    """What perturbs theta if an estimator names no other noise."""
    is_binary: bool = True
    """Whether all entries of a state are zero or one, which is then checked."""
    marginals: Solve | None = None
    """Mean of z under p(z) proportional to exp <z, theta>, differentiable in theta."""
    draw: Callable[..., Tensor] | None = None
    """Draws from that p exactly, given theta and a generator or None."""
    is_trusted: bool = False
    """Whether to leave out the checks of what the function returns."""

    def __call__(self, theta: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
        """The states, detached and checked; a nan in theta stays one."""
        return torch.add(states_of(self, theta), theta.detach(), alpha=0.0)


class SolverAt(Solver):
    """A solver whose errors say where it was called, also in a backward pass."""

    where = ""

    @classmethod
    def of(cls, solver: Solver, where: str) -> "SolverAt":
        new = cls(*solver)
        new.where = where
        return new


@contextmanager
def errors_say(where: str) -> Iterator[None]:
    """Add to an error where it arose."""
    try:
        yield
    except Exception as error:
        if where not in getattr(error, "__notes__", ()):
            error.add_note(where)
        raise


def as_solver(solver: Any, *, caller: str) -> Solver:
    """``solver``, or the solver that a plain function stands for."""
    if isinstance(solver, Solver):
        return solver
    if not callable(solver):
        raise TypeError(
            f"{caller} needs a solver, such as top_k(3), or a function from theta to states of "
            f"the same shape, got {type(solver).__name__}."
        )
    return Solver(solver)


def states_of(solver: Solver, theta: Tensor) -> Tensor:
    """The states, detached and checked, whatever they are where theta is nan."""
    if isinstance(solver, SolverAt):
        with errors_say(solver.where):
            return _solve(solver, theta.detach())
    return _solve(solver, theta.detach())


def _solve(solver: Solver, theta: Tensor) -> Tensor:
    with torch.no_grad():
        states = solver.solve(theta)
        return states if solver.is_trusted else _as_states(states, theta, solver.is_binary)


def is_same_solver(one: Solver, other: Solver) -> bool:
    """Whether two solvers are known to find the same states."""
    return one.event_dim == other.event_dim and _identity(one.solve) == _identity(other.solve)


def _identity(function: Any) -> Any:
    """What tells a function, also one with arguments bound to it, from others."""
    if isinstance(function, partial):
        bound = tuple(map(_identity, function.args)), tuple(sorted(function.keywords.items()))
        return _identity(function.func), bound
    return function


def numpy_solver(
    function: Callable[[np.ndarray], Any],
    *,
    event_dim: int = 1,
    batched: bool = False,
    is_binary: bool = True,
) -> Solver:
    """Solver made of a NumPy function, which may call anything that runs on the CPU.

    Args:
        function: From theta of one datum, ``[*event]``, to its state of the same shape: the z of
            zeros and ones that maximises <z, theta>. An error that it raises reaches the caller.
        event_dim: Number of axes of theta of one datum.
        batched: Whether ``function`` takes ``[batch, *event]`` and returns all states at once.
        is_binary: Whether all entries of a state are zero or one, which is then checked.

    Returns:
        A solver for any batch of theta. What ``function`` returns is checked.

    Raises:
        TypeError: If ``function`` is not callable.
        ValueError: When solving, if a state has the wrong shape or entries other than 0 and 1.

    Bias and variance:
        Unbiased: states are what ``function`` returns.

    Cost:
        One call per datum, one after the other, on the CPU. ``torch.compile``
        breaks the graph there.

    Example:
        >>> import numpy as np, torch
        >>> largest = numpy_solver(lambda theta: theta == np.max(theta))
        >>> largest(torch.tensor([[1.0, 3.0], [2.0, 0.0]]))
        tensor([[0., 1.],
                [1., 0.]])

    References:
        Niepert, Minervini and Franceschi, `Implicit MLE: Backpropagating Through Discrete
        Exponential Family Distributions <https://arxiv.org/abs/2106.01798>`_, 2021.
    """
    if not callable(function):
        raise TypeError(f"numpy_solver needs a function, got {type(function).__name__}.")
    on_host = partial(_solve_on_host, function, event_dim, batched, is_binary)
    # What comes back is checked there, where the values are at hand.
    return Solver(
        partial(_HostCall.apply, on_host), event_dim, is_binary=is_binary, is_trusted=True
    )


def top_k(k: int) -> Solver:
    """Solver whose state marks the k largest entries.

    With Gumbel noise at temperature 1 the items are those of k draws without replacement
    (Plackett and Luce).

    Args:
        k: Number of ones; exactly as many, also where entries tie.

    Returns:
        The solver, of theta ``[*batch, n]`` with n >= k.

    Raises:
        ValueError: If k is not a positive integer; when solving, if k > n.

    Bias and variance:
        Unbiased: the maximum is exact, and so are the marginals of the exponential family.

    Cost:
        A partial sort. The marginals take O(n k) time and memory.

    Example:
        >>> import torch
        >>> top_k(2)(torch.tensor([0.5, 3.0, 1.0]))
        tensor([0., 1., 1.])

    References:
        Kool, van Hoof and Welling, `Stochastic Beams and Where to Find Them
        <https://arxiv.org/abs/1903.06059>`_, 2019, section 2.3.
    """
    check_count(k, "k", caller="top_k")
    return Solver(
        partial(_top_k, k),
        marginals=partial(_subset_marginals, k),
        draw=partial(_draw_subset, k),
        is_trusted=True,
    )


def one_hot_argmax() -> Solver:
    """Solver whose state marks the largest entry.

    With Gumbel noise at temperature 1 the draws are exactly categorical with logits theta.

    Returns:
        The solver, of theta ``[*batch, n]``.

    Bias and variance:
        Unbiased: the maximum is exact.

    Cost:
        O(n) per datum.

    Example:
        >>> import torch
        >>> one_hot_argmax()(torch.tensor([0.5, 3.0, 1.0]))
        tensor([0., 1., 0.])

    References:
        Maddison, Tarlow and Minka, `A* Sampling <https://arxiv.org/abs/1411.0030>`_, 2014.
    """
    return Solver(_argmax, marginals=_softmax, draw=_draw_categorical, is_trusted=True)


def threshold() -> Solver:
    """Solver whose state is one where theta is positive; every entry is a state of its own.

    With logistic noise, its default, at temperature 1 the draws are exactly Bernoulli with logits
    theta.

    Returns:
        The solver, of theta ``[*batch]``.

    Bias and variance:
        Unbiased: the maximum is exact.

    Cost:
        O(1) per entry.

    Example:
        >>> import torch
        >>> threshold()(torch.tensor([0.5, -3.0]))
        tensor([1., 0.])

    References:
        Maddison, Mnih and Teh, `The Concrete Distribution
        <https://arxiv.org/abs/1611.00712>`_, 2017, appendix B.
    """
    noise = LogisticNoise()
    return Solver(
        _threshold, 0, noise, marginals=torch.sigmoid, draw=_draw_bernoulli, is_trusted=True
    )


def ranking() -> Solver:
    """Solver whose state is each item's rank: 0 for the smallest entry, n - 1 for the largest.

    Of all orders this one maximises <z, theta>. With Gumbel noise at temperature 1 the order
    follows Plackett and Luce.

    Returns:
        The solver, of theta ``[*batch, n]``. Its states are not of zeros and ones.

    Bias and variance:
        Unbiased: the maximum is exact.

    Cost:
        Two sorts.

    Example:
        >>> import torch
        >>> ranking()(torch.tensor([0.5, 3.0, 1.0]))
        tensor([0., 2., 1.])

    References:
        Blondel, Teboul, Berthet and Djolonga, `Fast Differentiable Sorting and Ranking
        <https://arxiv.org/abs/2002.08871>`_, 2020, section 2.
    """
    return Solver(_ranks, is_binary=False, is_trusted=True)


# Functions of this module, not closures, so that two solvers of the same kind are equal.


def _top_k(k: int, theta: Tensor) -> Tensor:
    _check_size(theta, k)
    return _mark(_largest(k, theta), theta)


def _mark(indices: Tensor, theta: Tensor) -> Tensor:
    """Ones at the indices, and zeros, of the shape of ``theta``."""
    # A single zero is copied faster than an array of them.
    return theta.new_zeros(()).expand_as(theta).scatter(-1, indices, 1.0)


def _largest(k: int, theta: Tensor) -> Tensor:
    """Indices of the k largest entries, in any order."""
    num_items = theta.shape[-1]
    # On a CPU topk takes a time of its own for each entry, save where k is below a 64th of n.
    is_slow = theta.device.type == "cpu" and 16 * k <= num_items < 64 * k
    if not is_slow or theta.numel() < _MANY_ENTRIES:
        return theta.topk(k, dim=-1, sorted=False).indices
    # The k groups with the largest maxima hold k largest entries: no entry elsewhere exceeds any
    # of these maxima. Of n entries topk then sees n / size, and k * size.
    size = math.isqrt(num_items // k)
    num_groups = num_items // size
    grouped = theta[..., : size * num_groups].unflatten(-1, (size, num_groups))
    groups = grouped.amax(dim=-2).topk(k, dim=-1, sorted=False).indices
    items = torch.arange(num_items, device=theta.device)
    members = groups.unsqueeze(-2) + items[: size * num_groups : num_groups].unsqueeze(-1)
    candidates = members.flatten(-2)
    if num_items > size * num_groups:
        in_no_group = items[size * num_groups :].expand(*groups.shape[:-1], -1)
        candidates = torch.cat([candidates, in_no_group], dim=-1)
    chosen = theta.gather(-1, candidates).topk(k, dim=-1, sorted=False).indices
    return candidates.gather(-1, chosen)


def _subset_marginals(k: int, theta: Tensor) -> Tensor:
    _check_size(theta, k)
    return subsets.marginals(theta, k)


def _draw_subset(k: int, theta: Tensor, generator: torch.Generator | None) -> Tensor:
    _check_size(theta, k)
    return subsets.draw(theta, k, generator)


def _argmax(theta: Tensor) -> Tensor:
    return _mark(theta.argmax(dim=-1, keepdim=True), theta)


def _softmax(theta: Tensor) -> Tensor:
    return torch.softmax(theta, dim=-1)


def _draw_categorical(theta: Tensor, generator: torch.Generator | None) -> Tensor:
    return _argmax(theta + GumbelNoise().sample_like(theta, generator=generator))


def _threshold(theta: Tensor) -> Tensor:
    return (theta > 0).to(theta.dtype)


def _draw_bernoulli(theta: Tensor, generator: torch.Generator | None) -> Tensor:
    return _threshold(theta + LogisticNoise().sample_like(theta, generator=generator))


def _ranks(theta: Tensor) -> Tensor:
    return theta.argsort(dim=-1).argsort(dim=-1).to(theta.dtype)


class _HostCall(torch.autograd.Function):
    """Calls a NumPy function; under ``torch.func.vmap`` with the mapped axis among the batch."""

    @staticmethod
    def forward(on_host: Callable, theta: Tensor) -> Tensor:
        return torch.from_numpy(on_host(theta.detach().cpu().numpy())).to(theta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple, on_host: Callable, theta: Tensor) -> tuple[Tensor, int]:
        return _HostCall.apply(on_host, theta.movedim(in_dims[1], 0)), 0


def _solve_on_host(
    function: Callable, event_dim: int, batched: bool, is_binary: bool, theta: np.ndarray
) -> np.ndarray:
    """The states of a batch with any number of axes."""
    event_shape = theta.shape[theta.ndim - event_dim :]
    rows = np.array(theta).reshape(-1, *event_shape)  # a copy, which the function may overwrite
    if batched:
        states = _as_host_states(function(rows), rows.shape, is_binary)
    else:
        states = np.empty_like(rows)
        for i, row in enumerate(rows):
            states[i] = _as_host_states(function(row), event_shape, is_binary)
    return states.astype(theta.dtype, copy=False).reshape(theta.shape)


def _as_host_states(states: Any, shape: tuple[int, ...], is_binary: bool) -> np.ndarray:
    states = np.asarray(states)
    if states.shape != shape:
        raise ValueError(_wrong_shape(states.shape, shape))
    if is_binary and not ((states == 0) | (states == 1)).all():
        raise ValueError(_NOT_BINARY)
    return states


def _as_states(states: Any, theta: Tensor, is_binary: bool) -> Tensor:
    if not isinstance(states, Tensor):
        raise TypeError(
            f"a solver must return a torch.Tensor, got {type(states).__name__}. Wrap a function "
            "of NumPy arrays in numpy_solver(...)."
        )
    if states.shape != theta.shape:
        raise ValueError(_wrong_shape(states.shape, theta.shape))
    if is_binary and is_false(((states == 0) | (states == 1)).all()):
        raise ValueError(_NOT_BINARY)
    return states.to(theta.dtype)


def _wrong_shape(got: Any, needed: Any) -> str:
    return (
        f"a solver must return states of the shape of theta, {tuple(needed)}, got {tuple(got)}. "
        "Its function sees [*batch, *event]; that of numpy_solver a single [*event]."
    )


_NOT_BINARY = (
    "a solver returned a state with entries other than 0 and 1. If that is meant, as for ranks, "
    "pass is_binary=False; a relaxed solution has to be rounded first."
)


def _check_size(theta: Tensor, k: int) -> None:
    if theta.shape[-1] < k:
        raise ValueError(
            f"top_k({k}) needs theta with {k} or more entries along its last axis, got shape "
            f"{tuple(theta.shape)}."
        )
