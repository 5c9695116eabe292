"""Times steps against each other, interleaved: what else the machine does then hits all alike."""

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved_seconds(
    steps: Mapping[str, Callable[[], None]],
    *,
    rounds: int,
    min_seconds: float = 0.2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds per call of each step, one entry a round; every round runs all steps in turn.

    Args:
        steps: Functions that return when their work is done, by name.
        rounds: Number of rounds. Each starts with another step, so that none is always first.
        min_seconds: A step is repeated within a round until it has run for about this long.
        clock: What tells the time; ``time.process_time`` leaves out what other processes take.

    Returns:
        Seconds per call, in order of the rounds, by name.
    """
    repeats = {}
    for name, step in steps.items():
        step()  # compiles, allocates, and creates parameters
        repeats[name] = max(1, round(min_seconds / _seconds(step, 1, clock)))
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(_seconds(steps[name], repeats[name], clock))
    return seconds


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def _seconds(step: Callable[[], None], repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        step()
    return (clock() - start) / repeats
