"""Bayesian logistic regression on real data: implicit guides against long NUTS of the same host.

    python -m tests.benchmarks.logistic_regression [numpyro pyro]

The tumours of scikit-learn's ``breast_cancer`` (569 of them, 30 standardised features, 31
coefficients with standard normal priors). For each guide, over the 31 coefficients: the largest
error of a posterior mean, in posterior standard deviations, and the largest and the median error
of a marginal standard deviation, relative, each beside what two halves of the NUTS draws differ by.
From K = 200 draws in 31 dimensions a score estimate sees little but means and covariances, so that
a guide that is flexible drifts in what it does not see: the last row is three times as long.
"""

import sys
import time
from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler

NUM_PARTICLES = 200
NUM_STEPS = 2000
LEARNING_RATE = 0.01
NUM_DRAWS = 20_000
WARMUP = 1000
NUM_NUTS = {"numpyro": 20_000, "pyro": 3000}
GUIDES = ("implicit", "implicit, Stein", "mean field", "full rank", "implicit, longer")


def data() -> tuple[np.ndarray, np.ndarray]:
    features, labels = load_breast_cancer(return_X_y=True)
    return StandardScaler().fit_transform(features), labels.astype(float)


def num_steps(guide: str) -> int:
    return 3 * NUM_STEPS if guide.endswith("longer") else NUM_STEPS


def score_estimator(package: ModuleType, guide: str) -> Callable | None:
    return package.estimators.stein_score if guide == "implicit, Stein" else None


def numpyro_draws() -> tuple[np.ndarray, Callable]:
    import jax
    import numpyro
    import optax
    from jax import numpy as jnp
    from jax import random
    from numpyro import distributions as dist
    from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
    from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

    package = import_module("numpyro_gradest")
    x, y = map(jnp.asarray, data())

    def model() -> None:
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([31]).to_event(1))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Bernoulli(logits=w[..., :1] + w[..., 1:] @ x.T), obs=y)

    def fit(name: str) -> np.ndarray:
        implicit = name.startswith("implicit")
        guide = {"mean field": AutoNormal, "full rank": AutoMultivariateNormal}.get(
            name, package.AutoImplicit
        )(model)
        loss = (
            package.ImplicitELBO(NUM_PARTICLES, score_estimator=score_estimator(package, name))
            if implicit
            else Trace_ELBO(NUM_PARTICLES)
        )
        schedule = optax.cosine_decay_schedule(LEARNING_RATE, num_steps(name))
        svi = SVI(model, guide, optax.adam(schedule), loss=loss)
        params = svi.run(random.key(0), num_steps(name), progress_bar=False).params
        draws = Predictive(guide, params=params, num_samples=NUM_DRAWS)(random.key(1))
        return np.asarray(draws["w"])

    chain = MCMC(
        NUTS(model), num_warmup=WARMUP, num_samples=NUM_NUTS["numpyro"], progress_bar=False
    )
    chain.run(random.key(0))
    return np.asarray(jax.device_get(chain.get_samples()["w"])), fit


def pyro_draws() -> tuple[np.ndarray, Callable]:
    import pyro
    import torch
    from pyro import distributions as dist
    from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
    from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

    package = import_module("pyro_gradest")
    x, y = (torch.as_tensor(each).float() for each in data())

    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([31]).to_event(1))
        logits = w[..., 0] + (w[..., 1:] * x).sum(-1)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)

    def fit(name: str) -> np.ndarray:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = {"mean field": AutoNormal, "full rank": AutoMultivariateNormal}.get(
            name, package.AutoImplicit
        )(model)
        options = {"vectorize_particles": True, "max_plate_nesting": 1}
        loss = (
            package.ImplicitELBO(
                NUM_PARTICLES, score_estimator=score_estimator(package, name), **options
            )
            if name.startswith("implicit")
            else Trace_ELBO(NUM_PARTICLES, **options)
        )
        optimizer = pyro.optim.PyroLRScheduler(
            torch.optim.lr_scheduler.CosineAnnealingLR,
            {
                "optimizer": torch.optim.Adam,
                "optim_args": {"lr": LEARNING_RATE},
                "T_max": num_steps(name),
            },
        )
        svi = SVI(model, guide, optimizer, loss=loss)
        for _ in range(num_steps(name)):
            svi.step()
            optimizer.step()
        sampler = Predictive(guide, num_samples=NUM_DRAWS, parallel=True, return_sites=["w"])
        return sampler()["w"].detach().reshape(-1, 31).numpy()

    pyro.set_rng_seed(0)
    kernel = NUTS(model, jit_compile=True, ignore_jit_warnings=True)
    chain = MCMC(kernel, num_samples=NUM_NUTS["pyro"], warmup_steps=WARMUP, disable_progbar=True)
    chain.run()
    return chain.get_samples()["w"].numpy(), fit


HOSTS = {"numpyro": numpyro_draws, "pyro": pyro_draws}


def errors(draws: np.ndarray, reference: np.ndarray) -> str:
    std = reference.std(axis=0)
    of_mean = np.abs(draws.mean(axis=0) - reference.mean(axis=0)) / std
    of_std = draws.std(axis=0) / std - 1
    worst = of_std[np.abs(of_std).argmax()]
    return f"{of_mean.max():10.3f}{worst:+12.3f}{np.median(of_std):+12.3f}"


def main(hosts: list[str]) -> None:
    for host in hosts:
        start = time.perf_counter()
        nuts, fit = HOSTS[host]()
        print(f"\n{host:28}{'mean':>10}{'std, worst':>12}{'median':>12}      seconds")
        halves = np.array_split(nuts, 2)
        print(f"{'NUTS, second half':28}{errors(halves[1], halves[0])}{_since(start)}", flush=True)
        for name in GUIDES:
            start = time.perf_counter()
            print(f"{name:28}{errors(fit(name), nuts)}{_since(start)}", flush=True)


def _since(start: float) -> str:
    return f"{time.perf_counter() - start:13.0f}"


if __name__ == "__main__":
    main(sys.argv[1:] or list(HOSTS))
