"""What a tensor was computed from."""

from torch import Tensor


def graph_leaves(tensor: Tensor) -> list[Tensor]:
    """The leaves that a tensor was computed from and that require a gradient."""
    leaves, seen, stack = [], set(), [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(function for function, _ in node.next_functions)
            if hasattr(node, "variable"):
                leaves.append(node.variable)
    return leaves
