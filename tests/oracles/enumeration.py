"""Expectation, bias and variance of a gradient estimator as exact numbers, in NumPy.

A *state* is everything random about one particle: its discrete values, and the noise of its
reparameterised sites, which these tests draw from a few points instead of a Gaussian (an
estimator that is unbiased is so for any law of the noise). With M states and n particles there
are M**n tuples; sums over all of them replace every expectation.

The exact gradient is the derivative of the summed bound by a complex step: F(x + ih) has
imaginary part h F'(x) to machine precision, with nothing derived by hand and nothing shared with
the estimators. The programs' densities must therefore accept complex parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np

Params = Mapping[str, np.ndarray]
State = Mapping[str, Any]

_STEP = 1e-25


class Densities(NamedTuple):
    """Log-densities of one particle, each broadcastable to ``[*batch]``."""

    log_p: np.ndarray
    """log p(x, z) as it enters the weight."""
    log_q: np.ndarray
    """log q(z) as it enters the weight, every site with its scale and mask."""
    log_score: np.ndarray
    """log-density of the score-function sites whose gradient the learning signal multiplies: that
    of drawing them, not scaled with their weight."""
    log_drawn: np.ndarray | None = None
    """log-probability of drawing the state, if it is not the sum of ``log_score``."""


class Problem(NamedTuple):
    """A model and a guide small enough to be enumerated."""

    params: Params
    states: Sequence[State]
    densities: Callable[[Params, State, np.ndarray | None], Densities]
    """(params, state, subsample) -> Densities; ``subsample`` holds a plate's drawn indices."""
    batch_shape: tuple[int, ...] = ()
    scale: float | np.ndarray = 1.0
    """What multiplies the bound of each batch element: N/B, and any scale common to every site."""
    subsamples: Sequence[np.ndarray | None] = (None,)
    log_noise: float = 0.0
    """log-probability of one point of the noise; the same for every state."""


def flatten(params: Params) -> np.ndarray:
    """All parameters in one vector, sites in the order of the mapping."""
    return np.concatenate([np.ravel(value) for value in params.values()])


def unflatten(vector: np.ndarray, like: Params) -> dict[str, np.ndarray]:
    sizes = [np.size(value) for value in like.values()]
    parts = np.split(vector, np.cumsum(sizes)[:-1])
    return {
        name: part.reshape(np.shape(value))
        for (name, value), part in zip(like.items(), parts, strict=True)
    }


def complex_step_gradient(function: Callable[[Params], Any], params: Params) -> np.ndarray:
    """Derivatives of ``function`` along axis 0, one per entry of the flattened parameters."""
    point = flatten(params).astype(complex)
    derivatives = []
    for i in range(len(point)):
        moved = point.copy()
        moved[i] += 1j * _STEP
        derivatives.append(np.imag(function(unflatten(moved, params))) / _STEP)
    return np.array(derivatives)


# Building blocks for the densities: analytic, so that a complex step passes through them.


def log_softmax(logits):
    shift = np.max(np.real(logits), axis=-1, keepdims=True)
    return logits - shift - np.log(np.sum(np.exp(logits - shift), axis=-1, keepdims=True))


def log_categorical(logits, value):
    return np.take_along_axis(log_softmax(logits), np.asarray(value)[..., None], axis=-1)[..., 0]


def log_bernoulli(logits, value):
    return -np.log(1 + np.exp(np.where(np.asarray(value) == 1, -1, 1) * logits))


def log_normal(value, loc, scale):
    return -((value - loc) ** 2) / (2 * scale**2) - np.log(scale) - np.log(2 * np.pi) / 2


def log_mean_exp(log_weights):
    """Bound of ``[K, *batch]`` log-weights that may be complex; -inf counts as a zero weight."""
    shift = np.max(np.real(log_weights), axis=0)
    shift = np.where(np.isneginf(shift), 0.0, shift)
    total = sum(
        np.where(np.isneginf(np.real(lw)), 0.0, np.exp(_finite(lw) - shift)) for lw in log_weights
    )
    return np.where(total == 0, 0.0, np.log(np.where(total == 0, 1.0, total)) + shift) - np.where(
        total == 0, np.inf, np.log(len(log_weights))
    )


