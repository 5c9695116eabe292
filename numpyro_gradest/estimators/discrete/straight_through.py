"""Draws of discrete states that carry the gradient of something differentiable."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_gradest.estimators._validation import check_count
from numpyro_gradest.estimators.discrete._validation import as_theta, check_positive
from numpyro_gradest.estimators.discrete.noise import Noise
from numpyro_gradest.estimators.discrete.perturb_and_map import prepare
from numpyro_gradest.estimators.discrete.solvers import Solver, as_solver

AnySolver = Solver | Callable[[Array], Array]


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
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_gradest.estimators import one_hot_argmax
        >>> def first(theta, key=jax.random.key(0)):
        ...     return StraightThrough().sample(key, theta, one_hot_argmax())[0]
        >>> jax.grad(first)(jnp.zeros(2))
        Array([ 0.25, -0.25], dtype=float32)

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
        key: Array,
        theta: Float[Array, " *batch_event"],
        solver: AnySolver,
        *,
        num_samples: int | None = None,
    ) -> Float[Array, " *samples_batch_event"]:
        """Draw states that carry the gradient; arguments as of :meth:`IMLE.sample`."""
        theta, perturbed, solver = prepare(
            key,
            theta,
            solver,
            self.noise,
            self.temperature,
            num_samples,
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
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_gradest.estimators import one_hot_argmax
        >>> GumbelSoftmaxST().sample(jax.random.key(0), jnp.zeros(2), one_hot_argmax()).sum()
        Array(1., dtype=float32)

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
        key: Array,
        theta: Float[Array, " *batch_event"],
        solver: AnySolver,
        *,
        num_samples: int | None = None,
    ) -> Float[Array, " *samples_batch_event"]:
        """Draw states that carry the gradient; arguments as of :meth:`IMLE.sample`."""
        _, perturbed, solver = prepare(
            key, theta, solver, self.noise, 1.0, num_samples, caller="GumbelSoftmaxST"
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
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_gradest.estimators import one_hot_argmax
        >>> def first(theta, key=jax.random.key(0)):
        ...     return ReinMax().sample(key, theta, one_hot_argmax())[0]
        >>> jax.grad(first)(jnp.zeros(2))
        Array([ 0.25, -0.25], dtype=float32)

    References:
        Liu, Dong, Liu, Yu and Gao, `Bridging Discrete and Backpropagation: Straight-Through and
        Beyond <https://arxiv.org/abs/2304.08612>`_, 2023, algorithm 2, which for a category is
        the above, written differently: :math:`2 J(\tfrac{z + \mu}{2}) - \tfrac12 J(\mu)`.
    """

    def sample(
        self,
        key: Array,
        theta: Float[Array, " *batch_event"],
        solver: AnySolver,
        *,
        num_samples: int | None = None,
    ) -> Float[Array, " *samples_batch_event"]:
        """Draw states that carry the gradient; arguments as of :meth:`IMLE.sample`."""
        theta, states, mean, event_dim = _exact(key, theta, solver, num_samples, caller="ReinMax")
        deviation = states - jax.lax.stop_gradient(mean)
        along = jnp.sum(deviation * theta, axis=tuple(range(-event_dim, 0)), keepdims=True)
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
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_gradest.estimators import top_k
        >>> def first(theta, key=jax.random.key(0)):
        ...     return SIMPLE().sample(key, theta, top_k(2))[0]
        >>> jax.jit(jax.grad(first))(jnp.zeros(3))  # the covariance of the first item with each
        Array([ 0.22..., -0.11..., -0.11...], dtype=float32)

    References:
        Ahmed, Zeng, Niepert and Van den Broeck, `SIMPLE: A Gradient Estimator for k-Subset
        Sampling <https://arxiv.org/abs/2210.01941>`_, 2023, section 3.
    """

    def sample(
        self,
        key: Array,
        theta: Float[Array, " *batch_event"],
        solver: AnySolver,
        *,
        num_samples: int | None = None,
    ) -> Float[Array, " *samples_batch_event"]:
        """Draw states that carry the gradient; arguments as of :meth:`IMLE.sample`."""
        _, states, mean, _ = _exact(key, theta, solver, num_samples, caller="SIMPLE")
        return with_gradient_of(states, mean)


def _exact(
    key: Array, theta: Array, solver: AnySolver, num_samples: int | None, *, caller: str
) -> tuple[Array, Array, Array, int]:
    """Theta of each draw, exact draws, their mean, and the dimensions of a state."""
    solver = as_solver(solver, caller=caller)
    theta = as_theta(theta, solver.event_dim, caller=caller)
    if num_samples is not None:
        check_count(num_samples, "num_samples", caller=caller)
        theta = jnp.broadcast_to(theta, (num_samples, *theta.shape))
    draw, marginals = (_known(item, caller) for item in (solver.draw, solver.marginals))
    return theta, draw(key, theta), marginals(theta), solver.event_dim


def with_gradient_of(value: Array, other: Array) -> Array:
    """Exactly ``value``, with the derivative of ``other``."""
    # Not value + other - stop_gradient(other), which rounds: a state must stay a state.
    return _gradient_of(jax.lax.stop_gradient(value), other)


@jax.custom_vjp
def _gradient_of(value: Array, other: Array) -> Array:
    return value


def _forward(value: Array, other: Array) -> tuple[Array, None]:
    return value, None


def _backward(_: None, gradient: Array) -> tuple[Array, Array]:
    return jnp.zeros_like(gradient), gradient


_gradient_of.defvjp(_forward, _backward)


def _known(item: Any, caller: str) -> Any:
    if item is None:
        raise ValueError(
            f"{caller} needs to know the mean of the states, which this solver does not: it is "
            "for top_k, one_hot_argmax, threshold and spanning_tree, or a Solver(..., marginals=, "
            "draw=). IMLE takes any solver."
        )
    return item
