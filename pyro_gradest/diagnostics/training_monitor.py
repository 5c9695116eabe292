"""What a training run looks like from inside: bound, effective sample size, gradient norm."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from pyro.infer import SVI
from torch import Tensor

from pyro_gradest.estimators import effective_sample_size
from pyro_gradest.infer.multisample_elbo import MultiSampleELBO


class TrainingMetrics(NamedTuple):
    """Figures of one training step, or of several, stacked."""

    bound: Float[Tensor, " *steps"]
    """Minus the loss: of the objectives here, in nats, and summed over the data."""
    effective_sample_size: Float[Tensor, " *steps"] | None
    """Of the weights of the step's own particles, averaged over the data; of the multi-sample
    objectives here."""
    gradient_norm: Float[Tensor, " *steps"]
    """Euclidean norm of the gradient in all unconstrained parameters, as the optimizer gets it."""


class TrainingMonitor:
    r"""Record bound, effective sample size and gradient norm of every step of a training run.

    ``step`` takes the place of ``svi.step`` and returns the same loss. What it records stays on the
    device; the methods that read fetch it.

    The effective sample size is

    .. math:: \mathrm{ESS} = 1 \Big/ \sum_{k=1}^K v_k^2

    with v the normalised importance weights of the K particles, whatever the objective makes of
    them. 1 at each step says that one particle does all the work, and K that all count alike.

    Args:
        svi: The host's ``SVI``, with a loss of this package or any other. It is left as it is.

    Raises:
        TypeError: If ``svi`` is no ``SVI``.

    Bias and variance:
        Unbiased for the expected loss of the step; the effective sample size is self-normalised,
        O(1/K). Neither draws anything nor moves a parameter otherwise than ``svi`` alone would.

    Cost:
        O(K) per datum and O(1) per parameter: model and guide run no more often.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro.infer import SVI
        >>> from pyro_gradest import OVIS
        >>> def model():
        ...     z = pyro.sample("z", dist.Bernoulli(0.3))
        ...     pyro.sample("x", dist.Normal(3.0 * z, 1.0), obs=torch.tensor(2.0))
        >>> def guide():
        ...     pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.1))))
        >>> monitor = TrainingMonitor(SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), loss=OVIS(5)))
        >>> losses = [monitor.step() for _ in range(100)]
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

    def step(self, *args: Any, **kwargs: Any) -> float | tuple[float, ...]:
        """Take a step like ``svi.step``, and record it.

        Args:
            args: Arguments of model and guide.
            kwargs: Keyword arguments of model and guide.

        Returns:
            The loss, as ``svi.step`` returns it.
        """
        svi = copy.copy(self.svi)
        sizes: list[Tensor] = []
        norms: list[Tensor] = []
        svi.loss_and_grads = _listen_to_weights(self.svi.loss_and_grads, sizes)
        svi.optim = _listen_to_gradients(self.svi.optim, norms)
        loss = svi.step(*args, **kwargs)
        first = loss[0] if isinstance(loss, tuple) else loss  # of the host's wake-sleep, theta's
        bound = torch.tensor(-first, dtype=torch.float64)
        self._records.append(TrainingMetrics(bound, sizes[0] if sizes else None, norms[0]))
        return loss

    def to_dict(self) -> dict[str, np.ndarray]:
        """The figures recorded so far, by name, with an entry for each step."""
        self._records = [_fetched(one) for one in self._records]
        columns = {}
        for name in TrainingMetrics._fields:
            parts = [getattr(one, name) for one in self._records]
            if parts and parts[0] is not None:  # of a loss without weights
                columns[name] = torch.stack(parts).numpy()
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


def _listen_to_weights(loss_and_grads: Callable, sizes: list[Tensor]) -> Callable:
    """The same function, which appends the effective sample size if it has weights."""
    elbo = getattr(loss_and_grads, "__self__", None)
    if not isinstance(elbo, MultiSampleELBO):
        return loss_and_grads

    def listening(model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        loss, log_weights = elbo._loss_and_log_weights(model, guide, args, kwargs)
        sizes.append(effective_sample_size(log_weights).mean())
        return loss

    return listening


def _listen_to_gradients(optimizer: Callable, norms: list[Tensor]) -> Callable:
    """The same optimizer, which appends the norm: the host clears the gradient after it."""

    def listening(parameters: set[Tensor]) -> None:
        norms.append(_norm(parameters))
        optimizer(parameters)

    return listening


def _norm(parameters: set[Tensor]) -> Float[Tensor, ""]:
    gradients = [one.grad for one in parameters if one.grad is not None]
    if not gradients:
        return torch.zeros(())
    norms = [torch.linalg.vector_norm(one) for one in gradients]
    return torch.linalg.vector_norm(torch.stack([one.to(norms[0].device) for one in norms]))


def _fetched(metrics: TrainingMetrics) -> TrainingMetrics:
    bound, sample_size, norm = metrics
    return TrainingMetrics(
        bound.cpu(), None if sample_size is None else sample_size.cpu(), norm.cpu()
    )
