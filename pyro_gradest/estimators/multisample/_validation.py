"""Checks of what arrives at a layer-1 function: static facts (shape, dtype), never values."""

from jaxtyping import Float
from torch import Tensor


def as_log_weights(
    log_weights: Tensor, *, caller: str, name: str = "log_weights", at_least: int = 1
) -> Float[Tensor, " K *batch"]:
    """Return ``log_weights`` as a detached floating-point array of K >= ``at_least`` particles."""
    if not isinstance(log_weights, Tensor):
        raise TypeError(
            f"{caller} needs {name} as a torch.Tensor, got {type(log_weights).__name__}. "
            "Convert with torch.as_tensor."
        )
    if not log_weights.dtype.is_floating_point:
        raise TypeError(
            f"{caller} needs {name} of a floating dtype, got {log_weights.dtype}. "
            f"Cast with {name}.double() or {name}.float()."
        )
    if log_weights.ndim == 0:
        raise ValueError(
            f"{caller} needs {name} of shape [K, *batch] with the particles first, got a scalar. "
            f"For a single particle pass {name}[None]."
        )
    if log_weights.shape[0] < at_least:
        remedy = (
            "Leaving one particle out needs another to be left: use num_particles=2 or more, or "
            "an estimator without a leave-one-out baseline (IWAE; IWAE(1) is the ELBO)."
            if at_least > 1
            else "Pass one particle or more along dim 0."
        )
        raise ValueError(
            f"{caller} needs at least {at_least} particle(s), got {name} of shape "
            f"{tuple(log_weights.shape)}. {remedy}"
        )
    return log_weights.detach()


def check_alpha(caller: str, alpha: float) -> None:
    """Refuse an order of the variational Renyi bound that is not between 0 and 1."""
    if not 0 <= alpha <= 1:
        raise ValueError(
            f"{caller} needs 0 <= alpha <= 1, got {alpha}: 0 is the importance-weighted bound, 1 "
            "the ELBO, and beyond them the estimate is no lower bound or has no finite variance."
        )
