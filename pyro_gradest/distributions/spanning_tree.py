"""Spanning trees, as an exponential family."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import register_kl

from pyro_gradest.distributions._from_logits import (
    _NO_SHAPE,
    LinearFamily,
    real_array,
)
from pyro_gradest.distributions._states import spanning_trees
from pyro_gradest.distributions._supports import SpanningTreeAdjacency
from pyro_gradest.estimators.discrete import trees
from pyro_gradest.estimators.discrete._validation import is_false


class SpanningTree(LinearFamily):
    r"""Spanning trees of n nodes, a tree's probability proportional to the product of its weights.

    .. math:: p(z) = \exp\big( \textstyle\sum_{i < j} z_{ij} \theta_{ij} - \log Z \big)

    A value is the symmetric adjacency matrix, of zeros and ones, in which each edge stands twice,
    as its logit does. The log-probability is linear in it: half of
    :math:`\langle z, \theta \rangle` over whole matrices, so that an edge's two entries together
    have the gradient :math:`\theta_{ij}`. Mean (the probabilities of the edges), variance, entropy
    and KL divergence are exact. The law of heaviest trees of perturbed logits, as from the solver
    ``spanning_tree()``, is another one.

    Pyro's own ``SpanningTree`` has values of n - 1 sorted pairs of nodes, no batches, and draws by
    a few steps of a Markov chain. Here draws are exact, in a fixed number of steps whatever the
    logits, any number of them at once, and the gradient in the value is there.

    Args:
        logits: Scores :math:`\theta` of the edges, symmetric, shape ``[*batch, n, n]``. The
            diagonal has no effect, nor has a common constant. Exclude an edge by a large negative
            number.
        validate_args: As in the host.

    Raises:
        TypeError: If ``logits`` is not a floating tensor.
        ValueError: If ``logits`` is not square, symmetric and finite, a value not of its shape,
            or, when enumerating, there are more than 100,000 trees, which is so for n > 7.

    Cost:
        O(n^3) for the normaliser, the mean, and what draws share; O(n^2 log n) for a draw; each in
        n steps.

    Example:
        >>> import torch
        >>> site = SpanningTree(torch.tensor([[0.0, 2.0, 1.0], [2.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
        >>> site.log_prob(torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
        tensor(-0.4076)
        >>> site.mean[0]
        tensor([0.0000, 0.9100, 0.7553])

    References:
        Durfee, Kyng, Peebles, Rao and Sachdeva, `Sampling Random Spanning Trees Faster than Matrix
        Multiplication <https://arxiv.org/abs/1611.07451>`_, 2017, who draw by elimination of nodes.
    """

    arg_constraints: dict[str, Any] = {"logits": real_array(2)}  # noqa: RUF012
    support = SpanningTreeAdjacency()
    _scale = 0.5

    def __init__(self, logits: Tensor, *, validate_args: bool | None = None) -> None:
        super().__init__(logits, 2, validate_args)
        gap = (logits - logits.mT).detach().abs()
        # As far apart as training, which rounds, may bring them.
        if self._validate_args and is_false((gap <= 1e-4 * (1 + logits.detach().abs())).all()):
            raise ValueError(
                "SpanningTree needs symmetric logits, those of an edge at (i, j) and (j, i), got "
                f"entries that differ by {gap.max():.3g}. Pass (logits + logits.mT) / 2."
            )

    def sample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        with torch.no_grad():
            return trees.draw(self.logits, None, tuple(sample_shape))

    def _compute_log_partition(self) -> Tensor:
        return trees.log_partition(self.logits)

    def _marginals(self) -> Tensor:
        return trees.marginals(self.logits)

    def _states(self) -> np.ndarray:
        num_nodes = self.event_shape[0]
        return spanning_trees(num_nodes, caller=f"SpanningTree of {num_nodes} nodes")


register_kl(SpanningTree, SpanningTree)(LinearFamily.kl_divergence)