def _finite(log_weight):
    return np.where(np.isneginf(np.real(log_weight)), 0.0, log_weight)


def _or_nothing(bound):
    """The bound, and 0 where no particle has weight: such tuples are not in the objective."""
    return np.where(np.isneginf(np.real(bound)), 0.0, bound)


def _all_densities(problem: Problem, params: Params, subsample) -> list[Densities]:
    """The densities of every state, computed once and combined into tuples afterwards."""
    densities = []
    for state in problem.states:
        *terms, log_drawn = problem.densities(params, state, subsample)
        terms = [np.broadcast_to(term, problem.batch_shape) for term in terms]
        log_drawn = np.sum(terms[-1]) if log_drawn is None else log_drawn
        densities.append(Densities(*terms, log_drawn + problem.log_noise))
    return densities


def tuples(problem: Problem, num_draws: int) -> list[tuple[int, ...]]:
    """Every tuple of ``num_draws`` states, as indices into ``problem.states``."""
    return list(product(range(len(problem.states)), repeat=num_draws))


def renyi_log_mean_exp(log_weights, alpha):
    """Bound of order alpha of ``[K, *batch]`` log-weights that may be complex."""
    if alpha == 1:
        return np.mean(log_weights, axis=0)
    if alpha == 0:
        return log_mean_exp(log_weights)
    is_zero = np.isneginf(np.real(log_weights))
    tempered = np.where(is_zero, -np.inf, (1 - alpha) * _finite(log_weights))
    return log_mean_exp(tempered) / (1 - alpha)


def expected_bound(problem: Problem, params: Params, num_particles: int, bound=log_mean_exp):
    """E[scale * sum over the batch of L], by summing over every tuple (and subsample)."""
    total = 0.0
    for subsample in problem.subsamples:
        states = _all_densities(problem, params, subsample)
        log_probs = [d.log_drawn for d in states]
        log_weights = [d.log_p - d.log_q for d in states]
        for indices in tuples(problem, num_particles):
            value = _or_nothing(bound(np.stack([log_weights[i] for i in indices])))
            total = total + np.exp(sum(log_probs[i] for i in indices)) * np.sum(
                problem.scale * value
            )
    return total / len(problem.subsamples)


def exact_gradient(problem: Problem, num_particles: int, bound=log_mean_exp) -> np.ndarray:
    """Gradient of the expected bound in the flattened parameters."""
    return complex_step_gradient(
        lambda params: expected_bound(problem, params, num_particles, bound), problem.params
    )


class Moments(NamedTuple):
    mean: np.ndarray
    covariance: np.ndarray

    @property
    def variance(self) -> float:
        """Summed over the parameters."""
        return float(np.trace(self.covariance))


def moments(gradients: np.ndarray, probabilities: np.ndarray) -> Moments:
    """Exact mean and covariance of ``[T, P]`` gradients that occur with the probabilities."""
    np.testing.assert_allclose(np.sum(probabilities), 1.0, rtol=1e-12)
    mean = probabilities @ gradients
    centred = gradients - mean
    return Moments(mean, (probabilities[:, None] * centred).T @ centred)


def tuple_probabilities(problem: Problem, num_draws: int) -> np.ndarray:
    """Probability of each (subsample, tuple), subsamples outermost, tuples in order."""
    probabilities = []
    for subsample in problem.subsamples:
        states = _all_densities(problem, problem.params, subsample)
        one = np.exp([d.log_drawn for d in states])
        for indices in tuples(problem, num_draws):
            probabilities.append(np.prod(one[list(indices)]) / len(problem.subsamples))
    return np.array(probabilities)


