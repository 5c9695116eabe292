"""Signal-to-noise ratio of gradient estimators against K, on the Gaussian toy of the literature.

    python -m tests.benchmarks.snr_gaussian_toy [numpyro] [pyro] [--figure PATH]

The model is that of Rainforth et al. (2018): z ~ N(mu, I), x | z ~ N(z, I), in D = 20 dimensions,
with the guide N(Ax + b, (2/3)^2 I) and every parameter off its optimum by N(0, 0.01^2). (The 2/3 is
a standard deviation, as in the code of Lievin et al., 2020.) The ratio is |mean| / standard
deviation over draws of the gradient with respect to b, summed over the data; it is taken for each
of the D elements of b and then averaged. It grows as the root of the number of data: with N = 64 it
has the size of the published figures below, with N = 1024 that of figure 1 in Lievin et al.

The estimators of the bound are unbiased for one gradient, so they share its mean. The rows "SNR"
take the mean from the quietest of them. The rows "own mean" take each estimator's own, as the
literature does: at n draws that can't fall below sqrt(2 / (pi n)), however small the signal. Where
both can be measured, their agreement is a check of unbiasedness. Wake-phi and TVO climb something
else and have a mean of their own: their ratios are not to be ranked with the rest.

The directional ratio is, averaged over draws, the squared length of the gradient along its mean
over that across it; the mean is the shared one too. It tends to 1 / (D - 1) where there is nothing
but noise. The variance is summed over b.

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

NUM_PARTICLES = (3, 10, 30, 100, 300, 1000)
DIMENSION = 20
NUM_DATA = 64
NUM_DATASETS = 4
"""Gradients of independent data sets are drawn side by side and their ratios averaged."""

PUBLISHED: dict[str, dict[int, float]] = {
    "IWAE, pathwise": {3: 0.28, 30: 0.11, 300: 0.045},
    "VIMCO": {3: 0.34, 30: 0.16, 300: 0.054},
    "OVIS, gamma=0": {3: 0.55, 30: 1.38, 300: 3.12},
    "OVIS, S=10": {3: 0.76, 30: 1.25},
}
PUBLISHED_SLOPES = {"IWAE, pathwise": -0.40, "VIMCO": -0.40, "OVIS, gamma=0": 0.38}
WITH_OWN_TARGET = ("wake-phi", "TVO")


class Signal(NamedTuple):
    """What is measured of one estimator at one K, averaged over the data sets."""

    snr: float
    """With the shared mean."""
    own_snr: float
    """With the own mean."""
    directional_snr: float
    variance: float


Results = dict[str, dict[int, Signal]]
"""By estimator and K."""


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
        "IWAE, DReG": gradest.IWAE(num_particles, reparam="dreg", **options),
        "VIMCO": gradest.VIMCO(num_particles, **score),
        "OVIS, gamma=0": gradest.OVIS(num_particles, **score),
        "OVIS, S=1": gradest.OVIS(num_particles, num_auxiliary=1, **score),
        "OVIS, S=10": gradest.OVIS(num_particles, num_auxiliary=10, **score),
        "wake-phi": gradest.ReweightedWakeSleep(num_particles, **options),
        "TVO": gradest.TVO(num_particles, **options),
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


def signal(draws: np.ndarray, mean: np.ndarray) -> Signal:
    """Of draws ``[n, datasets, D]``, where their expectation is thought to be ``mean``."""
    own_mean, deviation = draws.mean(axis=0), draws.std(axis=0, ddof=1)
    direction = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
    along = np.sum(draws * direction, axis=-1, keepdims=True)
    across = draws - along * direction
    return Signal(
        snr=float(np.mean(np.abs(mean) / deviation)),
        own_snr=float(np.mean(np.abs(own_mean) / deviation)),
        directional_snr=float(np.mean(along[..., 0] ** 2 / np.sum(across**2, axis=-1))),
        variance=float(np.mean(np.sum(deviation**2, axis=-1))),
    )


def measure(host: str, toy: Toy) -> Results:
    gradest = importlib.import_module(f"{host}_gradest")
    draw_gradients, options = HOSTS[host]
    results: Results = {}
    for num_particles in NUM_PARTICLES:
        num_draws = int(np.clip(10_000 // num_particles, 100, 2000))
        draws = {
            name: draw_gradients(toy, objective, num_draws).astype(np.float64)
            for name, objective in make_objectives(gradest, num_particles, options).items()
        }
        unbiased = [one for name, one in draws.items() if name not in WITH_OWN_TARGET]
        shared_mean = min(unbiased, key=lambda one: one.var(axis=0).sum()).mean(axis=0)
        for name, one in draws.items():
            mean = one.mean(axis=0) if name in WITH_OWN_TARGET else shared_mean
            results.setdefault(name, {})[num_particles] = signal(one, mean)
    return results


def slope(by_particles: dict[int, Signal], what: str) -> float:
    """Least-squares slope of the logarithm of a quantity against log K."""
    values = [getattr(one, what) for one in by_particles.values()]
    return float(np.polyfit(np.log(list(by_particles)), np.log(values), 1)[0])


ROWS = {
    "SNR": "snr",
    "own mean": "own_snr",
    "directional": "directional_snr",
    "variance": "variance",
}


def print_table(host: str, results: Results) -> None:
    print(f"\n{host}: gradient SNR, N = {NUM_DATA} data, mean of {NUM_DATASETS} data sets")
    header = "".join(f"{f'K={k}':>10}" for k in NUM_PARTICLES)
    print(f"{'':30}{header}{'slope':>10}")
    for name, by_particles in results.items():
        for i, (row, what) in enumerate(ROWS.items()):
            values = [getattr(one, what) for one in by_particles.values()]
            print(f"{'' if i else name:16}{row:14}", end="")
            print("".join(f"{x:10.3g}" for x in values) + f"{slope(by_particles, what):+10.2f}")
        if name in PUBLISHED:
            published = "".join(f"{PUBLISHED[name].get(k, ''):>10}" for k in NUM_PARTICLES)
            print(f"{'':16}{'published SNR':14}{published}", end="")
            published_slope = PUBLISHED_SLOPES.get(name)
            print(f"{published_slope:+10.2f}" if published_slope else "")


def draw_figure(by_host: dict[str, Results], path: Path) -> None:
    """Signal-to-noise ratios and variance against K, a row for each host."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    columns = {
        "snr": "signal-to-noise ratio",
        "directional_snr": "directional ratio",
        "variance": "variance",
    }
    figure, axes = pyplot.subplots(
        len(by_host), 3, figsize=(14, 5 * len(by_host)), squeeze=False, layout="constrained"
    )
    for row, (host, results) in zip(axes, by_host.items(), strict=True):
        for axis, (what, label) in zip(row, columns.items(), strict=True):
            for name, by_particles in results.items():
                values = [getattr(one, what) for one in by_particles.values()]
                style = "--" if name in WITH_OWN_TARGET else "-"
                legend = f"{name} ({slope(by_particles, what):+.2f})"
                axis.loglog(list(by_particles), values, style, marker="o", label=legend)
            axis.set(title=host, xlabel="particles K", ylabel=label)
            axis.set_xticks(list(by_particles), list(map(str, by_particles)))
            axis.xaxis.set_minor_locator(ticker.NullLocator())
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15), "ncols": 2}
            axis.legend(title="estimator (slope)", fontsize="small", **below)
    figure.suptitle("Gaussian toy; dashed: gradients of something else than the bound")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("hosts", nargs="*", default=list(HOSTS), metavar="host")
    parser.add_argument("--output", type=Path, default=Path("benchmark_output"))
    parser.add_argument("--figure", type=Path, help="where to save the plots")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    by_host = {}
    for host in arguments.hosts:
        start = time.perf_counter()
        results = by_host[host] = measure(host, make_toy())
        print_table(host, results)
        path = arguments.output / f"snr_gaussian_toy_{host}.json"
        plain = {
            name: {k: one._asdict() for k, one in by_particles.items()}
            for name, by_particles in results.items()
        }
        path.write_text(json.dumps(plain, indent=1))
        print(f"{time.perf_counter() - start:.0f} s; saved as {path}")
    if arguments.figure:
        draw_figure(by_host, arguments.figure)
        print(f"Plots saved as {arguments.figure}")


if __name__ == "__main__":
    main()
