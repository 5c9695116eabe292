"""VIMCO: the multi-sample objective for guides with discrete sites.

Notation: v self-normalised weights, L the K-sample bound, h_k the gradient of log q(z_k | x).
"""

from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor

from pyro_gradest.estimators import renyi_learning_signal
from pyro_gradest.infer._trace import Program
from pyro_gradest.infer.multisample_elbo import MultiSampleELBO


class VIMCO(MultiSampleELBO):
    r"""Importance-weighted bound with leave-one-out control variates at discrete sites.

    .. math:: L = \log \frac1K \sum_{k=1}^K \frac{p(x, z_k)}{q(z_k | x)}, \qquad z_k \sim q

    At sites without a reparameterised sampler, particle k is credited with L minus the bound in
    which its weight is replaced by a mean of the other weights
    (:func:`~pyro_gradest.estimators.vimco_learning_signal`). Reparameterised sites get the
    pathwise gradient, and mixed guides both.

    Args:
        num_particles: K, the number of particles in the bound, at least 2.
        leave_one_out: ``"geometric"`` (the paper's) or ``"arithmetic"``, the mean that stands for
            the particle left out.
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
        ValueError: If ``num_particles < 2`` or an option has a value that makes no sense; at the
            first evaluation, if model and guide do not match.

    Bias and variance:
        Unbiased for the gradient of the K-sample bound. The signal-to-noise ratio of the guide's
        gradient falls, as 1/sqrt(K) in the limit of many particles; that of :class:`OVIS` grows.

    Cost:
        K evaluations of model and guide, and O(K) to combine them.

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
        >>> loss = VIMCO(num_particles=10, vectorize_particles=True)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=loss)
        >>> x = torch.tensor([-0.5, 0.2, 2.9, 3.3])
        >>> losses = [svi.step(x) for _ in range(100)]
        >>> bool(pyro.param("slope") > 0.1)
        True

    References:
        Mnih and Rezende, `Variational Inference for Monte Carlo Objectives
        <https://arxiv.org/abs/1602.06725>`_, 2016, equations 10 to 12.
    """

    _least_particles = 2

    def __init__(
        self,
        num_particles: int,
        *,
        leave_one_out: str = "geometric",
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
        if leave_one_out not in ("geometric", "arithmetic"):
            raise ValueError(
                f'VIMCO needs leave_one_out="geometric" or "arithmetic", got {leave_one_out!r}.'
            )
        self.leave_one_out = leave_one_out

    def _learning_signal(
        self,
        program: Program,
        log_weights: Float[Tensor, " K *batch"],
        auxiliary_log_weights: Float[Tensor, " S *batch"] | None,
    ) -> Float[Tensor, " K *batch"]:
        control_variate = self.leave_one_out
        return self._mixed(
            partial(renyi_learning_signal, log_weights, control_variate=control_variate)
        )
