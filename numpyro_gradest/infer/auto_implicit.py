"""A ready implicit guide: a network pushes noise to all latent sites at once.

Notation: u in R^D are the latents in unconstrained space, e the noise.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from jaxtyping import Array, Float
from numpyro import distributions as dist
from numpyro.infer import init_to_median
from numpyro.infer.autoguide import AutoContinuous

from numpyro_gradest.distributions import Implicit
from numpyro_gradest.estimators._validation import check_count


class AutoImplicit(AutoContinuous):
    r"""An :class:`Implicit` guide for all latent sites jointly, to be fitted by ``ImplicitELBO``.

    .. math:: u = m + W e + \mathrm{MLP}(e), \qquad e \sim \mathrm{Normal}(0, 1)

    in unconstrained space, split and constrained site by site as the host's autoguides do. The
    last layer of the network starts at zero and W as ``init_scale`` times the identity: the guide
    starts as a Gaussian of that width around the initial values, and bends from there.

    Draw from it with ``sample_posterior`` or ``Predictive``; it has no density, so no median in
    closed form and no importance weights.

    Args:
        model: NumPyro model, whose latent sites are all continuous and not subsampled.
        hidden: Widths of the network's hidden layers, which are tanh.
        num_noise: Dimension of e, at least D and by default D; more lets the guide have several
            modes without stretching one Gaussian over all of them.
        init_scale: Standard deviation of each u at the start.
        prefix: As in the host: what the names of the guide's parameters begin with.
        init_loc_fn: As in the host: where m starts.

    Raises:
        TypeError: If a size is no integer.
        ValueError: If a size or ``init_scale`` is not positive; at the first call also if
            ``num_noise`` is less than D, or a latent lies in a subsampled plate.

    Bias and variance:
        A family of distributions, not an estimator; its training is that of ``ImplicitELBO``,
        biased by design.

    Cost:
        One pass through the network per draw, and (num_noise + D) H + num_noise D + D + H
        parameters with one hidden layer of width H.

    Example:
        >>> import numpyro
        >>> import numpyro.distributions as dist
        >>> import optax
        >>> from jax import random
        >>> from numpyro.infer import SVI
        >>> from numpyro_gradest import ImplicitELBO
        >>> def model():
        ...     numpyro.sample("z", dist.Normal(3.0, 0.5))
        >>> guide = AutoImplicit(model, hidden=(16,))
        >>> svi = SVI(model, guide, optax.adam(0.02), loss=ImplicitELBO(num_particles=50))
        >>> params = svi.run(random.key(0), 300, progress_bar=False).params
        >>> draws = guide.sample_posterior(random.key(1), params, sample_shape=(1000,))["z"]
        >>> bool(abs(draws.mean() - 3.0) < 0.2 and abs(draws.std() - 0.5) < 0.1)
        True

    References:
        Li and Turner, `Gradient Estimators for Implicit Models
        <https://arxiv.org/abs/1705.07107>`_, 2018, section 2.
    """

    def __init__(
        self,
        model: Callable,
        *,
        hidden: tuple[int, ...] = (64,),
        num_noise: int | None = None,
        init_scale: float = 0.1,
        prefix: str = "auto",
        init_loc_fn: Callable = init_to_median,
    ) -> None:
        for width in hidden:
            check_count(width, "hidden", caller="AutoImplicit")
        if num_noise is not None:
            check_count(num_noise, "num_noise", caller="AutoImplicit")
        if not 0 < init_scale < math.inf:
            raise ValueError(f"AutoImplicit needs init_scale > 0, got {init_scale}.")
        self.hidden = hidden
        self.num_noise = num_noise
        self.init_scale = init_scale
        super().__init__(model, prefix=prefix, init_loc_fn=init_loc_fn)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        if self.num_noise is not None and self.num_noise < self.latent_dim:
            self.prototype_trace = None
            raise ValueError(
                f"AutoImplicit needs num_noise >= {self.latent_dim}, the number of latent "
                f"dimensions, got {self.num_noise}: from less noise the draws lie on a surface, "
                "whose entropy is -inf. Leave num_noise out, or raise it."
            )

    def _sample_latent(self, *args: Any, **kwargs: Any) -> Float[Array, " *sample D"]:
        shape = kwargs.pop("sample_shape", ())
        num_noise = self.latent_dim if self.num_noise is None else self.num_noise
        noise = numpyro.sample(
            f"_{self.prefix}_noise",
            dist.Normal(0.0, 1.0).expand((*shape, num_noise)).to_event(1),
            infer={"is_auxiliary": True},
        )
        latent = Implicit(self._push(noise), event_dim=1)
        infer = {"is_auxiliary": True, "joins": tuple(self._init_locs)}
        return numpyro.sample(f"_{self.prefix}_latent", latent, infer=infer)

    def _push(self, noise: Float[Array, " *sample E"]) -> Float[Array, " *sample D"]:
        num_noise, name = noise.shape[-1], f"{self.prefix}_{{}}".format
        loc = numpyro.param(name("loc"), self._init_latent)
        skip = numpyro.param(name("skip"), self.init_scale * jnp.eye(num_noise, self.latent_dim))
        layer, widths = noise, (num_noise, *self.hidden)
        for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            weight = numpyro.param(name(f"weight_{i}"), _initial_weight(inputs, outputs))
            bias = numpyro.param(name(f"bias_{i}"), jnp.zeros(outputs))
            layer = jnp.tanh(layer @ weight + bias)
        weight = numpyro.param(name("weight_last"), jnp.zeros((widths[-1], self.latent_dim)))
        return loc + noise @ skip + layer @ weight

    def get_base_dist(self) -> Any:
        return self._get_posterior()

    def _get_posterior(self) -> Any:
        raise NotImplementedError(_NO_DENSITY.format("posterior to evaluate"))

    def median(self, params: dict[str, Any]) -> Any:
        raise NotImplementedError(_NO_DENSITY.format("median in closed form"))

    def quantiles(self, params: dict[str, Any], quantiles: Any) -> Any:
        raise NotImplementedError(_NO_DENSITY.format("quantiles in closed form"))


_NO_DENSITY = (
    "AutoImplicit can only be sampled and has no {}. Take it of draws: "
    "guide.sample_posterior(key, params, sample_shape=(1000,))."
)


def _initial_weight(inputs: int, outputs: int) -> Callable[[Array], Array]:
    return lambda key: jax.random.normal(key, (inputs, outputs)) / math.sqrt(inputs)
