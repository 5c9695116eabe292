"""Importance-weighted bound with the plain score function.

Notation: v self-normalised weights, L the K-sample bound, h_k the gradient of log q(z_k | x).
"""

from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor

from pyro_gradest.estimators import renyi_learning_signal
from pyro_gradest.infer._trace import Program
from pyro_gradest.infer.multisample_elbo import MultiSampleELBO


class IWAE(MultiSampleELBO):
    r"""Importance-weighted bound: pathwise gradient, plain score function at discrete sites.

    .. math:: L = \log \frac1K \sum_{k=1}^K \frac{p(x, z_k)}{q(z_k | x)}, \qquad z_k \sim q

    Maximised over model and guide. There is one bound for each element of the plates common to all
    sites of model and guide; plate subsampling scales the bound, not the weights. Reparameterised
    sites get the pathwise gradient; the others :math:`\sum_k (L - v_k) h_k`, whose variance is
    large: prefer :class:`VIMCO` or :class:`OVIS` for guides with discrete sites. ``IWAE(1)`` is
    the ELBO.

    Args:
        num_particles: K, the number of particles in the bound.
        reparam: What guide sites with a reparameterised sampler get. ``"pathwise"`` differentiates
            through their values; ``"dreg"`` does so doubly reparameterised: the same expectation
            and a signal-to-noise ratio that does not fall with K; ``"stl"`` leaves the score of
            their density out, which is biased for K > 1; ``"score"`` takes the score function at
            every random site. A site may choose for itself, by ``infer={"estimator": ...}`` or
            ``configure_estimators``.
        alpha: Order of the variational Renyi bound, between 0 (the importance-weighted bound) and 1
            (the ELBO, averaged over the particles).
        num_replicates: Number of independent K-particle bounds to average: MIWAE.
        elbo_weight: Between 0 and 1: how much the ELBO counts beside the bound: CIWAE.
        pool_replicates: Whether the model climbs the one bound over the particles of all
            replicates, which is then the loss, while the guide climbs their average: PIWAE. A point
            mass in the guide counts as the model's.
        chunk_size: Run particles in chunks of this size: memory does not grow with
            ``num_particles``, at two forward passes instead of one.
        **host_options: The arguments of the host's :class:`~pyro.infer.elbo.ELBO`:
            ``max_plate_nesting``, ``vectorize_particles``, ``strict_enumeration_warning``,
            ``retain_graph``, ``ignore_jit_warnings``, ``jit_options``, ``tail_adaptive_beta``.

    Raises:
        TypeError: If a count is not an integer, or an option is unknown.
        ValueError: If an option has a value that makes no sense; at the first evaluation,
            if model and guide do not match.

    Bias and variance:
        Unbiased for the gradient of the K-sample bound, of any order alpha. The signal-to-noise
        ratio of the pathwise guide gradient falls, as 1/sqrt(K) in the limit of many particles;
        that of ``reparam="dreg"`` does not. Biased by design with ``reparam="stl"`` and K > 1.
        Under ``elbo_weight`` unbiased for the gradient of the mixture; under ``pool_replicates``
        unbiased for the model's gradient of its bound, and for the guide's of its own, which is
        looser.

    Cost:
        K evaluations of model and guide, and O(K) to combine them.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro.infer import SVI
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     slope = pyro.param("slope", torch.tensor(0.1))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(slope * x, 0.7))
        >>> loss = IWAE(num_particles=10, vectorize_particles=True)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=loss)
        >>> x = torch.tensor([-0.5, 0.2, 2.9, 3.3])
        >>> losses = [svi.step(x) for _ in range(100)]
        >>> bool(abs(pyro.param("slope") - 0.5) < 0.3)
        True

    References:
        Burda, Grosse and Salakhutdinov, `Importance Weighted Autoencoders
        <https://arxiv.org/abs/1509.00519>`_, 2016, equations 8 and 14. Rainforth, Kosiorek, Le,
        Maddison, Igl, Wood and Teh, `Tighter Variational Bounds are Not Necessarily Better
        <https://arxiv.org/abs/1802.04537>`_, 2018, section 5, for MIWAE, CIWAE and PIWAE.
    """

    def __init__(
        self,
        num_particles: int,
        *,
        reparam: str = "pathwise",
        alpha: float = 0.0,
        num_replicates: int = 1,
        elbo_weight: float = 0.0,
        pool_replicates: bool = False,
        chunk_size: int | None = None,
        **host_options: Any,
    ) -> None:
        super().__init__(
            num_particles,
            reparam=reparam,
            alpha=alpha,
            num_replicates=num_replicates,
            elbo_weight=elbo_weight,
            pool_replicates=pool_replicates,
            chunk_size=chunk_size,
            **host_options,
        )

    def _learning_signal(
        self,
        program: Program,
        log_weights: Float[Tensor, " K *batch"],
        auxiliary_log_weights: Float[Tensor, " S *batch"] | None,
    ) -> Float[Tensor, " K *batch"]:
        return self._mixed(partial(renyi_learning_signal, log_weights, control_variate="none"))
