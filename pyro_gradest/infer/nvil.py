"""NVIL: the score function with learned, running and scaled baselines.

Notation: L the K-sample bound, v the self-normalised weights, C(x) the baseline, c and s^2 the
running mean and variance of L - C(x), h_k the gradient of log q(z_k | x).
"""

from collections.abc import Callable
from typing import Any

import pyro
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_gradest.estimators import (
    NVILState,
    initial_nvil_state,
    iwae_bound,
    nvil_learning_signal,
    update_nvil_state,
)
from pyro_gradest.infer._trace import Program, ShareSubsamples
from pyro_gradest.infer.multisample_elbo import MultiSampleELBO


class NVIL(MultiSampleELBO):
    r"""Importance-weighted bound with NVIL's baselines for the score function at discrete sites.

    .. math:: a_k = \frac{L - C(x) - c - v_k}{\max(1, s)}

    What the bound is expected to be is subtracted: by a baseline of the data, fitted to the bound
    by least squares, and by a running mean. What is left is brought to a unit scale.
    ``NVIL(1)`` is the method of the paper, for the ELBO.

    The moments live in the parameter store under ``name``, and the parameters of a baseline that is
    a module too: ``pyro.get_param_store().save`` saves both with those of model and guide. A step
    moves the baseline's parameters with the optimiser of :class:`~pyro.infer.svi.SVI`.

    Args:
        num_particles: K, the number of particles in the bound.
        baseline: C(x): a :class:`torch.nn.Module` or a function that is called with the arguments
            of model and guide, and returns one number for each element of the plates common to all
            sites. It may hold ``pyro.param`` and ``pyro.module`` statements, and plates.
        decay: Of the running moments, between 0 (the last step alone) and 1.
        normalize_variance: Whether to divide by max(1, s).
        name: Of the running moments, if there is more than one such loss.
        reparam: What guide sites with a reparameterised sampler get: ``"pathwise"``, ``"dreg"``,
            ``"stl"`` or ``"score"``, as in :class:`IWAE`; a site may choose for itself.
        num_replicates: Number of independent K-particle bounds to average.
        chunk_size: Run particles in chunks of this size: memory does not grow with
            ``num_particles``, at two forward passes instead of one.
        **host_options: The arguments of the host's :class:`~pyro.infer.elbo.ELBO`:
            ``max_plate_nesting``, ``vectorize_particles``, ``strict_enumeration_warning``,
            ``retain_graph``, ``ignore_jit_warnings``, ``jit_options``, ``tail_adaptive_beta``.

    Raises:
        TypeError: If a count is not an integer, the baseline is not callable, or an option is
            unknown.
        ValueError: If an option has a value that makes no sense; at the first evaluation, if model
            and guide do not match, or the baseline does not have the bound's shape.

    Bias and variance:
        Unbiased for the gradient of the K-sample bound, with that of the score-function sites over
        max(1, s); the moments are those of the steps before. The variance is that of what the
        baselines do not explain, and does not fall with K: prefer :class:`VIMCO` or :class:`OVIS`
        where there are several particles.

    Cost:
        K evaluations of model and guide, and two of the baseline.

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
        >>> def baseline(x):
        ...     return pyro.param("level", torch.tensor(0.0)) - (x - 1.5) ** 2 / 2
        >>> loss = NVIL(num_particles=1, baseline=baseline, vectorize_particles=True)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=loss)
        >>> x = torch.tensor([-0.5, 0.2, 2.9, 3.3])
        >>> losses = [svi.step(x) for _ in range(100)]
        >>> bool(pyro.param("slope") > 0.1)
        True

    References:
        Mnih and Gregor, `Neural Variational Inference and Learning in Belief Networks
        <https://arxiv.org/abs/1402.0030>`_, 2014, algorithm 1.
    """

    def __init__(
        self,
        num_particles: int,
        *,
        baseline: Callable | None = None,
        decay: float = 0.8,
        normalize_variance: bool = True,
        name: str = "nvil",
        reparam: str = "pathwise",
        num_replicates: int = 1,
        chunk_size: int | None = None,
        **host_options: Any,
    ) -> None:
        super().__init__(
            num_particles,
            reparam=reparam,
            alpha=0.0,
            num_replicates=num_replicates,
            chunk_size=chunk_size,
            **host_options,
        )
        if baseline is not None and not callable(baseline):
            raise TypeError(
                f"NVIL needs baseline as a function of the arguments of model and guide, got "
                f"{baseline!r}."
            )
        if not 0 <= decay < 1:
            raise ValueError(f"NVIL needs 0 <= decay < 1, got {decay}.")
        self.baseline = baseline
        self.decay = decay
        self.normalize_variance = normalize_variance
        self.name = name

    def _learning_signal(
        self,
        program: Program,
        log_weights: Float[Tensor, " K *batch"],
        auxiliary_log_weights: Float[Tensor, " S *batch"] | None,
    ) -> Float[Tensor, " K *batch"]:
        return nvil_learning_signal(
            log_weights,
            self._state(log_weights),
            baseline=self._baseline_at(program),
            normalize_variance=self.normalize_variance,
        )

    def _further_surrogate(
        self, program: Program, log_weights: Float[Tensor, " K *batch"]
    ) -> Float[Tensor, ""] | float:
        """Fits the baseline by least squares; and the moments move on, at the end of the step."""
        state, baseline = self._state(log_weights), self._baseline_at(program)
        new = update_nvil_state(state, log_weights, baseline=baseline, decay=self.decay)
        store = pyro.get_param_store()
        for field, value in new._asdict().items():
            store[f"{self.name}.{field}"] = value
        bound = iwae_bound(log_weights)
        error = (bound - state.mean - baseline).masked_fill(bound.isneginf(), 0.0)
        return -(error**2).sum() / (2 * self.num_replicates)

    def _state(self, log_weights: Float[Tensor, " K *batch"]) -> NVILState:
        store = pyro.get_param_store()
        start = initial_nvil_state()._asdict()
        fields = (
            store.setdefault(f"{self.name}.{field}", value.to(log_weights))
            for field, value in start.items()
        )
        return NVILState(*(field.detach() for field in fields))

    def _baseline_at(self, program: Program) -> Float[Tensor, " *broadcastable"]:
        if self.baseline is None:
            return torch.zeros(())
        baseline = self.baseline
        if isinstance(baseline, torch.nn.Module):
            baseline = pyro.module(f"{self.name}.baseline", baseline)
        with ShareSubsamples(program.subsamples):
            return torch.as_tensor(baseline(*program.args, **program.kwargs))
