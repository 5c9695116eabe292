"""How well a guide that can only be sampled is fitted, by score estimator.

    python -m tests.benchmarks.implicit_fits [numpyro pyro]

Gaussian targets, a linear guide and K = 5 D particles: the Kullback-Leibler divergence from guide
to target in nats, and the error of the variances, in exact form. Then three two-dimensional
targets that no Gaussian fits, a network for a guide and K = 100: the sliced 2-Wasserstein distance
between 5,000 draws of either, beside that of two sets of exact draws.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module

import numpy as np

DIMS = (4, 16)
CORRELATIONS = (0.0, 0.9)
NUM_STEPS = {"gaussian": 2000, "shape": 4000}
LEARNING_RATE = {"gaussian": 0.02, "shape": 0.002}
NUM_HIDDEN, NUM_NOISE, NUM_PARTICLES, NUM_DRAWS = 50, 10, 100, 5000


def banana(rng: np.random.Generator, n: int) -> np.ndarray:
    first = 2.0 * rng.normal(size=n)
    return np.stack([first, first**2 / 4 + rng.normal(size=n)], axis=-1)


# weights, means, covariances
MIXTURES = {
    "four modes": (
        [0.125, 0.125, 0.5, 0.25],
        [[2, 2], [-2, -2], [2, -2], [-2, 2]],
        [0.25 * np.eye(2)] * 4,
    ),
    "X": ([0.5, 0.5], [[0, 0]] * 2, [[[2, 1.8], [1.8, 2]], [[2, -1.8], [-1.8, 2]]]),
}
SHAPES = ("banana", *MIXTURES)


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
    everything = {
        "default": None,
        "Stein": scores.stein_score,
        "Stein, RBF": partial(scores.stein_score, kernel=scores.RBF()),
        "spectral": scores.spectral_score,
        "score matching": scores.score_matching_score,
        "parametric Stein": scores.parametric_stein_score,
    }
    return everything if host == "numpyro" else dict(list(everything.items())[:2])


def numpyro_fit(target: Callable, value: Callable, init: dict, dim: int, **options: float) -> tuple:
    import jax
    import jax.numpy as jnp
    import numpyro
    import optax
    from jax import random
    from numpyro import distributions as dist
    from numpyro.infer import SVI, Predictive

    from numpyro_gradest import Implicit, ImplicitELBO

    def guide() -> None:
        params = {name: numpyro.param(name, jnp.asarray(start)) for name, start in init.items()}
        normal = dist.Normal(0.0, 1.0).expand([dim]).to_event(1)
        noise = numpyro.sample("noise", normal, infer={"is_auxiliary": True})
        numpyro.sample("z", Implicit(value(jnp.tanh, params, noise), event_dim=1))

    schedule = optax.cosine_decay_schedule(options["learning_rate"], options["num_steps"])
    loss = ImplicitELBO(options["num_particles"], score_estimator=options["score_estimator"])
    svi = SVI(partial(target, numpyro, dist, jnp.asarray), guide, optax.adam(schedule), loss=loss)
    result = svi.run(random.key(0), options["num_steps"], progress_bar=False)
    draws = Predictive(guide, params=result.params, num_samples=NUM_DRAWS)(random.key(1))
    return jax.tree.map(np.asarray, (result.params, draws["z"]))


def pyro_fit(target: Callable, value: Callable, init: dict, dim: int, **options: float) -> tuple:
    import pyro
    import torch
    from pyro import distributions as dist
    from pyro.infer import SVI

    from pyro_gradest import Implicit, ImplicitELBO

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    num_draws = None

    def guide() -> torch.Tensor:
        params = {
            name: pyro.param(name, torch.as_tensor(start).float()) for name, start in init.items()
        }
        batch = [] if num_draws is None else [num_draws]
        normal = dist.Normal(0.0, 1.0).expand([*batch, dim]).to_event(1)
        noise = pyro.sample("noise", normal, infer={"is_auxiliary": True})
        return pyro.sample("z", Implicit(value(torch.tanh, params, noise), event_dim=1))

    def asarray(x: object) -> torch.Tensor:
        return torch.as_tensor(np.asarray(x)).float()

    steps = options["num_steps"]
    optimizer = pyro.optim.PyroLRScheduler(
        torch.optim.lr_scheduler.CosineAnnealingLR,
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": options["learning_rate"]},
            "T_max": steps,
        },
    )
    loss = ImplicitELBO(
        options["num_particles"],
        score_estimator=options["score_estimator"],
        vectorize_particles=True,
        max_plate_nesting=0,
    )
    svi = SVI(partial(target, pyro, dist, asarray), guide, optimizer, loss=loss)
    for _ in range(steps):
        svi.step()
        optimizer.step()
    num_draws = NUM_DRAWS
    with torch.no_grad():
        draws = guide().numpy()
    store = pyro.get_param_store()
    return {name: store[name].detach().numpy() for name in init}, draws


FITS = {"numpyro": numpyro_fit, "pyro": pyro_fit}


def fit_gaussian(host: str, dim: int, correlation: float, score_estimator: Callable | None) -> str:
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
        dim,
        num_particles=5 * dim,
        score_estimator=score_estimator,
        num_steps=NUM_STEPS["gaussian"],
        learning_rate=LEARNING_RATE["gaussian"],
    )
    fitted = params["factor"].T.astype(float) @ params["factor"].astype(float)
    error = np.mean(np.diag(fitted) / np.diag(target)) - 1
    return f"{divergence(params['loc'].astype(float), fitted, target):12.4f}{error:+12.3f}"


def fit_shape(host: str, shape: str, score_estimator: Callable | None) -> str:
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
    init = {name: std * rng.normal(size=size) for name, (size, std) in sizes.items()}
    _, draws = FITS[host](
        model,
        value,
        init,
        NUM_NOISE,
        num_particles=NUM_PARTICLES,
        score_estimator=score_estimator,
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
                for name, estimator in estimators(host).items():
                    what = f"D={dim}, correlation {correlation}, {name}"
                    print(f"{what:48}{fit_gaussian(host, dim, correlation, estimator)}", flush=True)
        print(f"\n{host}: two-dimensional shapes, K = {NUM_PARTICLES}     sliced Wasserstein")
        for shape in SHAPES:
            floor = sliced_wasserstein(exact_draws(shape, 2), exact_draws(shape, 1))
            print(f"{f'{shape}, exact draws':48}{floor:12.3f}")
            for name, estimator in estimators(host).items():
                print(f"{f'{shape}, {name}':48}{fit_shape(host, shape, estimator)}", flush=True)
        print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:] or list(FITS))
