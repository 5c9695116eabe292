"""Gradients through k-subsets: bias, noise and sparsity of the estimators, and their time.

    python -m tests.benchmarks.discrete_gradients [numpyro] [pyro] [--draws 400000]

The study takes subsets of k = 5 of n = 10 items and two objectives, |z - b|^2 and sin(z' A z); the
latter is far from quadratic. Exact gradients come from all 252 subsets; SIMPLE and ReinMax are held
against that of their own law, the exponential family, the others against that of Gumbel top-k.
Figures are of the mean of 10 draws:

    bias       |mean - exact| / |exact|, with the standard error that chance alone would give
    noise      root of the summed variances / |exact|
    cosine     mean cosine to the exact gradient
    non-zero   entries that are not zero in the gradient of one draw

The time of a draw and its backward pass is taken at a batch of 1000 with k = 20 of n = 400, in
float32, against two plain top-k calls of the same size. Each host is measured in a process of its
own with one thread on one core; JAX is compiled.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from itertools import combinations, permutations
from typing import Any

import numpy as np

from tests.benchmarks.__main__ import pin_to_one_core, run_child
from tests.benchmarks.timing import interleaved_seconds, median_ratio
from tests.oracles import discrete as oracle

N, K, GROUP = 10, 5, 10
STEP_SIZES = (0.0125, 0.05, 0.2, 1.0, 5.0)
BATCH, LARGE_N, LARGE_K = 1000, 400, 20
NUM_ROUNDS = 7


class Pyro:
    """torch, eager."""

    def __init__(self) -> None:
        import torch

        import pyro_gradest.estimators

        torch.manual_seed(0)
        torch.set_num_threads(1)
        self.np, self.estimators, self.torch = torch, pyro_gradest.estimators, torch

    def array(self, value: np.ndarray) -> Any:
        return self.torch.as_tensor(value)

    def gradient(self, objective: Callable, theta: np.ndarray, estimator: Any, solver: Any):
        """One after the other, gradients of single draws at rows of theta."""
        theta = self.array(theta)

        def draw(state: Any = None) -> tuple[np.ndarray, Any]:
            leaf = theta.clone().requires_grad_()
            counts = self.torch.zeros(2, dtype=theta.dtype, requires_grad=True)
            options = {"state": state, "counts": counts} if state else {}
            z = estimator.sample(leaf, solver, **options)
            objective(z).sum().backward()
            return leaf.grad.numpy(), counts.grad

        return draw

    def step(self, estimator: Any, solver: Any, theta: np.ndarray, num_samples: int) -> Callable:
        leaf, weights = self.array(theta).requires_grad_(), self.array(np.sin(theta))

        def step() -> None:
            z = estimator.sample(leaf, solver, num_samples=num_samples)
            self.torch.autograd.grad((z * weights).sum(), leaf)

        return step

    def plain(self, solver: Any, theta: np.ndarray, calls: int) -> Callable:
        theta = self.array(theta)

        def step() -> None:
            for _ in range(calls):
                solver.solve(theta)

        return step


class NumPyro:
    """JAX, compiled."""

    def __init__(self) -> None:
        import jax

        import numpyro_gradest.estimators

        self.jax, self.np, self.estimators = jax, jax.numpy, numpyro_gradest.estimators
        self.keys = iter(jax.random.split(jax.random.key(0), 10_000))

    def array(self, value: np.ndarray) -> Any:
        return self.np.asarray(value)

    def gradient(self, objective: Callable, theta: np.ndarray, estimator: Any, solver: Any):
        def loss(theta: Any, counts: Any, key: Any, state: Any) -> Any:
            options = {"state": state, "counts": counts} if state else {}
            return objective(estimator.sample(key, theta, solver, **options)).sum()

        compiled = self.jax.jit(self.jax.grad(loss, argnums=(0, 1)))
        theta, counts = self.array(theta), self.np.zeros(2, theta.dtype)

        def draw(state: Any = None) -> tuple[np.ndarray, Any]:
            gradient, new = compiled(theta, counts, next(self.keys), state)
            return np.asarray(gradient), new

        return draw

    def step(self, estimator: Any, solver: Any, theta: np.ndarray, num_samples: int) -> Callable:
        weights, theta = self.array(np.sin(theta)), self.array(theta)

        def loss(theta, key):
            z = estimator.sample(key, theta, solver, num_samples=num_samples)
            return (z * weights).sum()

        # With the value: a linear objective's gradient alone would not need the draws.
        compiled, key = self.jax.jit(self.jax.value_and_grad(loss)), next(self.keys)
        return lambda: self.jax.block_until_ready(compiled(theta, key))

    def plain(self, solver: Any, theta: np.ndarray, calls: int) -> Callable:
        theta, compiled = self.array(theta), self.jax.jit(solver.solve)

        def step() -> None:
            for _ in range(calls):
                compiled(theta).block_until_ready()

        return step


HOSTS = {"pyro": Pyro, "numpyro": NumPyro}


# The study


def plackett_luce(theta: np.ndarray) -> np.ndarray:
    """Probabilities of all subsets of K, in the order of the oracle's."""
    orders = np.array([list(permutations(items)) for items in combinations(range(N), K)])
    weights = np.exp(theta)[orders]
    left = np.sum(np.exp(theta)) - np.cumsum(weights, axis=-1) + weights
    return np.sum(np.prod(weights / left, axis=-1), axis=-1)


