"""Signal-to-noise ratio of gradient estimators against K, on the Gaussian toy of the literature.

    python -m tests.benchmarks.snr_gaussian_toy [numpyro] [pyro]

The model is that of Rainforth et al. (2018): z ~ N(mu, I), x | z ~ N(z, I), in D = 20 dimensions,
with the guide N(Ax + b, (2/3)^2 I) and every parameter off its optimum by N(0, 0.01^2). (The 2/3 is
a standard deviation, as in the code of Lievin et al., 2020.) The ratio is |mean| / standard
deviation over draws of the gradient with respect to b, summed over the data; it is taken for each
of the D elements of b and then averaged. It grows as the root of the number of data: with N = 64 it
has the size of the published figures below, with N = 1024 that of figure 1 in Lievin et al.

All estimators here are unbiased for one gradient, so they share its mean. The rows "SNR" take the
mean from the quietest estimator. The rows "own mean" take each estimator's own, as the literature
does: at n draws that can't fall below sqrt(2 / (pi n)), however small the signal. Where both can be
measured, their agreement is a check of unbiasedness.

References:
    Rainforth et al., `Tighter Variational Bounds are Not Necessarily Better
    <https://arxiv.org/abs/1802.04537>`_, 2018, section 4.
    Lievin et al., `Optimal Variance Control of the Score Function Gradient Estimator for Importance
    Weighted Bounds <https://arxiv.org/abs/2008.01998>`_, 2020, figure 1.
"""

import argparse
import importlib
import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

NUM_PARTICLES = (3, 10, 30, 100, 300)
DIMENSION = 20
NUM_DATA = 64
NUM_DATASETS = 4
"""Gradients of independent data sets are drawn side by side and their ratios averaged."""

PUBLISHED = {
    "IWAE, pathwise": {3: 0.28, 30: 0.11, 300: 0.045},
    "VIMCO": {3: 0.34, 30: 0.16, 300: 0.054},
    "OVIS, gamma=0": {3: 0.55, 30: 1.38, 300: 3.12},
    "OVIS, S=10": {3: 0.76, 30: 1.25},
}
PUBLISHED_SLOPES = {"IWAE, pathwise": -0.40, "VIMCO": -0.40, "OVIS, gamma=0": 0.38}
QUIETEST = "OVIS, gamma=0"


class Toy(NamedTuple):
    """Data ``[datasets, data, D]`` and perturbed parameters, one set for each data set."""

    data: np.ndarray
    mu: np.ndarray
    A: np.ndarray
    b: np.ndarray
    scale: float = 2 / 3


def make_toy(seed: int = 0, epsilon: float = 0.01) -> Toy:
    """Draw data sets, and perturb the parameters that are optimal for them."""
    generator = np.random.default_rng(seed)
    normal = generator.standard_normal
    shape = (NUM_DATASETS, NUM_DATA, DIMENSION)
    data = normal((NUM_DATASETS, 1, DIMENSION)) + normal(shape) + normal(shape)
    mu = data.mean(axis=1)
    A = np.broadcast_to(np.eye(DIMENSION) / 2, (NUM_DATASETS, DIMENSION, DIMENSION))
    mu, A, b = (value + epsilon * normal(value.shape) for value in (mu, A, mu / 2))
    return Toy(*(value.astype(np.float32) for value in (data, mu, A, b)))


def make_objectives(gradest, num_particles: int, options: dict) -> dict:
    """The estimators compared, by the names used above."""
    score = {"reparam": "score", **options}
    return {
        "IWAE, pathwise": gradest.IWAE(num_particles, reparam="pathwise", **options),
        "VIMCO": gradest.VIMCO(num_particles, **score),
        "OVIS, gamma=0": gradest.OVIS(num_particles, **score),
        "OVIS, S=10": gradest.OVIS(num_particles, num_auxiliary=10, **score),
    }


def numpyro_gradients(toy: Toy, objective, num_draws: int) -> np.ndarray:
    """Draws of the gradient with respect to b, ``[draws, datasets, D]``."""
    import jax
    import numpyro
    import numpyro.distributions as dist

    def plates():
        return numpyro.plate("datasets", NUM_DATASETS, dim=-2), numpyro.plate("data", NUM_DATA)

    def model():
        datasets, data = plates()
        with datasets, data:
            z = numpyro.sample("z", dist.Normal(toy.mu[:, None], 1.0).to_event(1))
            numpyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=toy.data)

    def guide():
        b = numpyro.param("b", toy.b)
        datasets, data = plates()
        with datasets, data:
            mean = toy.data @ toy.A + b[:, None]
            numpyro.sample("z", dist.Normal(mean, toy.scale).to_event(1))

    def gradient(key):
        return jax.grad(lambda b: objective.loss(key, {"b": b}, model, guide))(toy.b)

    keys = jax.random.split(jax.random.key(0), num_draws)
    return np.asarray(jax.jit(lambda keys: jax.lax.map(gradient, keys))(keys))


