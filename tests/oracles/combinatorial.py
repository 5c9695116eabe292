"""Laws of subsets, rankings and spanning trees: the probability of every value, by loops.

Scores may be complex, for derivatives by a complex step.
"""

from itertools import combinations, permutations

import numpy as np

_STEP = 1e-25


def k_subset(theta, k):
    """[(value, probability)] of all vectors of k ones, in proportion to their weights."""
    values = _k_hot(len(theta), k)
    weights = [
        np.prod([np.exp(t) for t, z in zip(theta, value, strict=True) if z]) for value in values
    ]
    return list(zip(values, weights / np.sum(weights), strict=True))


def spanning_tree(theta):
    """[(value, probability)] of all trees, in proportion to the product of their weights."""
    num_nodes = len(theta)
    edges = list(combinations(range(num_nodes), 2))
    values, weights = [], []
    for chosen in combinations(edges, num_nodes - 1):
        if _is_connected(num_nodes, chosen):
            value, weight = np.zeros((num_nodes, num_nodes)), 1.0
            for i, j in chosen:
                value[i, j] = value[j, i] = 1
                weight = weight * np.exp((theta[i, j] + theta[j, i]) / 2)
            values.append(value)
            weights.append(weight)
    return list(zip(values, weights / np.sum(weights), strict=True))


def plackett_luce(theta):
    """[(value, probability)] of all orders."""
    orders = list(permutations(range(len(theta))))
    return [(np.array(order), _probability_to_begin(theta, order)) for order in orders]


def plackett_luce_subset(theta, k):
    """[(value, probability)] of all sets of the first k items."""
    return [
        (
            value,
            sum(
                _probability_to_begin(theta, order) for order in permutations(np.flatnonzero(value))
            ),
        )
        for value in _k_hot(len(theta), k)
    ]


def expectation(table, function):
    return sum(p * function(z) for z, p in table)


def entropy(table):
    return -sum(p * np.log(p) for _, p in table)


def kl_divergence(table, other):
    return sum(p * (np.log(p) - np.log(q)) for (_, p), (_, q) in zip(table, other, strict=True))


def gradient(function, theta):
    """Derivative of ``function(theta)``, by a complex step."""
    result = np.zeros(theta.shape)
    for index in np.ndindex(*theta.shape):
        moved = theta.astype(complex)
        moved[index] += 1j * _STEP
        result[index] = np.imag(function(moved)) / _STEP
    return result


def _k_hot(n, k):
    return [
        np.array([float(i in chosen) for i in range(n)]) for chosen in combinations(range(n), k)
    ]


def _probability_to_begin(theta, order):
    """Probability that the first items taken are these, in this order."""
    probability, left = 1.0, list(range(len(theta)))
    for item in order:
        # Added up anew: what subtraction leaves of a dominating weight has no digits.
        probability = probability * np.exp(theta[item]) / sum(np.exp(theta[i]) for i in left)
        left.remove(item)
    return probability


def _is_connected(num_nodes, edges):
    reached = {0}
    for _ in range(num_nodes):
        for i, j in edges:
            if i in reached or j in reached:
                reached |= {i, j}
    return len(reached) == num_nodes
