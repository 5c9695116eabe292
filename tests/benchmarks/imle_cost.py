"""What a step of IMLE costs, in time and memory, against plain calls of its solver.

    python -m tests.benchmarks.imle_cost [numpyro] [pyro]

The step draws k = 20 of n = 400 items for each of 1000 data, S times, under Gumbel noise, and takes
the gradient of a linear objective in theta, in float32. It is held against top-k and scatter as a
user writes them, of an array of all S draws:

    / two calls     time over that of two calls without noise; the target is 1.5
    / by hand       time over as many calls as the step makes and its noise, written by hand: a
                    central difference makes three, a forward one two
    MB, floor       peak memory of the step, and of the two calls, beyond what was there before

Each host is measured in processes of its own with one thread on one core, in seconds of that
process; JAX is compiled.
"""

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.__main__ import RETURN_FREED_MEMORY, pin_to_one_core, run_child
from tests.benchmarks.timing import interleaved_seconds, median_ratio

BATCH, N, K = 1000, 400, 20
NUM_SAMPLES = (1, 10)
NUM_ROUNDS = 9
Steps = dict[str, tuple[Callable[[], None], Callable[[], float]]]
BY_HAND = {"two calls": (2, False), "two and noise": (2, True), "three and noise": (3, True)}
ESTIMATORS = [(name, central) for name in ("IMLE", "AdaptiveIMLE") for central in (True, False)]


def label(name: str, is_central: bool) -> str:
    return f"{name}, {'central' if is_central else 'forward'}"


def draw_of(estimators: Any, name: str, is_central: bool, theta: Any) -> Callable[..., Any]:
    """The method that draws, with its options."""
    estimator = getattr(estimators, name)(symmetric=is_central)
    options = {"state": estimator.init(theta)} if name == "AdaptiveIMLE" else {}
    return partial(estimator.sample, solver=estimators.top_k(K), **options)


def pyro_steps(theta: np.ndarray, num_samples: int) -> Steps:
    """Functions to be timed and their peaks of memory, by name."""
    import torch

    import pyro_gradest.estimators as estimators

    torch.set_num_threads(1)
    leaf, weights = torch.tensor(theta, requires_grad=True), torch.tensor(np.sin(theta))
    counts = torch.zeros(2, requires_grad=True)
    repeated = torch.tensor(theta).repeat(num_samples, 1, 1)

    def by_hand(calls: int, with_noise: bool) -> None:
        scores = repeated
        if with_noise:
            scores = scores - (-torch.rand_like(scores).log()).log()
        for _ in range(calls):
            indices = scores.topk(K, dim=-1).indices
            torch.zeros_like(scores).scatter(-1, indices, 1.0)

    def gradient(draw: Callable, **options: Any) -> None:
        z = draw(leaf, num_samples=num_samples, **options)
        torch.autograd.grad((z * weights).sum() / num_samples, [leaf, *options.values()])

    steps = {name: partial(by_hand, *options) for name, options in BY_HAND.items()}
    for name, is_central in ESTIMATORS:
        options = {"counts": counts} if name == "AdaptiveIMLE" else {}
        draw = draw_of(estimators, name, is_central, leaf)
        steps[label(name, is_central)] = partial(gradient, draw, **options)
    return {name: (step, partial(resident_growth, step)) for name, step in steps.items()}


