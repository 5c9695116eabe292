"""Subsets of fixed size, as an exponential family."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro.distributions import constraints
from numpyro.distributions.kl import kl_divergence
from numpyro.util import is_prng_key

from numpyro_gradest.distributions._from_logits import LinearFamily, real_array
from numpyro_gradest.distributions._states import k_hot_vectors
from numpyro_gradest.distributions._supports import KHot
from numpyro_gradest.distributions._validation import check_subset_size
from numpyro_gradest.estimators.discrete import subsets


class KSubset(LinearFamily):
    r"""Subsets of k of n items, a subset's probability proportional to the product of its weights.

    .. math:: p(z) = \exp(\langle z, \theta \rangle - \log Z), \qquad
        z \in \{0, 1\}^n, \; \textstyle\sum_i z_i = k

    This is the law of independent Bernoulli draws given that k of them are one. It differs from
    that of k draws without replacement, which is :class:`PlackettLuceSubset`. The log-probability
    is linear in the value: its gradient there, :math:`\theta`, can be sent on by estimators of
    gradients through discrete states. Mean, variance, entropy and the KL divergence between two of
    equal k are exact.

    Args:
        logits: Scores :math:`\theta`, shape ``[*batch, n]``. A common constant has no effect.
        k: Number of ones, from 0 to n.
        validate_args: As in the host.

    Raises:
        TypeError: If ``logits`` is not a floating array.
        ValueError: If ``logits`` is not finite, ``k`` not an integer from 0 to n, a value not of
            the logits' last axis, or, when enumerating, there are more than 100,000 subsets.

    Cost:
        O(n k) time and memory for the normaliser and the mean, and for a draw, in log n steps.
        Second derivatives are had in reverse mode only: ``jax.jacrev(jax.jacrev(...))``, where
        ``jax.hessian`` raises.

    Example:
        >>> import jax.numpy as jnp
        >>> site = KSubset(jnp.array([0.0, 0.0, 0.0, 1.0]), k=2)
        >>> site.log_prob(jnp.array([1.0, 0.0, 0.0, 1.0]))
        Array(-1.41187..., dtype=float32)
        >>> site.mean
        Array([0.42298..., 0.42298..., 0.42298..., 0.7310...], dtype=float32)

    References:
        Chen, Dempster and Liu, Weighted finite population sampling to maximize entropy, 1994.
    """

    arg_constraints: dict[str, Any] = {"logits": real_array(1)}  # noqa: RUF012

    pytree_aux_fields = ("k",)

    def __init__(self, logits: Array, k: int, *, validate_args: bool | None = None) -> None:
        self.k = k
        super().__init__(logits, 1, validate_args)
        check_subset_size(k, jnp.shape(logits), caller="KSubset")

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> Any:
        return KHot(self.k)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        assert is_prng_key(key)
        return subsets.draw(key, self.logits, self.k, tuple(sample_shape))

    def _log_partition(self) -> Array:
        return subsets.log_partition(self.logits, self.k)

    def _marginals(self) -> Array:
        return subsets.marginals(self.logits, self.k)

    def _states(self) -> np.ndarray:
        caller = f"KSubset of {self.k} of {self.event_shape[0]} items"
        return k_hot_vectors(self.event_shape[0], self.k, caller=caller)


kl_divergence.register(KSubset, KSubset)(LinearFamily.kl_divergence)
