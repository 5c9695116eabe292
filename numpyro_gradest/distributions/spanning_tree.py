"""Spanning trees, as an exponential family."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro.distributions.kl import kl_divergence
from numpyro.util import is_prng_key

from numpyro_gradest.distributions._from_logits import LinearFamily, real_array
from numpyro_gradest.distributions._states import spanning_trees
from numpyro_gradest.distributions._supports import SpanningTreeAdjacency
from numpyro_gradest.estimators.discrete import trees
from numpyro_gradest.estimators.discrete._validation import is_false


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
        TypeError: If ``logits`` is not a floating array.
        ValueError: If ``logits`` is not square, symmetric and finite, a value not of its shape,
            or, when enumerating, there are more than 100,000 trees, which is so for n > 7.

    Cost:
        O(n^3) for the normaliser, the mean, and what draws share; O(n^2 log n) for a draw; each in
        n steps.

    Example:
        >>> import jax.numpy as jnp
        >>> site = SpanningTree(jnp.array([[0.0, 2.0, 1.0], [2.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
        >>> site.log_prob(jnp.array([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
        Array(-0.40760..., dtype=float32)
        >>> site.mean[0]
        Array([0.   ..., 0.9099..., 0.7552...], dtype=float32)

    References:
        Durfee, Kyng, Peebles, Rao and Sachdeva, `Sampling Random Spanning Trees Faster than Matrix
        Multiplication <https://arxiv.org/abs/1611.07451>`_, 2017, who draw by elimination of nodes.
    """

    arg_constraints: dict[str, Any] = {"logits": real_array(2)}  # noqa: RUF012
    support = SpanningTreeAdjacency()
    _scale = 0.5

    def __init__(self, logits: Array, *, validate_args: bool | None = None) -> None:
        super().__init__(logits, 2, validate_args)
        gap = jnp.abs(self.logits - self.logits.mT)
        # As far apart as training, which rounds, may bring them.
        if self._validate_args and is_false(jnp.all(gap <= 1e-4 * (1 + jnp.abs(self.logits)))):
            raise ValueError(
                "SpanningTree needs symmetric logits, those of an edge at (i, j) and (j, i), got "
                f"entries that differ by {gap.max():.3g}. Pass (logits + logits.mT) / 2."
            )

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        assert is_prng_key(key)
        return trees.draw(key, self.logits, tuple(sample_shape))

    def _log_partition(self) -> Array:
        return trees.log_partition(self.logits)

    def _marginals(self) -> Array:
        return trees.marginals(self.logits)

    def _states(self) -> np.ndarray:
        num_nodes = self.event_shape[0]
        return spanning_trees(num_nodes, caller=f"SpanningTree of {num_nodes} nodes")


kl_divergence.register(SpanningTree, SpanningTree)(LinearFamily.kl_divergence)