def numpyro_steps(theta: np.ndarray, num_samples: int) -> Steps:
    """Functions to be timed and their peaks of memory, by name."""
    import jax
    import jax.numpy as jnp

    import numpyro_gradest.estimators as estimators

    leaf, key = jnp.array(theta), jax.random.key(0)
    arguments = leaf, jnp.zeros(2, leaf.dtype), key, jnp.sin(leaf)
    repeated = jnp.tile(leaf, (num_samples, 1, 1))

    def solve(scores: Any) -> Any:
        _, indices = jax.lax.top_k(scores, K)
        return jnp.put_along_axis(jnp.zeros_like(scores), indices, 1.0, axis=-1, inplace=False)

    def peak(compiled: Any) -> int:
        memory = compiled.memory_analysis()
        return memory.output_size_in_bytes + memory.temp_size_in_bytes

    solver = jax.jit(solve).lower(repeated).compile()
    noisy = jax.jit(lambda key, scores: scores + jax.random.gumbel(key, scores.shape))

    def by_hand(calls: int, with_noise: bool) -> None:
        scores = noisy(key, repeated) if with_noise else repeated
        for _ in range(calls):
            jax.block_until_ready(solver(scores))

    def loss(draw: Callable, name: str, theta: Any, counts: Any, key: Any, weights: Any) -> Any:
        options = {"counts": counts} if name == "AdaptiveIMLE" else {}
        z = draw(key, theta, num_samples=num_samples, **options)
        return (z * weights).sum() / num_samples

    steps: Steps = {
        name: (partial(by_hand, *options), partial(peak, solver))
        for name, options in BY_HAND.items()
    }
    for name, is_central in ESTIMATORS:
        draw = draw_of(estimators, name, is_central, leaf)

        # With the value: a linear objective's gradient alone would not need the draws.
        gradient = jax.value_and_grad(partial(loss, draw, name), (0, 1))
        compiled = jax.jit(gradient).lower(*arguments).compile()
        step = partial(lambda step: jax.block_until_ready(step(*arguments)), compiled)
        steps[label(name, is_central)] = step, partial(peak, compiled)
    return steps


def measure(host: str, what: str) -> dict[int, dict]:
    """Of each number of samples and step, its seconds in rounds or its peak of memory in bytes."""
    theta = np.random.default_rng(0).normal(size=(BATCH, N)).astype(np.float32)
    results = {}
    for num_samples in NUM_SAMPLES:
        steps = {"pyro": pyro_steps, "numpyro": numpyro_steps}[host](theta, num_samples)
        if what == "memory":
            results[num_samples] = {name: peak() for name, (_, peak) in steps.items()}
        else:
            results[num_samples] = interleaved_seconds(
                {name: step for name, (step, _) in steps.items()},
                rounds=NUM_ROUNDS,
                min_seconds=0.1,
                clock=time.process_time,
            )
    return results


def resident_growth(step: Callable[[], None]) -> float:
    """By how many bytes this process grows while a step runs; nan where the system can't say."""
    step()
    process = Path("/proc/self")
    if not (process / "clear_refs").exists():
        return float("nan")

    def resident(line: str) -> int:
        return 1024 * int(re.search(line + r":\s+(\d+)", (process / "status").read_text())[1])

    (process / "clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("hosts", nargs="*", default=["numpyro", "pyro"])
    parser.add_argument("--child", choices=("seconds", "memory"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(*arguments.hosts, arguments.child)))
        return
    pin_to_one_core()
    for host in arguments.hosts:
        seconds = run_child("imle_cost", host, "--child", "seconds")
        memory = run_child("imle_cost", host, "--child", "memory", **RETURN_FREED_MEMORY)
        columns = ("ms", "/ two calls", "/ by hand", "MB", "floor")
        print(f"\n{host:30}" + "".join(f"{column:>13}" for column in columns))
        for num_samples in map(str, NUM_SAMPLES):
            of, mb = seconds[num_samples], memory[num_samples]
            floor = mb["two calls"] / 1e6
            for name, is_central in ESTIMATORS:
                row = label(name, is_central)
                by_hand = of["three and noise" if is_central else "two and noise"]
                print(
                    f"{row + ', S=' + num_samples:30}{1e3 * statistics.median(of[row]):13.1f}"
                    f"{median_ratio(of[row], of['two calls']):13.2f}"
                    f"{median_ratio(of[row], by_hand):13.2f}{mb[row] / 1e6:13.1f}{floor:13.1f}"
                )


if __name__ == "__main__":
    main()
