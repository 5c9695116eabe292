"""DisARM: antithetic pairs of particles for guides with Bernoulli sites.

Notation: L the K-sample bound, b and b~ the two draws of a pair, alpha their log-odds.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_gradest.estimators import disarm_learning_signal
from pyro_gradest.infer._trace import Program
from pyro_gradest.infer.multisample_elbo import Coefficients, MultiSampleELBO


class DisARM(MultiSampleELBO):
    r"""Importance-weighted bound with antithetic pairs of draws at Bernoulli sites.

    .. math:: \sum_{k=1}^K a_k \, (b_k - \tilde b_k) \, \sigma(|\alpha|) \, \nabla \alpha

    Each particle is drawn twice, :math:`b_k` and :math:`\tilde b_k`, as different from each other
    as such draws can be, and the learning signal
    (:func:`~pyro_gradest.estimators.disarm_learning_signal`) is what the bound gains from the
    one over the other. The loss is the average of the bounds of K draws and of their K partners.
    ``DisARM(1)`` is for the ELBO, where global latents and mini-batches go together.

    Guide sites are Bernoulli, or reparameterised, which get the pathwise gradient. The log-odds of
    Bernoulli sites may depend on reparameterised sites, but not on other discrete ones.

    Args:
        num_particles: K, the number of antithetic pairs, and of particles in the bound.
        num_replicates: Number of independent estimates to average.
        chunk_size: Run pairs in chunks of this size: memory does not grow with
            ``num_particles``, at two forward passes instead of one.
        **host_options: The arguments of the host's :class:`~pyro.infer.elbo.ELBO`:
            ``max_plate_nesting``, ``vectorize_particles``, ``strict_enumeration_warning``,
            ``retain_graph``, ``ignore_jit_warnings``, ``jit_options``, ``tail_adaptive_beta``.

    Raises:
        TypeError: If a count is not an integer, or an option is unknown.
        ValueError: If a count is not positive; at the first evaluation, if model and guide do not
            match, the guide has no Bernoulli site, or a discrete site that is not Bernoulli or
            depends on another; what depends on another is looked for at each evaluation while the
            host's validation is enabled.

    Bias and variance:
        Unbiased for the gradient of the K-sample bound. For one bit and one pair the variance is
        below that of ``RLOO(2)``, which costs the same. The gradient of the guide vanishes where it
        is the posterior.

    Cost:
        2 K evaluations of model and guide, and O(K) to combine them.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro.infer import SVI
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Bernoulli(0.3))
        ...         pyro.sample("x", dist.Normal(3 * z, 1.0), obs=x)
        >>> def guide(x):
        ...     slope = pyro.param("slope", torch.tensor(0.1))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Bernoulli(logits=slope * x))
        >>> loss = DisARM(num_particles=1)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=loss)
        >>> x = torch.tensor([-0.5, 0.2, 2.9, 3.3])
        >>> losses = [svi.step(x) for _ in range(100)]
        >>> bool(pyro.param("slope") > 0.1)
        True

    References:
        Dong, Mnih and Tucker, `DisARM: An Antithetic Gradient Estimator for Binary Latent Variables
        <https://arxiv.org/abs/2006.10680>`_, 2020. Yin, Ho, Yan, Qian and Zhou, `Probabilistic Best
        Subset Selection via Gradient-Based Optimization <https://arxiv.org/abs/2006.06448>`_, 2020,
        found the estimator for the ELBO independently.
    """

    _reparams = ("pathwise",)
    _is_antithetic = True
    _signal_target = None  # sites take no learning signals of their own

    def __init__(
        self,
        num_particles: int,
        *,
        num_replicates: int = 1,
        chunk_size: int | None = None,
        **host_options: Any,
    ) -> None:
        super().__init__(
            num_particles,
            reparam="pathwise",
            alpha=0.0,
            num_replicates=num_replicates,
            chunk_size=chunk_size,
            **host_options,
        )

    def _learning_signal(
        self,
        program: Program,
        log_weights: Float[Tensor, " K replicates pair *batch"],
        auxiliary_log_weights: Float[Tensor, " S *batch"] | None,
    ) -> Float[Tensor, " K replicates pair *batch"]:
        weights = self._weights(log_weights)
        # The score has mean zero: less its share nothing is left for one particle, or at equal
        # weights.
        return weights.mean(dim=0) - weights

    def _coefficients(
        self,
        program: Program,
        log_weights: Float[Tensor, " K replicates pair *batch"],
        auxiliary_log_weights: Float[Tensor, " S *batch"] | None,
    ) -> Coefficients:
        signal = disarm_learning_signal(log_weights[:, :, 0], log_weights[:, :, 1])
        return (
            super()
            ._coefficients(program, log_weights, auxiliary_log_weights)
            ._replace(antithetic_signal=torch.stack([signal, -signal], dim=2))
        )
