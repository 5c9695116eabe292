"""Checks of what arrives at a score estimator, once, at the public function.

Shapes, dtypes and Python numbers are always checked; values only where that is possible, which is
not so while a function is being traced or mapped.
"""

import math
import warnings
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# In float32 rounding alone moves the small eigenvalues of a Gram matrix by about this much.
SMALLEST_RIDGE_IN_FLOAT32 = 1e-3


def as_samples(
    samples: Any, *, caller: str, may_be_few: bool = False
) -> Float[Tensor, " *batch N D"]:
    """Return ``samples`` as a detached floating-point array of N >= 2 finite samples.

    Below N = D a warning is given, unless the samples ``may_be_few``: no score is made of them, or
    what makes it has warned.
    """
    if not isinstance(samples, Tensor):
        raise TypeError(
            f"{caller} needs samples as a torch.Tensor, got {type(samples).__name__}. "
            "Convert with torch.as_tensor."
        )
    if samples.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{caller} needs samples of dtype float32 or float64, got {samples.dtype}: factorising "
            "a kernel matrix takes more digits than that. Cast with samples.float()."
        )
    shape = tuple(samples.shape)
    if samples.ndim < 2:
        raise ValueError(
            f"{caller} needs samples of shape [*batch, N, D], got {shape}. "
            "For N samples of a scalar pass samples[:, None]."
        )
    num_samples, dim = shape[-2:]
    if num_samples < 2:
        raise ValueError(
            f"{caller} compares samples with each other and needs 2 or more, got {num_samples} in "
            f"samples of shape {shape}. Samples are counted along the last axis but one; draw at "
            "least 5 D of them."
        )
    if dim < 1:
        raise ValueError(f"{caller} needs samples of one dimension or more, got shape {shape}.")
    if num_samples < dim and not may_be_few:
        warnings.warn(
            f"{caller} got {num_samples} samples in {dim} dimensions (shape {shape}): they do not "
            f"span the space, so the score is shrunk in every direction. Use K >= 5 D, that is "
            f"{5 * dim} samples or more.",
            stacklevel=3,
        )
    samples = samples.detach()
    if not is_false(torch.isfinite(samples).all()):
        return samples
    wrong = int((~torch.isfinite(samples)).sum())
    raise ValueError(
        f"{caller} needs finite samples, got {wrong} entries of nan or inf among {samples.numel()} "
        f"(shape {shape}). Find what produced them: often a diverged network or too large a "
        "learning rate."
    )


def as_points(
    points: Any, samples: Float[Tensor, " *batch N D"], *, caller: str
) -> Float[Tensor, " *batch P D"]:
    """Return ``points`` detached, having checked that they go with the samples of a fit."""
    if not isinstance(points, Tensor) or points.dtype != samples.dtype:
        got = points.dtype if isinstance(points, Tensor) else type(points).__name__
        raise TypeError(
            f"{caller} needs points of the dtype of the samples it was fitted to, "
            f"{samples.dtype}, got {got}."
        )
    if (
        points.ndim != samples.ndim
        or points.shape[-1] != samples.shape[-1]
        or points.shape[:-2] != samples.shape[:-2]
    ):
        wanted = [*map(str, samples.shape[:-2]), "P", str(samples.shape[-1])]
        raise ValueError(
            f"{caller} needs points of shape [{', '.join(wanted)}] to go with the samples it was "
            f"fitted to, got {tuple(points.shape)}. A single point is points[None]."
        )
    return points.detach()


def as_scores(
    scores: Any, samples: Float[Tensor, " *batch N D"], *, caller: str
) -> Float[Tensor, " *batch N D"]:
    """Return ``scores`` detached, having checked that there is a finite one for each sample."""
    if not isinstance(scores, Tensor) or scores.dtype != samples.dtype:
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"{caller} needs scores of the samples' dtype {samples.dtype}, got {got}.")
    if scores.shape != samples.shape:
        raise ValueError(
            f"{caller} needs one score for each sample, of shape {tuple(samples.shape)}, got "
            f"{tuple(scores.shape)}."
        )
    if is_false(torch.isfinite(scores).all()):
        raise ValueError(
            f"{caller} needs finite scores, got nan or inf. Often a sample lies outside of the "
            "model's support, or where its density has a pole."
        )
    return scores.detach()


def as_reference(
    reference: Any, samples: Float[Tensor, " *batch N D"], *, caller: str
) -> Float[Tensor, " *batch P D"]:
    """Return ``reference`` detached, having checked that it goes with the samples."""
    if not isinstance(reference, Tensor) or reference.dtype != samples.dtype:
        got = reference.dtype if isinstance(reference, Tensor) else type(reference).__name__
        raise TypeError(
            f"{caller} needs reference draws of the samples' dtype {samples.dtype}, got {got}."
        )
    reference = as_samples(reference, caller=caller, may_be_few=True)
    if reference.shape[:-2] != samples.shape[:-2] or reference.shape[-1] != samples.shape[-1]:
        wanted = [*map(str, samples.shape[:-2]), "P", str(samples.shape[-1])]
        raise ValueError(
            f"{caller} needs reference draws of shape [{', '.join(wanted)}] to go with the "
            f"samples, got {tuple(reference.shape)}."
        )
    return reference


def check_ridge(ridge: Any, dtype: torch.dtype, *, caller: str) -> None:
    """Refuse a ridge that is not a number >= 0, or that float32 cannot carry."""
    if not isinstance(ridge, (int, float)) or not math.isfinite(ridge) or ridge < 0:
        raise ValueError(f"{caller} needs a finite ridge >= 0, got {ridge!r}. Try ridge=0.01.")
    if dtype == torch.float32 and ridge < SMALLEST_RIDGE_IN_FLOAT32:
        raise ValueError(
            f"{caller} needs ridge >= {SMALLEST_RIDGE_IN_FLOAT32} in float32, got {ridge}: below "
            "that the rounding of the kernel matrix is divided by nearly nothing. Use ridge=0.01, "
            "or cast the samples to float64."
        )


def is_false(condition: Tensor) -> bool:
    """Whether a condition is known to be false: not while it is traced, compiled or mapped."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    try:
        return not bool(condition)
    except RuntimeError:  # torch.func.vmap has no single truth value to give
        return False
