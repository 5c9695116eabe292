"""A ready implicit guide: a network pushes noise to all latent sites at once.

Notation: u in R^D are the latents in unconstrained space, e the noise.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pyro
import torch
from jaxtyping import Float
from pyro import distributions as dist
from pyro.infer.autoguide import AutoContinuous, init_to_median
from torch import Tensor, nn

from pyro_gradest.distributions import Implicit
from pyro_gradest.estimators._validation import check_count


class AutoImplicit(AutoContinuous):
    r"""An :class:`Implicit` guide for all latent sites jointly, to be fitted by ``ImplicitELBO``.

    .. math:: u = m + W e + \mathrm{MLP}(e), \qquad e \sim \mathrm{Normal}(0, 1)

    in unconstrained space, split and constrained site by site as the host's autoguides do. The
    last layer of the network starts at zero and W as ``init_scale`` times the identity: the guide
    starts as a Gaussian of that width around the initial values, and bends from there.

    Draw from it by calling it or with ``Predictive``; it has no density, so no median in closed
    form and no importance weights.

    Args:
        model: Pyro model, whose latent sites are all continuous and not subsampled.
        hidden: Widths of the network's hidden layers, which are tanh.
        num_noise: Dimension of e, at least D and by default D; more lets the guide have several
            modes without stretching one Gaussian over all of them.
        init_scale: Standard deviation of each u at the start.
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
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyro.infer import SVI, Predictive
        >>> from pyro_gradest import ImplicitELBO
        >>> pyro.clear_param_store()
        >>> pyro.set_rng_seed(0)
        >>> def model():
        ...     pyro.sample("z", dist.Normal(3.0, 0.5))
        >>> guide = AutoImplicit(model, hidden=(16,))
        >>> loss = ImplicitELBO(num_particles=50, vectorize_particles=True)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), loss=loss)
        >>> losses = [svi.step() for _ in range(300)]
        >>> draws = Predictive(guide, num_samples=1000, parallel=True)()["z"]
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
        init_loc_fn: Callable = init_to_median,
    ) -> None:
        for width in hidden:
            check_count(width, "hidden", caller="AutoImplicit")
        if num_noise is not None:
            check_count(num_noise, "num_noise", caller="AutoImplicit")
        if not 0 < init_scale < math.inf:
            raise ValueError(f"AutoImplicit needs init_scale > 0, got {init_scale}.")
        super().__init__(model, init_loc_fn=init_loc_fn)
        self.hidden = hidden
        self.num_noise = num_noise
        self.init_scale = init_scale

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        try:
            self._check_prototype_plates()
            num_noise = self._check_num_noise()
        except ValueError:
            self.prototype_trace = None
            raise
        loc = self._init_loc()
        self.loc = nn.Parameter(loc)
        self.skip = nn.Parameter(self.init_scale * torch.eye(num_noise, self.latent_dim).to(loc))
        widths = (num_noise, *self.hidden)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            linear = nn.Linear(inputs, outputs).to(loc)
            nn.init.normal_(linear.weight, std=1 / math.sqrt(inputs))
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.Tanh()]
        last = nn.Linear(widths[-1], self.latent_dim, bias=False).to(loc)
        nn.init.zeros_(last.weight)
        self.network = nn.Sequential(*layers, last)

    def sample_latent(self, *args: Any, **kwargs: Any) -> Float[Tensor, " *batch D"]:
        fn = dist.Normal(torch.zeros_like(self.skip[:, 0]), 1.0).to_event(1)
        noise = pyro.sample(f"_{self._pyro_name}_noise", fn, infer={"is_auxiliary": True})
        latent = Implicit(self.loc + noise @ self.skip + self.network(noise), event_dim=1)
        infer: Any = {"is_auxiliary": True, "joins": tuple(self._unconstrained_shapes)}
        return pyro.sample(f"_{self._pyro_name}_latent", latent, infer=infer)

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(_NO_DENSITY.format("posterior to evaluate"))

    def _loc_scale(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(_NO_DENSITY.format("median or quantiles in closed form"))

    def _check_prototype_plates(self) -> None:
        for plate, frame in self._prototype_frames.items():
            if frame.full_size is not None and frame.size != frame.full_size:
                raise ValueError(
                    f"AutoImplicit has latents in plate {plate!r}, which is subsampled "
                    f"({frame.size} of {frame.full_size}), but it draws all latents jointly. Write "
                    "a guide that draws the noise of an Implicit site inside the plate."
                )

    def _check_num_noise(self) -> int:
        num_noise = self.latent_dim if self.num_noise is None else self.num_noise
        if num_noise < self.latent_dim:
            raise ValueError(
                f"AutoImplicit needs num_noise >= {self.latent_dim}, the number of latent "
                f"dimensions, got {num_noise}: from less noise the draws lie on a surface, whose "
                "entropy is -inf. Leave num_noise out, or raise it."
            )
        return num_noise


_NO_DENSITY = (
    "AutoImplicit can only be sampled and has no {}. Take it of draws: "
    "Predictive(guide, num_samples=1000)()."
)
