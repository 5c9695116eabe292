"""Solvers: the state z that maximises <z, theta>, for a batch of theta, never differentiated."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_gradest.estimators._validation import check_count
from numpyro_gradest.estimators.discrete import subsets
from numpyro_gradest.estimators.discrete._validation import is_false
from numpyro_gradest.estimators.discrete.noise import GumbelNoise, LogisticNoise, Noise

Solve = Callable[[Array], Array]


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
    draw: Callable[..., Array] | None = None
    """Draws from that p exactly, given a key and theta."""
    is_trusted: bool = False
    """Whether to leave out the checks of what the function returns."""

    def __call__(self, theta: Float[Array, " *shape"]) -> Float[Array, " *shape"]:
        """The states, detached and checked; a nan in theta stays one."""
        return states_of(self, theta) + 0.0 * jax.lax.stop_gradient(theta)


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


def states_of(solver: Solver, theta: Array) -> Array:
    """The states, detached and checked, whatever they are where theta is nan."""
    theta = jax.lax.stop_gradient(theta)
    words = solver.solve.place if isinstance(solver.solve, _SolveAt) else _PLACE.get()
    with called_at(words):
        states = solver.solve(theta)
        if not solver.is_trusted:
            states = _as_states(states, theta, solver.is_binary)
    return jax.lax.stop_gradient(states)


_PLACE: ContextVar[str] = ContextVar("place", default="")


@contextmanager
def called_at(place: str) -> Iterator[None]:
    """Errors within say where they arose, also those that compiled code raises later."""
    token = _PLACE.set(place)
    try:
        yield
    except Exception as error:
        if place and place not in getattr(error, "__notes__", ()):
            error.add_note(place)
        raise
    finally:
        _PLACE.reset(token)


@dataclass(frozen=True)
class _SolveAt:
    solve: Solve
    place: str

    def __call__(self, theta: Array) -> Array:
        return self.solve(theta)


def with_place(solver: Solver, place: str) -> Solver:
    """The solver, whose errors say where it was called for, in the backward pass as well."""
    calls_others = getattr(solver.solve, "func", None) is _call_host
    if solver.is_trusted and not calls_others:
        return solver  # raises nothing, and is known by its function
    return solver._replace(solve=_SolveAt(solver.solve, place))


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
        One call per datum, one after the other, on the CPU. Compiled code
        calls back to the host for it. On a single core JAX can wait there for ever; a warning says
        what to do.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> largest = numpy_solver(lambda theta: theta == np.max(theta))
        >>> largest(jnp.array([[1.0, 3.0], [2.0, 0.0]]))
        Array([[0., 1.],
               [1., 0.]], dtype=float32)

    References:
        Niepert, Minervini and Franceschi, `Implicit MLE: Backpropagating Through Discrete
        Exponential Family Distributions <https://arxiv.org/abs/2106.01798>`_, 2021.
    """
    if not callable(function):
        raise TypeError(f"numpy_solver needs a function, got {type(function).__name__}.")
    on_host = partial(_solve_on_host, function, event_dim, batched, is_binary)
    # What comes back is checked there, where the values are at hand.
    return Solver(partial(_call_host, on_host), event_dim, is_binary=is_binary, is_trusted=True)


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
        >>> import jax.numpy as jnp
        >>> top_k(2)(jnp.array([0.5, 3.0, 1.0]))
        Array([0., 1., 1.], dtype=float32)

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
        >>> import jax.numpy as jnp
        >>> one_hot_argmax()(jnp.array([0.5, 3.0, 1.0]))
        Array([0., 1., 0.], dtype=float32)

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
        >>> import jax.numpy as jnp
        >>> threshold()(jnp.array([0.5, -3.0]))
        Array([1., 0.], dtype=float32)

    References:
        Maddison, Mnih and Teh, `The Concrete Distribution
        <https://arxiv.org/abs/1611.00712>`_, 2017, appendix B.
    """
    noise = LogisticNoise()
    return Solver(
        _threshold, 0, noise, marginals=jax.nn.sigmoid, draw=_draw_bernoulli, is_trusted=True
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
        >>> import jax.numpy as jnp
        >>> ranking()(jnp.array([0.5, 3.0, 1.0]))
        Array([0., 2., 1.], dtype=float32)

    References:
        Blondel, Teboul, Berthet and Djolonga, `Fast Differentiable Sorting and Ranking
        <https://arxiv.org/abs/2002.08871>`_, 2020, section 2.
    """
    return Solver(_ranks, is_binary=False, is_trusted=True)


