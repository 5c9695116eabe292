"""Solvers of combinatorial problems, by SciPy on the CPU."""

from functools import cache, partial

import numpy as np
from jaxtyping import Array

from numpyro_gradest.estimators.discrete import trees
from numpyro_gradest.estimators.discrete.solvers import Solve, Solver, numpy_solver


def spanning_tree() -> Solver:
    """Solver whose state is the adjacency matrix of the heaviest spanning tree.

    Returns:
        The solver, of theta ``[*batch, n, n]``: entries (i, j) and (j, i) together are the weight
        of the edge between nodes i and j of a complete graph, and both are marked in the
        symmetric state. The diagonal does not count.

        Its marginals and its exact draws are those of p(z) proportional to exp <z, theta>, which
        is ``SpanningTree(theta + theta.mT)``. ``SIMPLE`` and ``ReinMax`` draw from that law.
        ``StraightThrough`` draws perturbed maxima, whose law is another one under any of the
        noises here, and has the gradient of this law's mean all the same.

    Raises:
        ValueError: When solving, if theta is not square.

    Bias and variance:
        Unbiased: the maximum is exact, and so are the marginals and draws of the exponential
        family, whose law is not that of perturbed maxima.

    Cost:
        O(n^2 log n) per datum, one after the other, on the CPU. The marginals take O(n^3), a draw
        O(n^3) too, of all data at once, on the device of theta.

    Example:
        >>> import jax.numpy as jnp
        >>> theta = jnp.array([[0.0, 3.0, 1.0], [3.0, 0.0, 2.0], [1.0, 2.0, 0.0]])
        >>> spanning_tree()(theta)
        Array([[0., 1., 0.],
               [1., 0., 1.],
               [0., 1., 0.]], dtype=float32)

    References:
        Kruskal, On the shortest spanning subtree of a graph and the traveling salesman problem,
        1956.
    """
    solver = numpy_solver(_spanning_tree, event_dim=2)
    return solver._replace(
        solve=partial(_solve_tree, solver.solve), marginals=_tree_marginals, draw=_draw_tree
    )


def assignment() -> Solver:
    """Solver whose state is the matching of rows to columns of the largest total weight.

    Returns:
        The solver, of theta ``[*batch, n, m]``; min(n, m) pairs are marked, each row and each
        column at most once.

    Bias and variance:
        Unbiased: the maximum is exact.

    Cost:
        O(n^3) per datum, one after the other, on the CPU.

    Example:
        >>> import jax.numpy as jnp
        >>> assignment()(jnp.array([[5.0, 4.0], [4.0, 1.0]]))
        Array([[0., 1.],
               [1., 0.]], dtype=float32)

    References:
        Crouse, On implementing 2D rectangular assignment algorithms, 2016.
    """
    return numpy_solver(_assignment, event_dim=2)


def shortest_path() -> Solver:
    """Solver whose state marks the cheapest path across a grid, from first to last cell.

    Steps lead to any of the eight neighbours, and every cell on the path is paid for.

    Returns:
        The solver, of theta ``[*batch, height, width]``, minus the cost of each cell. A cost below
        zero counts as zero: with negative ones no path is shortest.

    Bias and variance:
        Unbiased: the maximum is exact where no cost is negative.

    Cost:
        O(n log n) per datum of n cells, one after the other, on the CPU.

    Example:
        >>> import jax.numpy as jnp
        >>> shortest_path()(-jnp.array([[1.0, 9.0, 1.0], [1.0, 9.0, 9.0], [9.0, 1.0, 1.0]]))
        Array([[1., 0., 0.],
               [1., 0., 0.],
               [0., 1., 1.]], dtype=float32)

    References:
        Vlastelica, Paulus, Musil, Martius and Rolinek, `Differentiation of Blackbox Combinatorial
        Solvers <https://arxiv.org/abs/1912.02175>`_, 2020, section 4.
    """
    return numpy_solver(_shortest_path, event_dim=2)


# SciPy is imported where it is used: most who import this package solve none of these.


def _solve_tree(solve: Solve, theta: Array) -> Array:
    _check_square(theta)
    return solve(theta)


# In trees an edge's logit is the mean of its two entries; in <z, theta> it is their sum.


def _tree_marginals(theta: Array) -> Array:
    _check_square(theta)
    return trees.marginals(2 * theta)


def _draw_tree(key: Array, theta: Array) -> Array:
    _check_square(theta)
    return trees.draw(key, 2 * theta)


def _check_square(theta: Array) -> None:
    if theta.shape[-1] != theta.shape[-2]:
        raise ValueError(
            f"spanning_tree needs theta of shape [*batch, n, n], a weight for each pair of nodes, "
            f"got {tuple(theta.shape)}."
        )


def _spanning_tree(theta: np.ndarray) -> np.ndarray:
    from scipy.sparse.csgraph import minimum_spanning_tree

    weights = (theta + theta.T).astype(np.float64)
    # SciPy takes a zero for a missing edge, so all costs are made positive.
    costs = np.triu(1.0 + weights.max(initial=0.0) - weights, k=1)
    marked = minimum_spanning_tree(costs).toarray() != 0
    return marked | marked.T


def _assignment(theta: np.ndarray) -> np.ndarray:
    from scipy.optimize import linear_sum_assignment

    state = np.zeros_like(theta)
    state[linear_sum_assignment(theta, maximize=True)] = 1
    return state


def _shortest_path(theta: np.ndarray) -> np.ndarray:
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import dijkstra

    sources, targets = _grid_edges(*theta.shape)
    # SciPy keeps the zeros of a sparse matrix that are stored in it: such edges cost nothing.
    costs = np.maximum(-theta, 0.0).astype(np.float64).ravel()
    graph = csr_array((costs[targets], (sources, targets)), shape=(theta.size, theta.size))
    _, predecessors = dijkstra(graph, indices=0, return_predecessors=True)
    state = np.zeros(theta.size)
    cell = theta.size - 1
    while cell >= 0:
        state[cell] = 1
        cell = predecessors[cell]
    return state.reshape(theta.shape)


@cache
def _grid_edges(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of neighbouring cells, each in both directions, by their flat indices."""
    cells = np.arange(height * width).reshape(height, width)
    pairs = [
        (cells[:-1, :], cells[1:, :]),
        (cells[:, :-1], cells[:, 1:]),
        (cells[:-1, :-1], cells[1:, 1:]),
        (cells[1:, :-1], cells[:-1, 1:]),
    ]
    one, other = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1))
    return np.concatenate([one, other]), np.concatenate([other, one])
