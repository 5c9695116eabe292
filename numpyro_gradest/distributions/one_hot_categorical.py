"""One-hot categorical whose log-probability can be differentiated in the value."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike
from numpyro.distributions import Distribution, constraints, kl_divergence
from numpyro.distributions.util import validate_sample

from numpyro_gradest.distributions._supports import KHot
from numpyro_gradest.estimators import one_hot_argmax


class OneHotCategorical(Distribution):
    r"""Categorical distribution of one-hot vectors, with a log-probability linear in the value.

    .. math:: \log p(z) = \sum_i z_i \log p_i

    Use it for discrete sites that carry a gradient, in model and guide alike. A log-probability
    that looks up the index of the one has no gradient in the value, and the model's prior would
    silently count for nothing.

    Args:
        probs: Probabilities, shape ``[*batch, n]``, to be normalised.
        logits: Instead of ``probs``, their logarithms up to a constant.
        validate_args: As in the host.

    Raises:
        ValueError: If not exactly one of ``probs`` and ``logits`` is given.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> site = OneHotCategorical(logits=jnp.zeros(2))
        >>> jax.grad(site.log_prob)(jnp.array([0.0, 1.0]))
        Array([-0.6931472, -0.6931472], dtype=float32)

    References:
        Liu, Dong, Liu, Yu and Gao, `Bridging Discrete and Backpropagation: Straight-Through and
        Beyond <https://arxiv.org/abs/2304.08612>`_, 2023.
    """

    arg_constraints = {"logits": constraints.real_vector}  # noqa: RUF012
    support = KHot(1)
    has_enumerate_support = True
    pytree_data_fields = ("logits",)

    def __init__(
        self,
        probs: Array | None = None,
        logits: Array | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        if (probs is None) == (logits is None):
            raise ValueError("OneHotCategorical needs either probs or logits, not both or neither.")
        scores = jnp.log(jnp.asarray(probs)) if logits is None else jnp.asarray(logits)
        # 0 * -inf is nan: an impossible class has a log-probability that is only very small.
        self.logits = jnp.maximum(jax.nn.log_softmax(scores, axis=-1), -1e30)
        shape = self.logits.shape
        super().__init__(shape[:-1], shape[-1:], validate_args=validate_args)

    @property
    def probs(self) -> Array:
        return jnp.exp(self.logits)

    @property
    def mean(self) -> Array:
        return self.probs

    @property
    def variance(self) -> Array:
        return self.probs * (1 - self.probs)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        logits = jnp.broadcast_to(self.logits, sample_shape + self.logits.shape)
        return one_hot_argmax().solve(logits + jax.random.gumbel(key, logits.shape, logits.dtype))

    def enumerate_support(self, expand: bool = True) -> Array:
        num_values = self.event_shape[0]
        values = jnp.eye(num_values, dtype=self.logits.dtype)
        values = values.reshape(num_values, *([1] * len(self.batch_shape)), num_values)
        shape = (num_values, *self.batch_shape, num_values)
        return jnp.broadcast_to(values, shape) if expand else values

    @validate_sample
    def log_prob(self, value: ArrayLike) -> Array:
        return jnp.sum(value * self.logits, axis=-1)

    def entropy(self) -> Array:
        return -jnp.sum(self.probs * self.logits, axis=-1)


@kl_divergence.register(OneHotCategorical, OneHotCategorical)
def _kl_of_one_hot(p: Any, q: Any) -> Array:
    return jnp.sum(p.probs * (p.logits - q.logits), axis=-1)