def pyro_gradients(toy: Toy, objective, num_draws: int) -> np.ndarray:
    """Draws of the gradient with respect to b, ``[draws, datasets, D]``."""
    import pyro
    import pyro.distributions as dist
    import torch

    data, mu, A = (torch.as_tensor(value) for value in (toy.data, toy.mu, toy.A))
    mean = data @ A
    b = torch.tensor(toy.b, requires_grad=True)

    def plates():
        return pyro.plate("datasets", NUM_DATASETS, dim=-2), pyro.plate("data", NUM_DATA, dim=-1)

    def model():
        datasets_plate, data_plate = plates()
        with datasets_plate, data_plate:
            z = pyro.sample("z", dist.Normal(mu[:, None], 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=data)

    def guide():
        datasets_plate, data_plate = plates()
        with datasets_plate, data_plate:
            pyro.sample("z", dist.Normal(mean + b[:, None], toy.scale).to_event(1))

    pyro.set_rng_seed(0)
    draws = []
    for _ in range(num_draws):
        b.grad = None
        objective.loss_and_grads(model, guide)
        draws.append(b.grad.numpy())
    return np.stack(draws)


HOSTS = {
    "numpyro": (numpyro_gradients, {}),
    "pyro": (pyro_gradients, {"vectorize_particles": True, "max_plate_nesting": 2}),
}


def measure(host: str, toy: Toy) -> dict[str, dict[int, tuple[float, float]]]:
    """SNR with the shared mean and with the own mean, by estimator and K."""
    gradest = importlib.import_module(f"{host}_gradest")
    draw_gradients, options = HOSTS[host]
    results: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in PUBLISHED}
    for num_particles in NUM_PARTICLES:
        num_draws = int(np.clip(10_000 // num_particles, 100, 2000))
        moments = {}
        for name, objective in make_objectives(gradest, num_particles, options).items():
            draws = draw_gradients(toy, objective, num_draws).astype(np.float64)
            moments[name] = draws.mean(axis=0), draws.std(axis=0, ddof=1)
        shared_mean, _ = moments[QUIETEST]
        for name, (own_mean, deviation) in moments.items():
            results[name][num_particles] = (
                float(np.mean(np.abs(shared_mean) / deviation)),
                float(np.mean(np.abs(own_mean) / deviation)),
            )
    return results


def slope(results: dict[int, tuple[float, float]]) -> float:
    """Least-squares slope of log SNR against log K."""
    ratios = [shared for shared, _ in results.values()]
    return float(np.polyfit(np.log(list(results)), np.log(ratios), 1)[0])


def print_table(host: str, results: dict[str, dict[int, tuple[float, float]]]) -> None:
    print(f"\n{host}: gradient SNR, N = {NUM_DATA} data, mean of {NUM_DATASETS} data sets")
    header = "".join(f"{f'K={k}':>10}" for k in NUM_PARTICLES)
    print(f"{'':30}{header}{'slope':>10}")
    for name, by_particles in results.items():
        shared, own = zip(*by_particles.values(), strict=True)
        print(f"{name:16}{'SNR':14}" + "".join(f"{x:10.3f}" for x in shared), end="")
        print(f"{slope(by_particles):+10.2f}")
        print(f"{'':16}{'own mean':14}" + "".join(f"{x:10.3f}" for x in own))
        published = "".join(f"{PUBLISHED[name].get(k, ''):>10}" for k in NUM_PARTICLES)
        published_slope = PUBLISHED_SLOPES.get(name)
        print(f"{'':16}{'published':14}{published}", end="")
        print(f"{published_slope:+10.2f}" if published_slope else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("hosts", nargs="*", default=list(HOSTS), metavar="host")
    parser.add_argument("--output", type=Path, default=Path("benchmark_output"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for host in arguments.hosts:
        start = time.perf_counter()
        results = measure(host, make_toy())
        print_table(host, results)
        path = arguments.output / f"snr_gaussian_toy_{host}.json"
        path.write_text(json.dumps(results, indent=1))
        print(f"{time.perf_counter() - start:.0f} s; saved as {path}")


if __name__ == "__main__":
    main()
