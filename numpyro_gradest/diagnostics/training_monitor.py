"""What a training run looks like from inside: bound, effective sample size, gradient norm."""

import copy
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from numpyro.infer import SVI

from numpyro_gradest.infer._discrete_sites import state_name
from numpyro_gradest.infer.multisample_elbo import SAMPLE_SIZE, MultiSampleELBO


class TrainingMetrics(NamedTuple):
    """Figures of one training step, or of several, stacked."""

    bound: Float[Array, " *steps"]
    """Minus the loss: of the objectives here, in nats, and summed over the data."""
    effective_sample_size: Float[Array, " *steps"] | None
    """Of the weights of the step's own particles, averaged over the data; of the multi-sample
    objectives here."""
    gradient_norm: Float[Array, " *steps"]
    """Euclidean norm of the gradient in all unconstrained parameters, as the optimizer gets it."""


class TrainingMonitor:
    r"""Record bound, effective sample size and gradient norm of every step of a training run.

    ``update`` takes the place of ``svi.update`` and is as pure as that: it returns the figures, in
    place of the loss, and runs under ``jit`` and ``scan``. ``record`` keeps them, and sends nothing
    from the device; the methods that read do. ``svi.run`` has no callback: scan instead, as below.

    The effective sample size is

    .. math:: \mathrm{ESS} = 1 \Big/ \sum_{k=1}^K v_k^2

    with v the normalised importance weights of the K particles, whatever the objective makes of
    them. 1 at each step says that one particle does all the work, and K that all count alike.

    Args:
        svi: The host's ``SVI``, with a loss of this package or any other. It is left as it is.

    Raises:
        TypeError: If ``svi`` is no ``SVI``; at the first step, if its optimizer takes no gradients.

    Bias and variance:
        Unbiased for the expected loss of the step; the effective sample size is self-normalised,
        O(1/K). Neither draws anything nor moves a parameter otherwise than ``svi`` alone would.

    Cost:
        O(K) per datum and O(1) per parameter: model and guide run no more often.

    Example:
        >>> import numpyro
        >>> import numpyro.distributions as dist
        >>> import optax
        >>> from jax import lax, random
        >>> from numpyro.infer import SVI
        >>> from numpyro_gradest import OVIS
        >>> def model():
        ...     z = numpyro.sample("z", dist.Bernoulli(0.3))
        ...     numpyro.sample("x", dist.Normal(3.0 * z, 1.0), obs=2.0)
        >>> def guide():
        ...     numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logit", 0.1)))
        >>> svi = SVI(model, guide, optax.adam(0.1), loss=OVIS(5))
        >>> monitor = TrainingMonitor(svi)
        >>> state = svi.init(random.key(0))
        >>> state, metrics = lax.scan(lambda state, _: monitor.update(state), state, length=100)
        >>> monitor.record(metrics)
        >>> monitor.to_frame()[-3:].round(1)
              bound  effective_sample_size  gradient_norm
        step
        97     ...
        98     ...
        99     ...

    References:
        Kong, `A note on importance sampling using standardized weights
        <https://galton.uchicago.edu/techreports/tr348.pdf>`_, 1992.
    """

    def __init__(self, svi: Any) -> None:
        _check_svi(svi)
        self.svi = svi
        self._records: list[TrainingMetrics] = []
        self._num_written = 0

    def update(self, svi_state: Any, *args: Any, **kwargs: Any) -> tuple[Any, TrainingMetrics]:
        """Take a step like ``svi.update``, and measure it.

        Args:
            svi_state: State of ``SVI``.
            args: Arguments of model and guide.
            kwargs: Keyword arguments of ``svi.update``, and of model and guide.

        Returns:
            The next state, and the figures of the step for :meth:`record`.
        """
        has_weights = isinstance(self.svi.loss, MultiSampleELBO)
        own_state = svi_state.mutable_state
        if has_weights:
            # The only way out of the host's loss that is differentiated.
            asked = (own_state or {}) | {SAMPLE_SIZE: jnp.zeros(())}
            svi_state = svi_state._replace(mutable_state=asked)
        svi = copy.copy(self.svi)
        gradients: list[dict[str, Array]] = []
        svi.optim = _listen(self.svi.optim, gradients)
        svi_state, loss = svi.update(svi_state, *args, **kwargs)
        if not gradients:
            raise TypeError(
                f"TrainingMonitor needs an optimizer that is given one gradient at each step, got "
                f"{type(self.svi.optim).__name__}. Use one of optax, such as optax.adam(1e-3)."
            )
        sample_size = None
        if has_weights:
            left = dict(svi_state.mutable_state)
            sample_size = left.pop(SAMPLE_SIZE)
            svi_state = svi_state._replace(mutable_state=left or None)
        return svi_state, TrainingMetrics(-loss, sample_size, _norm(gradients[0]))

    def record(self, metrics: TrainingMetrics) -> None:
        """Keep the figures of one step, or of several that ``scan`` has stacked.

        Args:
            metrics: What :meth:`update` returned.

        Raises:
            TypeError: Under ``jit`` or ``scan``, where there are no figures yet.
            ValueError: If there is more than an axis of steps.
        """
        if any(isinstance(leaf, jax.core.Tracer) for leaf in metrics):
            raise TypeError(
                "TrainingMonitor.record needs the figures of steps that were taken, got some that "
                "are being traced. Return them from the function under jit or scan, and record "
                "what comes out."
            )
        if metrics.bound.ndim > 1:
            raise ValueError(
                "TrainingMonitor.record needs figures of shape [] or [steps], got "
                f"{metrics.bound.shape}. Record runs that were mapped over by a monitor each."
            )
        self._records.append(metrics)

    def to_dict(self) -> dict[str, np.ndarray]:
        """The figures recorded so far, by name, with an entry for each step."""
        self._records = jax.device_get(self._records)
        columns = {}
        for name in TrainingMetrics._fields:
            parts = [np.atleast_1d(getattr(one, name)) for one in self._records]
            if parts and parts[0].dtype != object:  # of a loss without weights
                columns[name] = np.concatenate(parts)
        return columns

    def to_frame(self) -> Any:
        """A pandas data frame with a row for each step."""
        import pandas

        return pandas.DataFrame(self.to_dict()).rename_axis("step")

    def to_arviz(self) -> Any:
        """A data set for ArviZ's plots, with a chain of one draw for each step.

        Raises:
            ImportError: If ArviZ is not installed.
        """
        try:
            import arviz
        except ImportError as error:
            raise ImportError(
                "TrainingMonitor.to_arviz needs ArviZ, which is not installed: pip install arviz. "
                "to_frame and to_dict do without."
            ) from error

        return arviz.convert_to_dataset({name: one[None] for name, one in self.to_dict().items()})

    def write_scalars(self, writer: Any, *, prefix: str = "") -> None:
        """Hand the steps since the last call to TensorBoard, or whatever has its ``add_scalar``.

        Args:
            writer: With a method ``add_scalar(tag, value, step)``, such as a ``SummaryWriter``.
            prefix: Put before the names of the figures, such as ``"train/"``.
        """
        columns = self.to_dict()
        num_steps = len(columns.get("bound", ()))
        for step in range(self._num_written, num_steps):
            for name, column in columns.items():
                writer.add_scalar(prefix + name, float(column[step]), step)
        self._num_written = num_steps


def _check_svi(svi: Any) -> None:
    if not isinstance(svi, SVI):
        raise TypeError(
            f"TrainingMonitor needs the SVI that trains, got {type(svi).__name__}. Pass "
            "SVI(model, guide, optimizer, loss)."
        )


def _listen(optimizer: Any, gradients: list[dict[str, Array]]) -> Any:
    """The same optimizer, which appends what it is given: the host shows it to no one else."""
    listener = copy.copy(optimizer)

    def update(gradient: dict[str, Array], *args: Any, **kwargs: Any) -> Any:
        gradients.append(gradient)
        return optimizer.update(gradient, *args, **kwargs)

    listener.update = update
    return listener


def _norm(gradients: dict[str, Array]) -> Float[Array, ""]:
    # Adaptive IMLE's state is a parameter too, but what it is given is no gradient.
    others = {name: one for name, one in gradients.items() if not name.endswith(state_name(""))}
    return jnp.linalg.norm(ravel_pytree(others)[0])
