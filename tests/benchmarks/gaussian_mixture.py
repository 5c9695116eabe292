"""Posterior error and signal-to-noise ratio against K, on the Gaussian mixture of the literature.

    python -m tests.benchmarks.gaussian_mixture [numpyro] [pyro] [--steps N] [--figure PATH]

The model is that of Le et al. (2019) and Lievin et al. (2020): one of C = 20 clusters with
probability proportional to c + 5, and x ~ N(10 c, 5^2) around it. The prior's logits are learned
from fresh data at every step, together with a guide that is a network of 16 hidden units. A guide
that gives up on a cluster finds it again only by a draw there: what is a good estimator here is not
the one with the least noise alone.

"Posterior error" is the mean over test data of the distance |q(z | x) - p(z | x)| to the posterior
of the true model, and "prior error" that of the prior. "SNR" is |mean| / standard deviation of the
gradient of each of the guide's parameters, averaged; all estimators are measured at one point, the
guide that wake-phi has after a tenth of the steps. The bound is what all but wake-phi and
"gamma=1" climb: the signal-to-noise ratios of those two are not to be ranked with the rest.

References:
    Le et al., `Revisiting Reweighted Wake-Sleep <https://arxiv.org/abs/1805.10469>`_, 2019,
    section 4.3.
    Lievin et al., `Optimal Variance Control of the Score Function Gradient Estimator for Importance
    Weighted Bounds <https://arxiv.org/abs/2008.01998>`_, 2020, section 7.2.
"""

import argparse
import importlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

NUM_PARTICLES = (2, 5, 20)
NUM_CLUSTERS = 20
NUM_HIDDEN = 16
BATCH_SIZE = 100
NUM_STEPS = 1000
NUM_RECORDS = 20
LEARNING_RATE = 0.01
NUM_TEST_DATA = 100
NUM_GRADIENTS = 200
WITH_OWN_TARGET = ("OVIS, gamma=1", "wake-phi")
WARM_UP = ("wake-phi", NUM_PARTICLES[-1])
"""What brings the guide to where gradients are measured."""
OF_GUIDE = ("w1", "b1", "w2", "b2")

Params = dict[str, np.ndarray]


class Errors(NamedTuple):
    posterior: float
    prior: float


class Fit(NamedTuple):
    """One estimator at one K."""

    steps: list[int]
    errors: list[Errors]
    snr: float


Results = dict[str, dict[int, Fit]]
"""By estimator and K."""


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


TRUE_PRIOR = (np.arange(NUM_CLUSTERS) + 5) / np.sum(np.arange(NUM_CLUSTERS) + 5)


