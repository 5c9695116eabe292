"""NVIL: the score function with learned, running and scaled baselines.

Notation: L the K-sample bound, v the self-normalised weights, C(x) the baseline, c and s^2 the
running mean and variance of L - C(x), h_k the gradient of log q(z_k | x).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro import handlers
from numpyro.primitives import mutable

from numpyro_gradest.estimators import (
    NVILState,
    initial_nvil_state,
    iwae_bound,
    nvil_learning_signal,
    update_nvil_state,
)
from numpyro_gradest.infer._trace import Program
from numpyro_gradest.infer.multisample_elbo import MultiSampleELBO


class NVIL(MultiSampleELBO):
    r"""Importance-weighted bound with NVIL's baselines for the score function at discrete sites.

    .. math:: a_k = \frac{L - C(x) - c - v_k}{\max(1, s)}

    What the bound is expected to be is subtracted: by a baseline of the data, fitted to the bound
    by least squares, and by a running mean. What is left is brought to a unit scale.
    ``NVIL(1)`` is the method of the paper, for the ELBO.

    NumPyro finds parameters and mutable state by running model and guide: pass
    ``loss.with_baseline(guide)`` as the guide of :class:`~numpyro.infer.svi.SVI`. The moments then
    live in ``SVIState.mutable_state`` under ``name``, and the baseline's parameters among all
    others, so that ``jit``, ``svi.run`` and checkpoints need nothing more.

    Args:
        num_particles: K, the number of particles in the bound.
        baseline: C(x): a function that is called with the arguments of model and guide, and returns
            one number for each element of the plates common to all sites. It may hold
            ``numpyro.param`` and ``flax_module`` or ``nnx_module`` statements, and plates.
        decay: Of the running moments, between 0 (the last step alone) and 1.
        normalize_variance: Whether to divide by max(1, s).
        name: Of the running moments, if there is more than one such loss.
        reparam: What guide sites with a reparameterised sampler get: ``"pathwise"``, ``"dreg"``,
            ``"stl"`` or ``"score"``, as in :class:`IWAE`; a site may choose for itself.
        num_replicates: Number of independent K-particle bounds to average.
        chunk_size: Run particles in chunks of this size: memory does not grow with
            ``num_particles``, at two forward passes instead of one.
        vectorize_particles: ``True`` runs particles under ``vmap``, ``False`` one after the other;
            or a callable ``(fn, keys) -> stacked results``.

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
        >>> import numpyro
        >>> import numpyro.distributions as dist
        >>> import optax
        >>> from jax import numpy as jnp, random
        >>> from numpyro.infer import SVI
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Bernoulli(0.3))
        ...         numpyro.sample("x", dist.Normal(3 * z, 1.0), obs=x)
        >>> def guide(x):
        ...     slope = numpyro.param("slope", 0.1)
        ...     with numpyro.plate("data", len(x)):
        ...         numpyro.sample("z", dist.Bernoulli(logits=slope * x))
        >>> def baseline(x):
        ...     return numpyro.param("level", 0.0) - (x - 1.5) ** 2 / 2
        >>> loss = NVIL(num_particles=1, baseline=baseline)
        >>> svi = SVI(model, loss.with_baseline(guide), optax.adam(0.05), loss=loss)
        >>> x = jnp.array([-0.5, 0.2, 2.9, 3.3])
        >>> result = svi.run(random.key(0), 100, x, progress_bar=False)
        >>> bool(result.params["slope"] > 0.1)
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
        vectorize_particles: bool | Callable = True,
    ) -> None:
        super().__init__(
            num_particles,
            reparam=reparam,
            alpha=0.0,
            num_replicates=num_replicates,
            chunk_size=chunk_size,
            vectorize_particles=vectorize_particles,
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

    def with_baseline(self, guide: Callable) -> Callable:
        """The guide to pass to ``SVI``: with it go the running moments and the baseline.

        Args:
            guide: NumPyro guide.

        Returns:
            A guide that makes the same draws.
        """

        return _WithBaseline(self, guide)

    def loss_with_mutable_state(
        self,
        rng_key: Array,
        param_map: dict[str, Any],
        model: Callable,
        guide: Callable,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in :class:`MultiSampleELBO`, with the new running moments in the state."""
        if isinstance(guide, _WithBaseline):
            guide = guide.guide  # one run of the baseline is enough for all particles
        return super().loss_with_mutable_state(rng_key, param_map, model, guide, *args, **kwargs)

    def _learning_signal(
        self,
        program: Program,
        log_weights: Float[Array, " K *batch"],
        auxiliary_log_weights: Float[Array, " S *batch"] | None,
    ) -> Float[Array, " K *batch"]:
        return nvil_learning_signal(
            log_weights,
            self._state(program),
            baseline=self._baseline_at(program),
            normalize_variance=self.normalize_variance,
        )

    def _further_surrogate(
        self, program: Program, log_weights: Float[Array, " K *batch"], key: Array
    ) -> Float[Array, ""] | float:
        """Fits the baseline by least squares."""
        bound = iwae_bound(log_weights)
        error = bound - self._state(program).mean - self._baseline_at(program)
        error = jnp.where(jnp.isneginf(bound), 0.0, error)
        return -jnp.sum(error**2) / (2 * self.num_replicates)

    def _next_state(
        self, program: Program, log_weights: Float[Array, " K *batch"]
    ) -> dict[str, Any]:
        new = update_nvil_state(
            self._state(program),
            log_weights,
            baseline=self._baseline_at(program),
            decay=self.decay,
        )
        return {self.name: new._asdict()}

    def _state(self, program: Program) -> NVILState:
        if self.name not in program.params:
            raise ValueError(
                f"NVIL found no running moments {self.name!r} among the state of SVI. Pass "
                "loss.with_baseline(guide) to SVI instead of the guide."
            )
        return NVILState(**jax.lax.stop_gradient(program.params[self.name]))

    def _baseline_at(self, program: Program) -> Float[Array, " *broadcastable"]:
        if self.baseline is None:
            return jnp.zeros(())
        # Of its own, as layers update mutable state in place.
        params = jax.tree.map(lambda leaf: leaf, program.params)
        baseline = handlers.substitute(program.in_its_plates(self.baseline), data=params)
        return jnp.asarray(baseline(*program.args, **program.kwargs))


class _WithBaseline:
    """A guide that shows SVI what the objective keeps."""

    def __init__(self, objective: NVIL, guide: Callable) -> None:
        self.objective = objective
        self.guide = guide

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mutable(self.objective.name, initial_nvil_state()._asdict())
        if self.objective.baseline is not None:
            self.objective.baseline(*args, **kwargs)
        return self.guide(*args, **kwargs)