# Functions of this module, not closures, so that two solvers of the same kind are equal.


def _top_k(k: int, theta: Array) -> Array:
    _check_size(theta, k)
    _, indices = jax.lax.top_k(theta, k)
    # Not zeros_like: XLA makes one such array for all calls in a program, and a copy for each.
    return jnp.put_along_axis(0.0 * theta, indices, 1.0, axis=-1, inplace=False)


def _subset_marginals(k: int, theta: Array) -> Array:
    _check_size(theta, k)
    return subsets.marginals(theta, k)


def _draw_subset(k: int, key: Array, theta: Array) -> Array:
    _check_size(theta, k)
    return subsets.draw(key, theta, k)


def _argmax(theta: Array) -> Array:
    return jax.nn.one_hot(jnp.argmax(theta, axis=-1), theta.shape[-1], dtype=theta.dtype)


def _softmax(theta: Array) -> Array:
    return jax.nn.softmax(theta, axis=-1)


def _draw_categorical(key: Array, theta: Array) -> Array:
    return _argmax(theta + GumbelNoise().sample_like(key, theta))


def _threshold(theta: Array) -> Array:
    return (theta > 0).astype(theta.dtype)


def _draw_bernoulli(key: Array, theta: Array) -> Array:
    return _threshold(theta + LogisticNoise().sample_like(key, theta))


def _ranks(theta: Array) -> Array:
    return jnp.argsort(jnp.argsort(theta, axis=-1), axis=-1).astype(theta.dtype)


def _call_host(on_host: Callable, theta: Array) -> Array:
    if _num_threads() == 1:
        warnings.warn(_MAY_WAIT_FOREVER, stacklevel=2)
    if place := _PLACE.get():
        on_host = partial(_call_at, place, on_host)
    result = jax.ShapeDtypeStruct(theta.shape, theta.dtype)
    # Mapped axes come in front, where the function takes any number of them.
    return jax.pure_callback(on_host, result, theta, vmap_method="expand_dims")


def _call_at(place: str, on_host: Callable, theta: Any) -> np.ndarray:
    try:
        return on_host(theta)
    except Exception as error:
        # A note would be lost: JAX raises an error of its own, made of the message.
        raise RuntimeError(f"{type(error).__name__}: {error} {place}") from error


def _num_threads() -> int:
    """Of JAX on the CPU: as many as cores, and as devices; two where it computes elsewhere."""
    if jax.default_backend() != "cpu" or not hasattr(os, "sched_getaffinity"):
        return 2
    return max(len(os.sched_getaffinity(0)), jax.local_device_count())


_MAY_WAIT_FOREVER = (
    "numpy_solver on a single core: JAX computes and moves data in one thread there, and a call "
    "from compiled code with large NumPy arrays can wait for itself for ever. Start with "
    "numpyro.set_host_device_count(2), which makes a second thread, or pass jax.numpy arrays."
)


def _solve_on_host(
    function: Callable, event_dim: int, batched: bool, is_binary: bool, theta: Any
) -> np.ndarray:
    """The states of a batch with any number of axes."""
    theta = np.asarray(theta)
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


def _as_states(states: Any, theta: Array, is_binary: bool) -> Array:
    if not isinstance(states, jax.Array):
        raise TypeError(
            f"a solver must return a jax.Array, got {type(states).__name__}. Wrap a function "
            "of NumPy arrays in numpy_solver(...)."
        )
    if states.shape != theta.shape:
        raise ValueError(_wrong_shape(states.shape, theta.shape))
    states = states.astype(theta.dtype)
    if not is_binary:
        return states
    is_state = (states == 0) | (states == 1)
    if is_false(jnp.all(is_state)):
        raise ValueError(_NOT_BINARY)
    # Under jit values can't be looked at: what is no state becomes nan, which can't go unseen.
    return jnp.where(is_state, states, jnp.nan)


def _wrong_shape(got: Any, needed: Any) -> str:
    return (
        f"a solver must return states of the shape of theta, {tuple(needed)}, got {tuple(got)}. "
        "Its function sees [*batch, *event]; that of numpy_solver a single [*event]."
    )


_NOT_BINARY = (
    "a solver returned a state with entries other than 0 and 1. If that is meant, as for ranks, "
    "pass is_binary=False; a relaxed solution has to be rounded first."
)


def _check_size(theta: Array, k: int) -> None:
    if theta.shape[-1] < k:
        raise ValueError(
            f"top_k({k}) needs theta with {k} or more entries along its last axis, got shape "
            f"{tuple(theta.shape)}."
        )
