"""Thermodynamic variational objective: between the ELBO and the evidence without a tighter bound.

Notation: beta_j the left ends of the J intervals of [0, 1], lw_k = log p(x, z_k) - log q(z_k | x).
"""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from pyro_gradest.estimators import (
    moment_matching_partition,
    thermodynamic_bound,
    thermodynamic_learning_signal,
    thermodynamic_partition,
    thermodynamic_weights,
)
from pyro_gradest.estimators._validation import check_count
from pyro_gradest.estimators.multisample.thermodynamic import Partition, check_partition
from pyro_gradest.infer._site_estimators import THERMODYNAMIC
from pyro_gradest.infer._trace import Program
from pyro_gradest.infer.multisample_elbo import MultiSampleELBO


class TVO(MultiSampleELBO):
    r"""Thermodynamic variational objective, by the covariance form of its gradient.

    .. math::
        \mathrm{TVO} = \sum_{j=0}^{J-1} (\beta_{j+1} - \beta_j) \, E_{\pi_{\beta_j}}
        \Big[ \log \frac{p(x, z)}{q(z | x)} \Big], \qquad
        \pi_\beta \propto q(z | x)^{1 - \beta} \, p(x, z)^\beta

    a lower bound of the evidence for any partition, maximised over model and guide. The
    expectations weigh the K particles. No gradient passes through the values of latent sites:
    reparameterised and discrete sites are treated alike, and a covariance takes the place of the
    score function's learning signal. There is one bound for each element of the plates common to
    all sites.

    Args:
        num_particles: K, the number of particles, at least 2.
        partition: ``"log-uniform"`` or ``"linear"``; ``"adaptive"``, so that each interval has an
            equal share of what the integrand rises at the step's particles; or the left ends of
            the intervals, increasing from 0. They are those of ``thermodynamic_partition`` and
            ``moment_matching_partition``.
        num_partitions: J, the number of intervals; 1 is the ELBO. Only where ``partition`` is a
            word.
        num_replicates: Number of independent K-particle bounds to average.
        chunk_size: Run particles in chunks of this size: memory does not grow with
            ``num_particles``, at two forward passes instead of one.
        **host_options: The arguments of the host's :class:`~pyro.infer.elbo.ELBO`:
            ``max_plate_nesting``, ``vectorize_particles``, ``strict_enumeration_warning``,
            ``retain_graph``, ``ignore_jit_warnings``, ``jit_options``, ``tail_adaptive_beta``.

    Raises:
        TypeError: If a count is not an integer, or an option is unknown.
        ValueError: If ``num_particles < 2``, the partition is not increasing from 0 and below 1, or
            an option has a value that makes no sense; at the first evaluation, if model and guide
            do not match.

    Bias and variance:
        Asymptotically unbiased in K for the gradient of the thermodynamic objective; exactly so
        with one interval, which is the ELBO. It is not a gradient of the importance-weighted
        bound: do not rank it by signal-to-noise against those that are.

    Cost:
        K evaluations of model and guide, and O(J K) to combine them; ``"adaptive"`` 30 times that
        for its partition.

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
        >>> loss = TVO(num_particles=10, vectorize_particles=True)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=loss)
        >>> x = torch.tensor([-0.5, 0.2, 2.9, 3.3])
        >>> losses = [svi.step(x) for _ in range(100)]
        >>> bool(pyro.param("slope") > 0.1)
        True

    References:
        Masrani, Le and Wood, `The Thermodynamic Variational Objective
        <https://arxiv.org/abs/1907.00031>`_, 2019. Brekelmans, Masrani, Wood, Ver Steeg and
        Galstyan, `All in the Exponential Family: Bregman Duality in Thermodynamic Variational
        Inference <https://arxiv.org/abs/2007.00642>`_, 2020, for the adaptive partition.
    """

    _least_particles = 2
    _reparams = ("score",)

    def __init__(
        self,
        num_particles: int,
        *,
        partition: str | Sequence[float] = "log-uniform",
        num_partitions: int = 5,
        num_replicates: int = 1,
        chunk_size: int | None = None,
        **host_options: Any,
    ) -> None:
        super().__init__(
            num_particles,
            reparam="score",
            alpha=0.0,
            num_replicates=num_replicates,
            chunk_size=chunk_size,
            **host_options,
        )
        check_count(num_partitions, "num_partitions", caller="TVO")
        if not isinstance(partition, str):
            check_partition("TVO", partition)
        elif partition not in ("log-uniform", "linear", "adaptive"):
            raise ValueError(
                'TVO needs partition="log-uniform", "linear", "adaptive" or the left ends of the '
                f"intervals, got {partition!r}."
            )
        elif partition != "adaptive":
            partition = thermodynamic_partition(num_partitions, schedule=partition)
        self.partition = partition
        self.num_partitions = num_partitions

    def _partition_at(self, log_weights: Float[Tensor, " K *batch"]) -> Partition:
        if isinstance(self.partition, str):
            return moment_matching_partition(log_weights, num_partitions=self.num_partitions)
        return self.partition

    def _bound(self, log_weights: Float[Tensor, " K *batch"]) -> Float[Tensor, " *batch"]:
        return thermodynamic_bound(log_weights, partition=self._partition_at(log_weights))

    def _weights(self, log_weights: Float[Tensor, " K *batch"]) -> Float[Tensor, " K *batch"]:
        return thermodynamic_weights(log_weights, partition=self._partition_at(log_weights))

    @property
    def _signal_target(self) -> str:
        return THERMODYNAMIC

    def _learning_signal(
        self,
        program: Program,
        log_weights: Float[Tensor, " K *batch"],
        auxiliary_log_weights: Float[Tensor, " S *batch"] | None,
    ) -> Float[Tensor, " K *batch"]:
        return thermodynamic_learning_signal(log_weights, partition=self._partition_at(log_weights))
