"""Time of the score estimators, as ratios within one run.

    python -m tests.benchmarks.score_estimators [numpyro] [pyro]

The Stein estimate of a batch of N data with K samples in D dimensions is timed against the same
formula written out by hand without checks, options or a fit to return, and against a loop over the
data. Then K, N and D are doubled in turn, and the other estimators are timed against it. Every host
is measured in a process of its own with one thread on one core, in float32; JAX is compiled.
Targets are printed beside what was reached; nothing here fails.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial

import numpy as np

from tests.benchmarks.__main__ import pin_to_one_core, run_child
from tests.benchmarks.timing import interleaved_seconds, median_ratio

BATCH = {"N": 256, "K": 64, "D": 8}
NUM_ROUNDS = 3
RIDGE = 0.01
OTHERS = (
    "spectral_score",
    "kde_score",
    "parametric_stein_score",
    "score_matching_score",
    "kernel_exponential_family_score",
    "nu_method_score",
)


def draw(sizes: dict[str, int]) -> np.ndarray:
    """Samples ``[N, K, D]``."""
    return np.random.default_rng(0).normal(size=[sizes[k] for k in "NKD"]).astype(np.float32)


def handwritten_torch(samples):
    """The whitened Stein estimate with an IMQ kernel at the median distance."""
    import torch

    num_samples, dim = samples.shape[-2:]
    samples = samples - samples.mean(-2, keepdim=True)
    scale = samples.std(-2, keepdim=True, correction=0)
    points = samples / scale
    correlation = points.mT @ points / num_samples + 3e-4 * torch.eye(dim)
    factor = scale.mT * torch.linalg.cholesky(correlation)
    points = torch.linalg.solve_triangular(factor.mT, samples, upper=True, left=False)
    norms = (points**2).sum(-1)
    squared = (norms[..., :, None] + norms[..., None, :] - 2 * points @ points.mT).clamp(min=0)
    rows, columns = torch.triu_indices(num_samples, num_samples, 1)
    squared_bandwidth = squared[..., rows, columns].median(-1).values[..., None, None]
    kernel = (1 + squared / squared_bandwidth).rsqrt()
    slopes = kernel**3 / squared_bandwidth
    stein = slopes.sum(-1, keepdim=True) * points - slopes @ points
    cholesky = torch.linalg.cholesky(kernel + RIDGE * torch.eye(num_samples))
    score = -torch.cholesky_solve(stein, cholesky)
    return torch.linalg.solve_triangular(factor, score, upper=False, left=False)


def handwritten_jax(samples):
    """The whitened Stein estimate with an IMQ kernel at the median distance."""
    import jax.numpy as jnp
    from jax.lax.linalg import triangular_solve
    from jax.scipy.linalg import cho_solve

    num_samples, dim = samples.shape[-2:]
    samples = samples - samples.mean(-2, keepdims=True)
    scale = samples.std(-2, keepdims=True)
    points = samples / scale
    correlation = points.mT @ points / num_samples + 3e-4 * jnp.eye(dim)
    factor = scale.mT * jnp.linalg.cholesky(correlation)
    points = triangular_solve(factor, samples, lower=True, transpose_a=True)
    norms = (points**2).sum(-1)
    squared = norms[..., :, None] + norms[..., None, :] - 2 * points @ points.mT
    squared = jnp.maximum(squared, 0)
    rows, columns = np.triu_indices(num_samples, 1)
    pairs = jnp.sort(squared[..., rows, columns], axis=-1)
    squared_bandwidth = pairs[..., (len(rows) - 1) // 2, None, None]
    kernel = 1 / jnp.sqrt(1 + squared / squared_bandwidth)
    slopes = kernel**3 / squared_bandwidth
    stein = slopes.sum(-1, keepdims=True) * points - slopes @ points
    cholesky = jnp.linalg.cholesky(kernel + RIDGE * jnp.eye(num_samples))
    return triangular_solve(factor, -cho_solve((cholesky, True), stein), lower=True)


def pyro_steps(samples: np.ndarray) -> dict[str, Callable[[], None]]:
    """Functions to be timed, by name."""
    import torch

    import pyro_gradest.estimators as estimators

    samples = torch.as_tensor(samples)

    def loop():
        for one in samples:
            estimators.stein_score(one, ridge=RIDGE)

    steps = {name: partial(getattr(estimators, name), samples) for name in OTHERS}
    return {
        "stein_score": partial(estimators.stein_score, samples, ridge=RIDGE),
        "handwritten": partial(handwritten_torch, samples),
        "loop": loop,
        **steps,
    }


def numpyro_steps(samples: np.ndarray) -> dict[str, Callable[[], None]]:
    """Functions to be timed, by name."""
    import jax

    import numpyro_gradest.estimators as estimators

    elements = [jax.device_put(one) for one in samples]
    samples = jax.device_put(samples)
    stein = jax.jit(partial(estimators.stein_score, ridge=RIDGE))

    def ready(function):
        compiled = jax.jit(function)
        return lambda: compiled(samples).block_until_ready()

    def loop():
        for one in elements:
            stein(one).block_until_ready()

    return {
        "stein_score": ready(stein),
        "handwritten": ready(handwritten_jax),
        "loop": loop,
        **{name: ready(getattr(estimators, name)) for name in OTHERS},
    }


def measure(host: str) -> dict:
    """Seconds of every step at ``BATCH``, and of the Stein estimate with each size doubled."""
    make = {"pyro": pyro_steps, "numpyro": numpyro_steps}[host]
    if host == "pyro":
        import torch

        torch.set_num_threads(1)
    doubled = {
        f"2 {size}": make(draw({**BATCH, size: 2 * BATCH[size]}))["stein_score"] for size in BATCH
    }
    return interleaved_seconds({**make(draw(BATCH)), **doubled}, rounds=NUM_ROUNDS, min_seconds=0.1)


def rows(seconds: dict[str, list[float]]) -> list[tuple[str, str, str]]:
    """What was measured, what was reached, and the target if there is one."""

    def ratio(name: str, base: str) -> str:
        return f"{median_ratio(seconds[name], seconds[base]):.2f}"

    return [
        ("stein_score", f"{1e3 * statistics.median(seconds['stein_score']):.1f} ms", ""),
        ("stein_score / handwritten", ratio("stein_score", "handwritten"), "<= 1.10"),
        ("loop over the data / stein_score", ratio("loop", "stein_score"), ">= 5"),
        *((f"  with {size} doubled", ratio(f"2 {size}", "stein_score"), "") for size in BATCH),
        *((f"{name} / stein_score", ratio(name, "stein_score"), "") for name in OTHERS),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("hosts", nargs="*", default=["numpyro", "pyro"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child)))
        return
    pin_to_one_core()
    print("N={N} data, K={K} samples, D={D} dimensions, one thread, float32.".format(**BATCH))
    for host in arguments.hosts:
        seconds = run_child("score_estimators", "--child", host)
        print(f"\n{host:56}{'reached':>12}{'target':>12}")
        for what, reached, target in rows(seconds):
            print(f"{what:56}{reached:>12}{target:>12}")


if __name__ == "__main__":
    main()