def exponential_family(theta: np.ndarray) -> np.ndarray:
    scores = np.array(oracle.subsets(N, K)) @ theta
    weights = np.exp(scores - scores.real.max())
    return weights / weights.sum()


def derivatives(probabilities: Callable, theta: np.ndarray) -> np.ndarray:
    """[N, states], by a complex step."""
    moved = theta + 1e-25j * np.eye(N)
    return np.array([probabilities(row).imag for row in moved]) / 1e-25


def summary(gradients: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    means = gradients.reshape(-1, GROUP, N).mean(axis=1)
    size, spread = np.linalg.norm(exact), np.sqrt(means.var(axis=0).sum())
    lengths = np.linalg.norm(means, axis=1)
    cosines = means @ exact / (np.where(lengths > 0, lengths, 1.0) * size)
    return {
        "bias": np.linalg.norm(means.mean(axis=0) - exact) / size,
        "by chance": spread / np.sqrt(len(means)) / size,
        "noise": spread / size,
        "cosine": cosines.mean(),
        "non-zero": np.count_nonzero(gradients, axis=1).mean(),
    }


def study(host: Any, draws: int) -> Iterator[tuple[str, str, dict[str, float]]]:
    rng = np.random.default_rng(0)
    theta, target = rng.normal(size=(2, N))
    matrix = rng.normal(size=(N, N)) / N
    states, solver, e = np.array(oracle.subsets(N, K)), host.estimators.top_k(K), host.estimators
    values = {
        "|z - b|^2": ((states - target) ** 2).sum(axis=1),
        "sin(z'Az)": np.sin(((states @ matrix) * states).sum(axis=1)),
    }
    b, A = host.array(target), host.array(matrix)
    objectives = {
        "|z - b|^2": lambda z: ((z - b) ** 2).sum(-1),
        "sin(z'Az)": lambda z: host.np.sin(((z @ A) * z).sum(-1)),
    }
    estimators = {
        **{f"IMLE, step {s}": e.IMLE(step_size=s) for s in STEP_SIZES},
        "IMLE, step 0.05, forward": e.IMLE(step_size=0.05, symmetric=False),
        "AdaptiveIMLE": e.AdaptiveIMLE(),
        "StraightThrough": e.StraightThrough(),
        "StraightThrough, identity": e.StraightThrough(),
        "GumbelSoftmaxST": e.GumbelSoftmaxST(),
        "SIMPLE": e.SIMPLE(),
        "ReinMax": e.ReinMax(),
    }
    chunk = min(20_000, draws)
    rows = np.broadcast_to(theta, (chunk, N)).copy()
    for name, value in values.items():
        laws = {law: derivatives(law, theta) for law in (plackett_luce, exponential_family)}
        for label, estimator in estimators.items():
            own = solver._replace(marginals=None) if label.endswith("identity") else solver
            state = None
            if label == "AdaptiveIMLE":
                state = estimator.init(host.array(theta))
                draw = host.gradient(objectives[name], rows[:100], estimator, own)
                for _ in range(200):
                    state = estimator.update(state, draw(state)[1])
            draw = host.gradient(objectives[name], rows, estimator, own)
            gradients = np.concatenate([draw(state)[0] for _ in range(draws // chunk)])
            law = exponential_family if label in ("SIMPLE", "ReinMax") else plackett_luce
            yield name, label, summary(gradients, laws[law] @ value)
        yield name, "score, leave one out", score_function(value, theta, laws, draws, rng)


def score_function(value, theta, laws, draws, rng) -> dict[str, float]:
    """With the mean of the other draws of the group as a baseline."""
    p = plackett_luce(theta)
    scores = (laws[plackett_luce] / p).T
    drawn = rng.choice(len(p), size=(draws // GROUP, GROUP), p=p / p.sum())
    f = value[drawn]
    advantage = f - (f.sum(axis=1, keepdims=True) - f) / (GROUP - 1)
    gradients = (advantage[..., None] * scores[drawn]).reshape(-1, N)
    return summary(gradients, laws[plackett_luce] @ value)


# Time


def times(host: Any) -> Iterator[tuple[str, float, float]]:
    theta = np.random.default_rng(0).normal(size=(BATCH, LARGE_N)).astype(np.float32)
    solver, e = host.estimators.top_k(LARGE_K), host.estimators
    for num_samples in (1, 10):
        repeated = np.random.default_rng(0).normal(size=(num_samples, *theta.shape))
        steps = {
            "two plain top-k calls": host.plain(solver, repeated.astype(np.float32), 2),
            "three plain top-k calls": host.plain(solver, repeated.astype(np.float32), 3),
            "IMLE, forward": host.step(e.IMLE(symmetric=False), solver, theta, num_samples),
            "IMLE": host.step(e.IMLE(), solver, theta, num_samples),
        }
        if num_samples == 1:
            steps["SIMPLE"] = host.step(e.SIMPLE(), solver, theta, num_samples)
            noise = e.SumOfGammaNoise(num_ones=LARGE_K)
            steps["IMLE, sum of gamma"] = host.step(e.IMLE(noise=noise), solver, theta, num_samples)
        seconds = interleaved_seconds(steps, rounds=NUM_ROUNDS)
        for name in steps:
            ratio = median_ratio(seconds[name], seconds["two plain top-k calls"])
            yield f"{name}, S={num_samples}", statistics.median(seconds[name]), ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("hosts", nargs="*", default=["numpyro", "pyro"])
    parser.add_argument("--draws", type=int, default=400_000)
    parser.add_argument("--child", action="store_true")
    arguments = parser.parse_args()
    pin_to_one_core()
    if arguments.child:
        timed = list(times(HOSTS[arguments.hosts[0]]()))
        if arguments.hosts[0] == "numpyro":
            import jax

            jax.config.update("jax_enable_x64", True)
        rows = list(study(HOSTS[arguments.hosts[0]](), arguments.draws))
        print(json.dumps({"study": rows, "times": timed}))
        return
    for host in arguments.hosts:
        results = run_child("discrete_gradients", host, "--child", "--draws", str(arguments.draws))
        columns = ("bias", "by chance", "noise", "cosine", "non-zero")
        for objective in dict.fromkeys(row[0] for row in results["study"]):
            print(f"\n{host}, {objective:25}" + "".join(f"{column:>11}" for column in columns))
            for _, label, figures in (row for row in results["study"] if row[0] == objective):
                print(f"{label:35}" + "".join(f"{figures[column]:11.3f}" for column in columns))
        print(f"\n{host + ', seconds of a step':41}{'ms':>10}{'/ two top-k':>14}")
        for label, seconds, ratio in results["times"]:
            print(f"{label:41}{1e3 * seconds:10.1f}{ratio:14.2f}")
        print("Target for IMLE: <= 1.5")


if __name__ == "__main__":
    main()
