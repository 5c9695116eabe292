"""Subsets of items taken one after the other."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array
from numpyro.distributions import constraints
from numpyro.distributions.util import validate_sample
from numpyro.util import is_prng_key

from numpyro_gradest.distributions._from_logits import FromLogits, real_array
from numpyro_gradest.distributions._states import k_hot_vectors
from numpyro_gradest.distributions._supports import KHot
from numpyro_gradest.distributions._validation import check_subset_size
from numpyro_gradest.estimators.discrete import plackett_luce


class PlackettLuceSubset(FromLogits):
    r"""Subsets of k of n items, taken one after the other without replacement.

    This is the law of the k largest entries of logits with Gumbel noise, which
    ``perturb_and_map`` draws with the solver ``top_k(k)``. It differs from :class:`KSubset`. With
    weights :math:`w = e^\theta` and their sum W over the items that are not in the subset S,

    .. math:: p(S) = \int_0^1 \prod_{i \in S} (1 - u^{w_i / W}) \, du,

    which is computed in logarithms by a sum over 192 points, laid where the integrand is not
    negligible: to rounding error also for weights of very different size. For k of 0, 1 and n there
    is a closed form. The log-probability has a gradient in the logits, but, save for k = 1, none in
    the value, of which it is no linear function: to differentiate there, as for the prior of a site
    under ``imle``, is an error.

    Args:
        logits: Scores :math:`\theta`, shape ``[*batch, n]``. A common constant has no effect.
        k: Number of ones, from 0 to n.
        validate_args: As in the host.

    Raises:
        TypeError: If ``logits`` is not a floating array.
        ValueError: If ``logits`` is not finite, ``k`` not an integer from 0 to n, a value not of
            the logits' last axis, or, when enumerating, there are more than 100,000 subsets;
            or if the log-probability is differentiated in the value.

    Cost:
        O(n + 250 k) for a log-probability; a partial sort for a draw.

    Example:
        >>> import jax.numpy as jnp
        >>> site = PlackettLuceSubset(jnp.array([0.0, 0.0, 0.0, 1.0]), k=2)
        >>> site.log_prob(jnp.array([1.0, 0.0, 0.0, 1.0]))
        Array(-1.350..., dtype=float32)

    References:
        Kool, van Hoof and Welling, `Estimating Gradients for Discrete Random Variables by Sampling
        without Replacement <https://arxiv.org/abs/2002.06043>`_, 2020, appendix B.
    """

    arg_constraints: dict[str, Any] = {"logits": real_array(1)}  # noqa: RUF012
    pytree_aux_fields = ("k",)

    def __init__(self, logits: Array, k: int, *, validate_args: bool | None = None) -> None:
        self.k = k
        super().__init__(logits, 1, validate_args)
        check_subset_size(k, jnp.shape(logits), caller="PlackettLuceSubset")

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> Any:
        return KHot(self.k)

    @validate_sample
    def log_prob(self, value: ArrayLike) -> Array:
        self._check_value(value)
        shape = jnp.broadcast_shapes(jnp.shape(value), self.logits.shape)
        if 1 < self.k < self.event_shape[0]:
            value = _refuse_gradient(jnp.asarray(value))
        subset = jnp.broadcast_to(jnp.asarray(value).astype(self.logits.dtype), shape)
        logits = jnp.broadcast_to(self.logits, shape)
        return plackett_luce.subset_log_prob(logits, subset, self.k)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        assert is_prng_key(key)
        logits = jnp.broadcast_to(self.logits, self.shape(tuple(sample_shape)))
        return plackett_luce.draw_subset(key, logits, self.k)

    def _states(self) -> np.ndarray:
        caller = f"PlackettLuceSubset of {self.k} of {self.event_shape[0]} items"
        return k_hot_vectors(self.event_shape[0], self.k, caller=caller)


@jax.custom_jvp
def _refuse_gradient(value: Array) -> Array:
    return value


@_refuse_gradient.defjvp
def _raise(primals: Any, tangents: Any) -> Any:
    raise ValueError(_NO_GRADIENT)


_NO_GRADIENT = (
    "PlackettLuceSubset.log_prob has no gradient in the value, but the value carries one, as at a "
    "site under imle: this prior would count for nothing. Sample KSubset in model and guide, or, "
    "under TraceMeanField_ELBO, PerturbAndMAP(logits, top_k(k)) in both."
)