def draw_data(num_data: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    clusters = generator.choice(NUM_CLUSTERS, size=num_data, p=TRUE_PRIOR)
    return (10 * clusters + 5 * generator.standard_normal(num_data)).astype(np.float32)


def initial_params() -> Params:
    generator = np.random.default_rng(0)
    params = {
        "theta": np.zeros(NUM_CLUSTERS),
        "w1": generator.standard_normal((1, NUM_HIDDEN)),
        "b1": generator.standard_normal(NUM_HIDDEN),
        "w2": generator.standard_normal((NUM_HIDDEN, NUM_CLUSTERS)) / np.sqrt(NUM_HIDDEN),
        "b2": np.zeros(NUM_CLUSTERS),
    }
    return {name: value.astype(np.float32) for name, value in params.items()}


def inputs(x: Any) -> Any:
    """What the guide's network sees: the data, brought to about unit scale."""
    return (x[:, None] - 100) / 50


def errors(params: Params) -> Errors:
    """Of a guide and a prior, beside the true ones."""
    x = draw_data(NUM_TEST_DATA, seed=1)
    hidden = np.tanh(inputs(x) @ params["w1"] + params["b1"])
    guide = softmax(hidden @ params["w2"] + params["b2"])
    log_likelihood = -((x[:, None] - 10 * np.arange(NUM_CLUSTERS)) ** 2) / 50
    posterior = softmax(np.log(TRUE_PRIOR) + log_likelihood)
    return Errors(
        posterior=float(np.linalg.norm(guide - posterior, axis=1).mean()),
        prior=float(np.linalg.norm(softmax(params["theta"]) - TRUE_PRIOR)),
    )


def make_objectives(gradest: Any, num_particles: int, options: dict) -> dict[str, Any]:
    """The estimators compared."""
    return {
        "IWAE, score": gradest.IWAE(num_particles, **options),
        "VIMCO": gradest.VIMCO(num_particles, **options),
        "OVIS, gamma=0": gradest.OVIS(num_particles, **options),
        "OVIS, gamma=1": gradest.OVIS(num_particles, gamma=1.0, **options),
        "wake-phi": gradest.ReweightedWakeSleep(num_particles, **options),
    }


class NumPyroHost:
    """Fits and measures in NumPyro."""

    options: ClassVar[dict] = {}

    def __init__(self) -> None:
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as dist

        start = initial_params()

        def model(x: Any) -> None:
            theta = numpyro.param("theta", start["theta"])
            with numpyro.plate("data", len(x)):
                z = numpyro.sample("z", dist.Categorical(logits=theta))
                numpyro.sample("x", dist.Normal(10.0 * z, 5.0), obs=x)

        def guide(x: Any) -> None:
            w1, b1, w2, b2 = (numpyro.param(name, start[name]) for name in OF_GUIDE)
            logits = jnp.tanh(inputs(x) @ w1 + b1) @ w2 + b2
            with numpyro.plate("data", len(x)):
                numpyro.sample("z", dist.Categorical(logits=logits))

        self.programs = model, guide

    def fit(self, objective: Any, data: np.ndarray, record: Callable[[Params], None]) -> None:
        """Take a step at each row of ``[records, steps, B]`` data."""
        import jax
        import optax
        from numpyro.infer import SVI

        svi = SVI(*self.programs, optax.adam(LEARNING_RATE), loss=objective)

        @jax.jit
        def train(state: Any, batches: Any) -> Any:
            return jax.lax.scan(lambda s, x: (svi.update(s, x)[0], None), state, batches)[0]

        state = svi.init(jax.random.key(0), data[0, 0])
        for batches in data:
            state = train(state, batches)
            record({name: np.asarray(value) for name, value in svi.get_params(state).items()})

    def gradients(self, objective: Any, params: Params, x: np.ndarray) -> Params:
        """Draws of the gradient at given parameters, ``[draws, *shape]`` each."""
        import jax

        def gradient(key: Any) -> Any:
            return jax.grad(lambda params: objective.loss(key, params, *self.programs, x))(params)

        keys = jax.random.split(jax.random.key(0), NUM_GRADIENTS)
        draws = jax.jit(lambda keys: jax.lax.map(gradient, keys))(keys)
        return {name: np.asarray(draw) for name, draw in draws.items()}


class PyroHost:
    """Fits and measures in Pyro."""

    options: ClassVar[dict] = {"vectorize_particles": True, "max_plate_nesting": 1}

    def __init__(self) -> None:
        import pyro
        import pyro.distributions as dist
        import torch

        start = {name: torch.as_tensor(value) for name, value in initial_params().items()}

        def model(x: Any) -> None:
            theta = pyro.param("theta", start["theta"].clone)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Categorical(logits=theta))
                pyro.sample("x", dist.Normal(10.0 * z, 5.0), obs=x)

        def guide(x: Any) -> None:
            w1, b1, w2, b2 = (pyro.param(name, start[name].clone) for name in OF_GUIDE)
            logits = torch.tanh(inputs(x) @ w1 + b1) @ w2 + b2
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Categorical(logits=logits))

        self.programs = model, guide

    def fit(self, objective: Any, data: np.ndarray, record: Callable[[Params], None]) -> None:
        """Take a step at each row of ``[records, steps, B]`` data."""
        import pyro
        import torch
        from pyro.infer import SVI

        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = SVI(*self.programs, pyro.optim.Adam({"lr": LEARNING_RATE}), loss=objective)
        for batches in torch.as_tensor(data):
            for x in batches:
                svi.step(x)
            values = pyro.get_param_store().items()
            record({name: value.detach().numpy().copy() for name, value in values})

    def gradients(self, objective: Any, params: Params, x: np.ndarray) -> Params:
        """Draws of the gradient at given parameters, ``[draws, *shape]`` each."""
        import pyro
        import torch

        pyro.clear_param_store()
        leaves = {name: pyro.param(name, torch.as_tensor(value)) for name, value in params.items()}
        draws: dict[str, list[np.ndarray]] = {name: [] for name in leaves}
        for _ in range(NUM_GRADIENTS):
            objective.loss_and_grads(*self.programs, torch.as_tensor(x))
            for name, leaf in leaves.items():
                draws[name].append(leaf.grad.numpy().copy())
                leaf.grad = None
        return {name: np.stack(one) for name, one in draws.items()}


HOSTS = {"numpyro": NumPyroHost, "pyro": PyroHost}


