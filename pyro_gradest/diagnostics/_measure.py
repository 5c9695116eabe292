"""Moments of gradients as they come, batch by batch, in memory that does not grow with draws."""

import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from tqdm import tqdm


class Moments(NamedTuple):
    """Of gradients with P entries."""

    mean: np.ndarray
    variance: np.ndarray
    """Unbiased, of one draw."""
    directional_snr: float
    num_draws: int
    seconds: float
    """For one gradient, by the median batch."""


def measure(
    batches: Iterator[np.ndarray],
    num_draws: int,
    *,
    direction: np.ndarray | None,
    progress_bar: bool,
    name: str,
) -> Moments:
    """Mean and variance of all draws, and the directional signal-to-noise ratio.

    ``batches`` yields ``[B, P]`` gradients. The direction is that of the mean of the first half of
    the draws where it is not given, and the ratio then that of the second half.
    """
    next(batches)  # compiles, creates parameters
    count = 0
    seconds: list[float] = []
    mean = squares = np.zeros(())
    ratios: list[np.ndarray] = []
    with tqdm(total=num_draws, desc=name, disable=not progress_bar) as bar:
        while count < num_draws:
            start = time.perf_counter()
            batch = next(batches)
            seconds.append((time.perf_counter() - start) / len(batch))
            batch = batch[: num_draws - count].astype(np.float64)
            if direction is None and 2 * count >= num_draws:
                direction = mean
            if direction is not None:
                ratios.append(_directional(batch, direction))
            # Chan, Golub and LeVeque: exact where the sum of squares would cancel.
            size, of_batch = len(batch), batch.mean(axis=0)
            deviation = of_batch - mean
            squares = squares + ((batch - of_batch) ** 2).sum(axis=0)
            squares = squares + deviation**2 * count * size / (count + size)
            mean = mean + deviation * size / (count + size)
            count += size
            bar.update(size)
    return Moments(
        mean=mean,
        variance=squares / max(count - 1, 1),
        directional_snr=float(np.mean(np.concatenate(ratios))) if ratios else float("nan"),
        num_draws=count,
        # Other work on the machine makes a few batches slow, and so the mean.
        seconds=float(np.median(seconds)),
    )


def _directional(gradients: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Squared length along a direction over that across it, for each draw."""
    length = np.linalg.norm(direction)
    if length == 0:
        return np.zeros(len(gradients))
    along = gradients @ (direction / length)
    across = np.sum((gradients - along[:, None] * direction / length) ** 2, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(along == 0, 0.0, along**2 / across)
