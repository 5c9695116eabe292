"""Discrete estimators by their definitions, in NumPy: loops over data and states, float64.

A solver is the list of all states: the maximum is looked for among them. An expectation over the
noise is a mean over a low-discrepancy set of its values, not over random draws.
"""

import math
from itertools import combinations, permutations, product

import numpy as np

_STEP = 1e-25


# All states of a solver


def subsets(n, k):
    return [
        np.array([float(i in chosen) for i in range(n)]) for chosen in combinations(range(n), k)
    ]


def rankings(n):
    return [np.array(order, dtype=float) for order in permutations(range(n))]


def bits():
    return [np.array(0.0), np.array(1.0)]


def spanning_trees(n):
    edges = list(combinations(range(n), 2))
    states = []
    for chosen in combinations(edges, n - 1):
        reached = {0}
        for _ in range(n):
            for i, j in chosen:
                if i in reached or j in reached:
                    reached |= {i, j}
        if len(reached) == n:
            state = np.zeros((n, n))
            for i, j in chosen:
                state[i, j] = state[j, i] = 1
            states.append(state)
    return states


def assignments(n):
    return [np.eye(n)[list(order)] for order in permutations(range(n))]


def grid_paths(height, width):
    """Paths from the first to the last cell that meet none twice."""
    states = []

    def go(cell, visited):
        if cell == (height - 1, width - 1):
            state = np.zeros((height, width))
            for i, j in visited:
                state[i, j] = 1
            states.append(state)
            return
        for step in product((-1, 0, 1), repeat=2):
            following = cell[0] + step[0], cell[1] + step[1]
            is_inside = 0 <= following[0] < height and 0 <= following[1] < width
            if is_inside and following not in visited:
                go(following, [*visited, following])

    go((0, 0), [(0, 0)])
    return states


def maximiser(states, theta):
    return states[int(np.argmax([np.sum(state * theta) for state in states]))]


# Estimators


def imle(states, theta, noise, dy, *, step_size, symmetric=True):
    """Gradient in theta of one datum."""
    below = maximiser(states, theta - step_size * dy + noise)
    if symmetric:
        return (maximiser(states, theta + step_size * dy + noise) - below) / (2 * step_size)
    return (maximiser(states, theta + noise) - below) / step_size


def adaptive_imle(
    states, theta, noise, dy, *, relative_step, temperature, relative=False, is_of_bits=False
):
    """Gradient in theta of one datum, how much of its state changes, and whether it is counted."""
    length = np.sqrt(np.sum(dy**2))
    step = 0.0
    if length > 0:
        step = relative_step * max(np.sqrt(np.sum(theta**2)), temperature) / length
    if step == 0:
        return np.zeros_like(theta), 0, False
    ends = [maximiser(states, theta + sign * step * dy + noise) for sign in (1, -1)]
    if is_of_bits:
        ends = [np.stack([end, 1 - end]) for end in ends]
    change = sum(x != y for x, y in zip(*(end.ravel() for end in ends), strict=True))
    if relative:
        asked = np.count_nonzero(dy) * (2 if is_of_bits else 1)
        change = min(change / min(sum(np.count_nonzero(end) for end in ends), asked), 1)
    return imle(states, theta, noise, dy, step_size=step), change, True


def adaptive_update(state, counts, *, target, rate, decay, momentum, multiplicative):
    """(relative step, density, previous update) after a step with these (non-zeros, data)."""
    step, density, previous = state
    non_zero, data = counts
    if data == 0:
        return state
    density = decay * density + (1 - decay) * non_zero / data
    update = momentum * previous + (rate if density < target else -rate)
    if multiplicative:
        step = min(max(step * math.exp(update), 1e-6), 1e3)
    else:
        step = min(max(step + update, 0.0), 1e3)
    return step, density, update


def softmax(theta):
    weights = np.exp(theta - np.max(theta.real))
    return weights / np.sum(weights)


def covariance_of(p):
    return np.diag(p) - np.outer(p, p)


def reinmax(theta, state, dy):
    """Gradient in theta of one datum with a one-hot state."""
    p = softmax(theta)
    return 2 * covariance_of((state + p) / 2) @ dy - covariance_of(p) @ dy / 2


def exponential_family(states, theta):
    """Probability of each state, proportional to exp <z, theta>."""
    return softmax(np.array([np.sum(state * theta) for state in states]))


def mean(states, theta):
    return sum(p * z for p, z in zip(exponential_family(states, theta), states, strict=True))


def covariance(states, theta):
    m = mean(states, theta)
    return sum(
        p * np.outer(z - m, z - m)
        for p, z in zip(exponential_family(states, theta), states, strict=True)
    )


def plackett_luce_subset(theta, state):
    """Probability that k draws without replacement mark this state."""
    weights = np.exp(theta)
    chosen = np.flatnonzero(state)
    total = 0.0
    for order in permutations(chosen):
        probability, left = 1.0, np.sum(weights)
        for item in order:
            probability = probability * weights[item] / left
            left = left - weights[item]
        total = total + probability
    return total


def expectation_gradient(probability, states, theta, objective):
    """Derivative in theta of the expectation of ``objective``, by a complex step."""
    gradient = []
    for i in range(len(theta)):
        moved = theta.astype(complex)
        moved[i] += 1j * _STEP
        gradient.append(sum(np.imag(probability(moved, z)) / _STEP * objective(z) for z in states))
    return np.array(gradient)


# Noise


def gumbel_points(number, n):
    """Gumbel noise of n items up to what is common to them, at points that fill the simplex.

    Of the exponentials exp(-noise) only the proportions decide which items come first, and these
    are uniform on the simplex: the spacings of n - 1 sorted uniform numbers.
    """
    uniform = np.sort(uniform_points(number, n - 1), axis=1)
    edges = np.concatenate([np.zeros((number, 1)), uniform, np.ones((number, 1))], axis=1)
    return -np.log(np.maximum(np.diff(edges, axis=1), 1e-300))


def uniform_points(number, dimension):
    """Points that fill the cube evenly."""
    # Additive recurrence with the root of x^(d + 1) = x + 1, which generalises the golden ratio.
    root = 1.5
    for _ in range(100):
        root = (1 + root) ** (1 / (dimension + 1))
    steps = root ** -np.arange(1, dimension + 1)
    return (0.5 + np.arange(1, number + 1)[:, None] * steps) % 1
