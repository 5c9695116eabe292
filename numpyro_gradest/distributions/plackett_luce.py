"""Rankings: the order of items taken one after the other."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array
from numpyro.distributions.util import validate_sample
from numpyro.util import is_prng_key

from numpyro_gradest.distributions._from_logits import FromLogits, real_array
from numpyro_gradest.distributions._states import rankings
from numpyro_gradest.distributions._supports import Permutation
from numpyro_gradest.estimators.discrete import plackett_luce


class PlackettLuce(FromLogits):
    r"""Rankings of n items, taken one after the other with weights exp logits among those left.

    .. math:: p(\sigma) = \prod_{r=1}^n
        \frac{e^{\theta_{\sigma(r)}}}{\sum_{s \ge r} e^{\theta_{\sigma(s)}}}

    A value is the integers 0 to n - 1 in their order, the best item first, so that
    ``value[..., 0]`` is the winner. As the value of a categorical site does, it indexes, and no
    gradient passes through it. The state of the solver ``ranking()`` is its inverse: each item's
    number of worse items, which is ``n - 1 - value.argsort(-1)``.

    Args:
        logits: Scores :math:`\theta`, shape ``[*batch, n]``. A common constant has no effect.
        validate_args: As in the host.

    Raises:
        TypeError: If ``logits`` is not a floating array.
        ValueError: If ``logits`` is not finite, a value not of the logits' last axis, or, when
            enumerating, there are more than 100,000 rankings, which is so for n > 8.

    Cost:
        O(n) for a log-probability; a sort for a draw.

    Example:
        >>> import jax.numpy as jnp
        >>> site = PlackettLuce(jnp.array([0.0, 2.0, 1.0]))
        >>> site.log_prob(jnp.array([1, 2, 0]))
        Array(-0.7208..., dtype=float32)

    References:
        Plackett, The Analysis of Permutations, 1975.
    """

    arg_constraints: dict[str, Any] = {"logits": real_array(1)}  # noqa: RUF012
    support = Permutation()

    def __init__(self, logits: Array, *, validate_args: bool | None = None) -> None:
        super().__init__(logits, 1, validate_args)

    @validate_sample
    def log_prob(self, value: ArrayLike) -> Array:
        self._check_value(value)
        shape = jnp.broadcast_shapes(jnp.shape(value), self.logits.shape)
        ranking = jnp.broadcast_to(jnp.asarray(value).astype(int), shape)
        logits = jnp.broadcast_to(self.logits, shape)
        return plackett_luce.ranking_log_prob(logits, ranking)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        assert is_prng_key(key)
        logits = jnp.broadcast_to(self.logits, self.shape(tuple(sample_shape)))
        return plackett_luce.draw_ranking(key, logits)

    def _states(self) -> np.ndarray:
        num_items = self.event_shape[0]
        return rankings(num_items, caller=f"PlackettLuce of {num_items} items")