def estimator_gradients(
    problem: Problem,
    num_particles: int,
    learning_signal: Callable[..., np.ndarray],
    weights: Callable[[np.ndarray], np.ndarray],
    *,
    num_auxiliary: int = 0,
    num_replicates: int = 1,
) -> np.ndarray:
    """The estimator's gradient at every (subsample, tuple), ``[T, P]``.

    Ascent gradient of one tuple, by definition, with a the learning signal and v the weights:

        scale * sum_k  v_k grad(log p_k - log q_k) + (a_k + v_k) grad log score_k

    where the densities of the score-function sites carry no scale of their own in the last term
    (they say how z was drawn, not how it is weighed). Without scales this is the usual
    v_k grad(log p_k - log q_path_k) + a_k grad log q_score_k.
    """
    num_draws = num_replicates * (num_particles + num_auxiliary)
    gradients = []
    for subsample in problem.subsamples:
        states = _all_densities(problem, problem.params, subsample)

        def stacked(params, subsample=subsample):
            return np.stack([np.stack(d[:3]) for d in _all_densities(problem, params, subsample)])

        # [P, states, 3, *batch] -> per state and density, the derivative in every parameter
        slopes = complex_step_gradient(stacked, problem.params)
        slopes = np.where(np.isfinite(slopes), slopes, 0.0)  # of a density that is -inf
        log_weights = np.stack([d.log_p - d.log_q for d in states])
        for indices in tuples(problem, num_draws):
            gradient = 0.0
            for replicate in np.split(np.array(indices), num_replicates):
                bound_draws = replicate[:num_particles]
                log_w = log_weights[bound_draws]
                auxiliary = (log_weights[replicate[num_particles:]],) if num_auxiliary else ()
                a, v = learning_signal(log_w, *auxiliary), weights(log_w)
                for k, state in enumerate(bound_draws):
                    slope_p, slope_q, slope_score = (slopes[:, state, i] for i in range(3))
                    terms = v[k] * (slope_p - slope_q) + (a[k] + v[k]) * slope_score
                    terms = problem.scale * terms / num_replicates
                    gradient = gradient + terms.reshape(len(terms), -1).sum(axis=1)
            gradients.append(gradient)
    return np.array(gradients)


def credited_gradients(
    problem: Problem,
    num_particles: int,
    credits: Callable[[Params, State, np.ndarray | None], Sequence[tuple[Any, Any]]],
) -> np.ndarray:
    """Gradient of the ELBO where each draw has the credit for its own costs, ``[T, P]``.

    ``credits`` holds (log-density of the draw, sum of the costs downstream of it) for each element
    of each score-function site. The ascent gradient of one tuple is

        1/K sum_k  grad(log p_k - log q_k + log score_k)
                   + sum_s (c_ks - 1/(K - 1) sum_{l != k} c_ls) grad log q_ks
    """
    gradients = []
    for subsample in problem.subsamples:

        def outside(params, subsample=subsample):
            states = _all_densities(problem, params, subsample)
            return np.array(
                [np.sum(problem.scale * (d.log_p - d.log_q + d.log_score)) for d in states]
            )

        def each(params, subsample=subsample):
            return np.array([credits(params, state, subsample) for state in problem.states])

        slopes_outside = complex_step_gradient(outside, problem.params)  # [P, states]
        slopes = complex_step_gradient(each, problem.params)[..., 0]  # [P, states, draws]
        costs = np.real(each(problem.params))[..., 1]
        for indices in tuples(problem, num_particles):
            gradient = np.zeros(len(slopes))
            for k, state in enumerate(indices):
                gradient += slopes_outside[:, state]
                others = [costs[other] for i, other in enumerate(indices) if i != k]
                for s in range(costs.shape[1]):
                    signal = costs[state, s] - np.mean([other[s] for other in others])
                    gradient += signal * slopes[:, state, s]
            gradients.append(gradient / num_particles)
    return np.array(gradients)


def expected_score(
    problem: Problem, num_particles: int, coefficients: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """E[scale * sum_k c_k h_k], h_k the gradient of the score-function sites' log-density."""
    nothing = np.zeros_like
    gradients = estimator_gradients(problem, num_particles, coefficients, nothing)
    return tuple_probabilities(problem, num_particles) @ gradients