def measure(name: str, num_steps: int) -> Results:
    gradest, host = importlib.import_module(f"{name}_gradest"), HOSTS[name]()
    data = draw_data(num_steps * BATCH_SIZE, seed=0).reshape(NUM_RECORDS, -1, BATCH_SIZE)
    objectives = {k: make_objectives(gradest, k, host.options) for k in NUM_PARTICLES}

    warm_up, num_particles = WARM_UP
    on_the_way: list[Params] = []
    host.fit(objectives[num_particles][warm_up], data[: NUM_RECORDS // 10], on_the_way.append)

    steps = list(range(0, num_steps + 1, num_steps // NUM_RECORDS))
    results: Results = {}
    for k, by_name in objectives.items():
        for estimator, objective in by_name.items():
            course = [errors(initial_params())]
            host.fit(objective, data, lambda params, to=course: to.append(errors(params)))
            draws = host.gradients(objective, on_the_way[-1], data[0, 0])
            results.setdefault(estimator, {})[k] = Fit(steps, course, snr_of_guide(draws))
    return results


def snr_of_guide(draws: Params) -> float:
    """|mean| / standard deviation, averaged over all parameters of the guide."""
    flat = np.concatenate([draws[name].reshape(NUM_GRADIENTS, -1) for name in OF_GUIDE], axis=1)
    return float(np.mean(np.abs(flat.mean(axis=0)) / flat.std(axis=0, ddof=1)))


ROWS: dict[str, Callable[[Fit], float]] = {
    "posterior error": lambda fit: fit.errors[-1].posterior,
    "prior error": lambda fit: fit.errors[-1].prior,
    "SNR": lambda fit: fit.snr,
}


def print_table(host: str, results: Results, num_steps: int) -> None:
    start = errors(initial_params())
    print(f"\n{host}: after {num_steps} steps with {BATCH_SIZE} data")
    print(f"(posterior error at the start {start.posterior:.3g}, prior error {start.prior:.3g})")
    print(f"{'':32}" + "".join(f"{f'K={k}':>10}" for k in NUM_PARTICLES))
    for name, by_particles in results.items():
        for i, (row, value) in enumerate(ROWS.items()):
            values = "".join(f"{value(fit):10.3g}" for fit in by_particles.values())
            print(f"{'' if i else name:16}{row:16}{values}")


def draw_figure(by_host: dict[str, Results], path: Path) -> None:
    """Errors on the way and at the end, and signal-to-noise ratios, a row for each host."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(
        len(by_host), 3, figsize=(14, 4.5 * len(by_host)), squeeze=False, layout="constrained"
    )
    most = NUM_PARTICLES[-1]
    for row, (host, results) in zip(axes, by_host.items(), strict=True):
        for name, by_particles in results.items():
            style = {"linestyle": "--" if name in WITH_OWN_TARGET else "-", "label": name}
            fit, particles = by_particles[most], list(by_particles)
            row[0].semilogy(fit.steps, [one.posterior for one in fit.errors], **style)
            ends, ratios = (
                [ROWS[what](one) for one in by_particles.values()]
                for what in ("posterior error", "SNR")
            )
            row[1].loglog(particles, ends, marker="o", **style)
            row[2].loglog(particles, ratios, marker="o", **style)
        row[0].set(title=f"{host}, K = {most}", xlabel="steps", ylabel="posterior error")
        row[1].set(title=host, xlabel="particles K", ylabel="posterior error at the end")
        row[2].set(title=host, xlabel="particles K", ylabel="signal-to-noise ratio")
        for axis in row[1:]:
            axis.set_xticks(NUM_PARTICLES, list(map(str, NUM_PARTICLES)))
            axis.xaxis.set_minor_locator(ticker.NullLocator())
        row[0].legend(fontsize="small")
    figure.suptitle("Gaussian mixture; dashed: gradients of something else than the bound")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("hosts", nargs="*", default=list(HOSTS), metavar="host")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help=f"multiple of {NUM_RECORDS}")
    parser.add_argument("--output", type=Path, default=Path("benchmark_output"))
    parser.add_argument("--figure", type=Path, help="where to save the plots")
    arguments = parser.parse_args()
    if arguments.steps < NUM_RECORDS or arguments.steps % NUM_RECORDS:
        parser.error(f"--steps needs a multiple of {NUM_RECORDS}, got {arguments.steps}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    by_host = {}
    for host in arguments.hosts:
        start = time.perf_counter()
        results = by_host[host] = measure(host, arguments.steps)
        print_table(host, results, arguments.steps)
        path = arguments.output / f"gaussian_mixture_{host}.json"
        plain = {
            name: {k: fit._asdict() for k, fit in by_particles.items()}
            for name, by_particles in results.items()
        }
        path.write_text(json.dumps(plain, indent=1))
        print(f"{time.perf_counter() - start:.0f} s; saved as {path}")
    if arguments.figure:
        draw_figure(by_host, arguments.figure)
        print(f"Plots saved as {arguments.figure}")


if __name__ == "__main__":
    main()
