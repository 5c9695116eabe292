"""All values of a discrete distribution, as NumPy arrays, where there are not too many."""

import math
from itertools import combinations, permutations

import numpy as np

_MOST = 100_000


def k_hot_vectors(num_items: int, k: int, *, caller: str) -> np.ndarray:
    """All vectors of ``num_items`` zeros and ones with ``k`` ones, ``[values, num_items]``."""
    _check_number(math.comb(num_items, k), caller)
    places = np.array(list(combinations(range(num_items), k)), dtype=int)
    values = np.zeros((len(places), num_items))
    np.put_along_axis(values, places, 1.0, axis=1)
    return values


def rankings(num_items: int, *, caller: str) -> np.ndarray:
    """All orders of the items, ``[values, num_items]``."""
    _check_number(math.factorial(num_items), caller)
    return np.array(list(permutations(range(num_items))))


def spanning_trees(num_nodes: int, *, caller: str) -> np.ndarray:
    """Adjacency matrices of all trees on the nodes, ``[values, num_nodes, num_nodes]``."""
    # Each sequence of n - 2 nodes is the code of Prüfer of one tree.
    length = max(num_nodes - 2, 0)
    number = num_nodes**length
    _check_number(number, caller)
    codes = np.arange(number)[:, None] // num_nodes ** np.arange(length) % num_nodes
    values, rows = np.zeros((number, num_nodes, num_nodes)), np.arange(number)
    # A node is in the code once less than it has neighbours.
    missing = 1 + (codes[:, :, None] == np.arange(num_nodes)).sum(axis=1)
    for step in range(num_nodes - 1):
        leaf = np.argmax(missing == 1, axis=1)
        missing[rows, leaf] = 0
        # After the code's end, two nodes are left and joined.
        other = codes[:, step] if step < length else np.argmax(missing == 1, axis=1)
        missing[rows, other] -= 1
        values[rows, leaf, other] = values[rows, other, leaf] = 1.0
    return values


def _check_number(number: int, caller: str) -> None:
    if number > _MOST:
        raise ValueError(
            f"{caller} has {number:,} values, more than the {_MOST:,} that it enumerates. Sample "
            "the site instead, with a loss such as VIMCO(num_particles=...)."
        )
