"""How well a guide that can only be sampled is fitted, by score estimator.

    python -m tests.benchmarks.implicit_fits [numpyro pyro]

Gaussian targets, a linear guide and K = 5 D particles: the Kullback-Leibler divergence from guide
to target in nats, and the error of the variances, in exact form. Then three two-dimensional
targets that no Gaussian fits (those of Lim and Johansen, "Particle semi-implicit variational
inference", 2024, section 5.2), a network for a guide and K = 100: the sliced 2-Wasserstein distance
between 10,000 draws of either, beside that of two sets of exact draws. The same network also as a
semi-implicit guide, around whose value the latents are normal, over normal noise ("SIVI") and over
100 particles whose places are learned ("particles").
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

DIMS = (4, 16)
CORRELATIONS = (0.0, 0.9)
NUM_STEPS = {"gaussian": 2000, "shape": 4000}
LEARNING_RATE = {"gaussian": 0.02, "shape": 0.002}
NUM_HIDDEN, NUM_NOISE, NUM_PARTICLES, NUM_DRAWS = 50, 10, 100, 10_000


def banana(rng: np.random.Generator, n: int) -> np.ndarray:
    first = 2.0 * rng.normal(size=n)
    return np.stack([first, first**2 / 4 + rng.normal(size=n)], axis=-1)


# weights, means, covariances
MIXTURES = {
    "four modes": (
        [0.125, 0.125, 0.5, 0.25],
        [[2, 2], [-2, -2], [2, -2], [-2, 2]],
        [np.eye(2)] * 4,
    ),
    "X": ([0.5, 0.5], [[0, 0]] * 2, [[[2, 1.8], [1.8, 2]], [[2, -1.8], [-1.8, 2]]]),
}
SHAPES = ("banana", *MIXTURES)
SEMI_IMPLICIT = ("SIVI", "particles")
NUM_MIXING = 50


def exact_draws(shape: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if shape == "banana":
        return banana(rng, NUM_DRAWS)
    weights, means, covariances = MIXTURES[shape]
    component = rng.choice(len(weights), p=weights, size=NUM_DRAWS)
    factors = np.linalg.cholesky(covariances)
    noise = rng.normal(size=(NUM_DRAWS, 2))
    return np.asarray(means)[component] + np.einsum("nij,nj->ni", factors[component], noise)


def sliced_wasserstein(left: np.ndarray, right: np.ndarray) -> float:
    angles = np.linspace(0.0, np.pi, 200, endpoint=False)
    directions = np.stack([np.cos(angles), np.sin(angles)])
    difference = np.sort(left @ directions, axis=0) - np.sort(right @ directions, axis=0)
    return float(np.sqrt((difference**2).mean()))


def covariance(dim: int, correlation: float) -> np.ndarray:
    return (1 - correlation) * np.eye(dim) + correlation * np.ones((dim, dim))


def divergence(mean: np.ndarray, cov: np.ndarray, target: np.ndarray) -> float:
    """KL of a Gaussian from one with mean one."""
    solved = np.linalg.solve(target, np.column_stack([cov, mean - 1]))
    log_det = np.linalg.slogdet(target)[1] - np.linalg.slogdet(cov)[1]
    return float(
        0.5 * (np.trace(solved[:, :-1]) - len(mean) + log_det + (mean - 1) @ solved[:, -1])
    )


def estimators(host: str) -> dict[str, Callable | None]:
    scores = import_module(f"{host}_gradest.estimators")
    return {
        "default": None,
        "Stein": scores.stein_score,
        "Stein, RBF": partial(scores.stein_score, kernel=scores.RBF()),
        "spectral": scores.spectral_score,
        "score matching": scores.score_matching_score,
        "parametric Stein": scores.parametric_stein_score,
        "exponential family": scores.kernel_exponential_family_score,
        "nu-method": scores.nu_method_score,
        "KDE": scores.kde_score,
    }


def loss_of(host: str, name: str, num_particles: int, **options: object) -> object:
    package = import_module(f"{host}_gradest")
    if name in SEMI_IMPLICIT:
        return package.SemiImplicitELBO(num_particles, num_mixing=NUM_MIXING, **options)
    return package.ImplicitELBO(num_particles, score_estimator=estimators(host)[name], **options)


def numpyro_fit(target: Callable, value: Callable, init: dict, **options: Any) -> tuple:
    import jax
    import jax.numpy as jnp
    import numpyro
    import optax
    from jax import random
    from numpyro import distributions as dist
    from numpyro.infer import SVI, Predictive

    from numpyro_gradest import Implicit

    name, steps, dim = options["name"], options["num_steps"], options["dim"]
    auxiliary = {"is_auxiliary": True}

    def guide() -> None:
        params = {key: numpyro.param(key, jnp.asarray(start)) for key, start in init.items()}
        if name == "particles":
            index = numpyro.sample(
                "index", dist.Categorical(logits=jnp.zeros(100)), infer=auxiliary
            )
            noise = params["places"][index]
        else:
            normal = dist.Normal(0.0, 1.0).expand([dim]).to_event(1)
            noise = numpyro.sample("noise", normal, infer=auxiliary)
        z = value(jnp.tanh, params, noise)
        if name in SEMI_IMPLICIT:
            numpyro.sample("z", dist.Normal(z, jnp.exp(params["log_scale"])).to_event(1))
        else:
            numpyro.sample("z", Implicit(z, event_dim=1))

    schedule = optax.cosine_decay_schedule(options["learning_rate"], steps)
    loss = loss_of("numpyro", name, options["num_particles"])
    svi = SVI(partial(target, numpyro, dist, jnp.asarray), guide, optax.adam(schedule), loss=loss)
    result = svi.run(random.key(0), steps, progress_bar=False)
    draws = Predictive(guide, params=result.params, num_samples=NUM_DRAWS)(random.key(1))
    return jax.tree.map(np.asarray, (result.params, draws["z"]))


def pyro_fit(target: Callable, value: Callable, init: dict, **options: Any) -> tuple:
    import pyro
    import torch
    from pyro import distributions as dist
    from pyro.infer import SVI

    from pyro_gradest import Implicit

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    name, steps, dim = options["name"], options["num_steps"], options["dim"]
    auxiliary = {"is_auxiliary": True}
    batch: list[int] = []

    def guide() -> torch.Tensor:
        params = {
            key: pyro.param(key, torch.as_tensor(start).float()) for key, start in init.items()
        }
        if name == "particles":
            uniform = dist.Categorical(logits=torch.zeros(100)).expand(batch)
            noise = params["places"][pyro.sample("index", uniform, infer=auxiliary)]
        else:
            normal = dist.Normal(0.0, 1.0).expand([*batch, dim]).to_event(1)
            noise = pyro.sample("noise", normal, infer=auxiliary)
        z = value(torch.tanh, params, noise)
        if name in SEMI_IMPLICIT:
            return pyro.sample("z", dist.Normal(z, params["log_scale"].exp()).to_event(1))
        return pyro.sample("z", Implicit(z, event_dim=1))

    def asarray(x: object) -> torch.Tensor:
        return torch.as_tensor(np.asarray(x)).float()

    optimizer = pyro.optim.PyroLRScheduler(
        torch.optim.lr_scheduler.CosineAnnealingLR,
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": options["learning_rate"]},
            "T_max": steps,
        },
    )
    loss = loss_of(
        "pyro", name, options["num_particles"], vectorize_particles=True, max_plate_nesting=0
    )
    svi = SVI(partial(target, pyro, dist, asarray), guide, optimizer, loss=loss)
    for _ in range(steps):
        svi.step()
        optimizer.step()
    batch.append(NUM_DRAWS)
    with torch.no_grad():
        draws = guide().numpy()
    store = pyro.get_param_store()
    return {key: store[key].detach().numpy() for key in init}, draws


FITS = {"numpyro": numpyro_fit, "pyro": pyro_fit}


def fit_gaussian(host: str, dim: int, correlation: float, name: str) -> str:
    target = covariance(dim, correlation)

    def model(ppl, dist, asarray) -> None:
        law = dist.MultivariateNormal(asarray(np.ones(dim)), asarray(target))
        ppl.sample("z", law)

    def value(tanh, params, noise):
        return params["loc"] + noise @ params["factor"]

    init = {"loc": np.zeros(dim), "factor": 0.5 * np.eye(dim)}
    params, _ = FITS[host](
        model,
        value,
        init,
        name=name,
        dim=dim,
        num_particles=5 * dim,
        num_steps=NUM_STEPS["gaussian"],
        learning_rate=LEARNING_RATE["gaussian"],
    )
    fitted = params["factor"].T.astype(float) @ params["factor"].astype(float)
    error = np.mean(np.diag(fitted) / np.diag(target)) - 1
    return f"{divergence(params['loc'].astype(float), fitted, target):12.4f}{error:+12.3f}"


def fit_shape(host: str, shape: str, name: str) -> str:
    def model(ppl, dist, asarray) -> None:
        if shape == "banana":
            ppl.sample("z", banana_distribution(host)())
            return
        weights, means, covariances = map(asarray, MIXTURES[shape])
        normals = dist.MultivariateNormal(means, covariances)
        ppl.sample("z", dist.MixtureSameFamily(dist.Categorical(weights), normals))

    def value(tanh, params, noise):
        hidden = tanh(noise @ params["V1"] + params["b1"])
        hidden = tanh(hidden @ params["V2"] + params["b2"])
        return noise @ params["skip"] + hidden @ params["V3"] + params["b3"]

    rng = np.random.default_rng(0)
    sizes = {
        "V1": ((NUM_NOISE, NUM_HIDDEN), 0.3),
        "b1": ((NUM_HIDDEN,), 0.3),
        "V2": ((NUM_HIDDEN, NUM_HIDDEN), 0.15),
        "b2": ((NUM_HIDDEN,), 0.1),
        "V3": ((NUM_HIDDEN, 2), 0.2),
        "b3": ((2,), 0.0),
        "skip": ((NUM_NOISE, 2), 0.5),
    }
    init = {key: std * rng.normal(size=size) for key, (size, std) in sizes.items()}
    if name in SEMI_IMPLICIT:
        init["log_scale"] = np.full(2, np.log(0.5))
    if name == "particles":
        init["places"] = rng.normal(size=(100, NUM_NOISE))
    _, draws = FITS[host](
        model,
        value,
        init,
        name=name,
        dim=NUM_NOISE,
        num_particles=NUM_PARTICLES,
        num_steps=NUM_STEPS["shape"],
        learning_rate=LEARNING_RATE["shape"],
    )
    return f"{sliced_wasserstein(draws.reshape(-1, 2), exact_draws(shape, 1)):12.3f}"


def banana_distribution(host: str) -> type:
    """The banana as a distribution of the host."""
    if host == "numpyro":
        from numpyro import distributions as dist

        base, options = dist.Distribution, {}
    else:
        from pyro import distributions as dist

        base, options = dist.TorchDistribution, {"arg_constraints": {}}

    def init(self) -> None:
        base.__init__(self, batch_shape=(), event_shape=(2,), validate_args=False)

    def log_prob(self, value):
        first, second = value[..., 0], value[..., 1]
        return dist.Normal(0.0, 2.0).log_prob(first) + dist.Normal(first**2 / 4, 1.0).log_prob(
            second
        )

    members = {"support": dist.constraints.real_vector, "__init__": init, "log_prob": log_prob}
    return type("Banana", (base,), members | options)


def main(hosts: list[str]) -> None:
    for host in hosts:
        start = time.perf_counter()
        print(f"\n{host}: Gaussian, linear guide, K = 5 D   KL, nats   variance error")
        for dim in DIMS:
            for correlation in CORRELATIONS:
                for name in estimators(host):
                    what = f"D={dim}, correlation {correlation}, {name}"
                    print(f"{what:48}{fit_gaussian(host, dim, correlation, name)}", flush=True)
        print(f"\n{host}: two-dimensional shapes, K = {NUM_PARTICLES}     sliced Wasserstein")
        for shape in SHAPES:
            floor = sliced_wasserstein(exact_draws(shape, 2), exact_draws(shape, 1))
            print(f"{f'{shape}, exact draws':48}{floor:12.3f}")
            for name in (*estimators(host), *SEMI_IMPLICIT):
                print(f"{f'{shape}, {name}':48}{fit_shape(host, shape, name)}", flush=True)
        print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:] or list(FITS))
