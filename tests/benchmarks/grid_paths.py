"""Costs of a map's cells, learned from shortest paths alone.

    python -m tests.benchmarks.grid_paths [numpyro pyro]

Maps of 12 x 12 cells in the manner of the Warcraft maps of Vlastelica et al., "Differentiation of
Blackbox Combinatorial Solvers" (2020, section 4.1): five terrains in patches, each with its cost,
of which a network sees noisy features, cell by cell. The path is a site whose state the solver
finds, and the examples are observed around it; costs are never shown. Held-out maps are scored by
the share of predicted paths that cost as little, by the true costs, as the best path there is, and
by how much more the predicted paths cost together.

"untrained" is where all start. "true costs" is the same network fitted to the costs themselves by
least squares: a reference, and no bound, as that is not the loss of a path.
"""

import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter
from tqdm import trange

SIZE, NUM_MAPS, NUM_HELD_OUT = 12, 2000, 500
TERRAIN_COSTS = np.array([0.8, 1.2, 5.3, 7.7, 9.2])
NUM_FEATURES, NUM_HIDDEN, FEATURE_NOISE = 8, 20, 0.3
NUM_STEPS, NUM_COST_STEPS, BATCH_SIZE, LEARNING_RATE = 800, 4000, 32, 0.01
TEMPERATURE = 0.3
TRUE_COSTS = "true costs"


class Maps(NamedTuple):
    """Cells along the first axes, ``[maps, SIZE, SIZE]``."""

    features: np.ndarray
    costs: np.ndarray
    paths: np.ndarray


def simulate(solve: Callable, seed: int = 0) -> tuple[Maps, Maps]:
    """Maps to learn from, and held-out ones."""
    rng = np.random.default_rng(seed)
    height = gaussian_filter(rng.normal(size=(NUM_MAPS + NUM_HELD_OUT, SIZE, SIZE)), (0, 1, 1))
    bounds = np.quantile(height, np.linspace(0, 1, len(TERRAIN_COSTS) + 1)[1:-1])
    terrain = rng.permutation(len(TERRAIN_COSTS))[np.digitize(height, bounds)]
    looks = rng.normal(size=(len(TERRAIN_COSTS), NUM_FEATURES))
    features = looks[terrain] + FEATURE_NOISE * rng.normal(size=(*terrain.shape, NUM_FEATURES))
    costs = TERRAIN_COSTS[terrain]
    maps = Maps(*(x.astype(np.float32) for x in (features, costs, solve(-costs))))
    return Maps(*(x[:NUM_MAPS] for x in maps)), Maps(*(x[NUM_MAPS:] for x in maps))


def initial_parameters() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    params = {
        "hidden": rng.normal(size=(NUM_FEATURES, NUM_HIDDEN)) / np.sqrt(NUM_FEATURES),
        "hidden_bias": np.zeros(NUM_HIDDEN),
        "output": rng.normal(size=NUM_HIDDEN) / np.sqrt(NUM_HIDDEN),
        "output_bias": np.zeros(()),
    }
    return {name: value.astype(np.float32) for name, value in params.items()}


def costs_of(np: Any, params: dict[str, Any], features: Any) -> Any:
    """Of each cell; ``np`` is the host's array library."""
    hidden = np.tanh(features @ params["hidden"] + params["hidden_bias"])
    return np.exp(hidden @ params["output"] + params["output_bias"])


def estimators(host: str) -> dict[str, Any]:
    package = import_module(f"{host}_gradest.estimators")
    return {
        "IMLE, step 0.3": package.IMLE(step_size=0.3),
        "IMLE, step 3": package.IMLE(step_size=3.0),
        "AdaptiveIMLE": package.AdaptiveIMLE(),
        "StraightThrough": package.StraightThrough(),
    }


def batches(name: str) -> Any:
    """Indices of the maps of each step, under a progress bar."""
    rng = np.random.default_rng(2)
    num_steps = NUM_COST_STEPS if name == TRUE_COSTS else NUM_STEPS
    for _ in trange(num_steps, desc=name, leave=False, mininterval=1.0):
        yield rng.choice(NUM_MAPS, size=BATCH_SIZE, replace=False)


def programs(ppl: Any, dist: Any, np: Any, asarray: Callable, site: Callable) -> tuple:
    """Model and guide of paths, and a model of costs, in either host's primitives."""

    def costs(features: Any) -> Any:
        params = {key: ppl.param(key, asarray(x)) for key, x in initial_parameters().items()}
        return costs_of(np, params, features)

    def model(features: Any, examples: Any) -> None:
        theta = -costs(features)
        with ppl.plate("maps", len(features)):
            path = ppl.sample("path", site(theta))
            ppl.sample("example", dist.Normal(path, 1.0).to_event(2), obs=examples)

    def guide(features: Any, examples: Any) -> None:
        theta = -costs(features)
        with ppl.plate("maps", len(features)):
            # The law of the model, so that their divergence is zero.
            ppl.sample("path", site(theta))

    def cost_model(features: Any, examples: Any) -> None:
        ppl.sample("cost", dist.Normal(costs(features), 1.0).to_event(3), obs=examples)

    return model, guide, cost_model


def numpyro_fit(name: str, maps: Maps, solver: Any) -> dict[str, np.ndarray]:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    import optax
    from numpyro.infer import SVI, TraceMeanField_ELBO

    from numpyro_gradest import PerturbAndMAP, adapt_imle, imle

    site = partial(PerturbAndMAP, solver=solver, temperature=TEMPERATURE)
    model, guide, cost_model = programs(numpyro, dist, jnp, jnp.asarray, site)
    if name == TRUE_COSTS:
        model, guide, config, targets = cost_model, lambda *_: None, {}, maps.costs
    else:
        config, targets = {"path": estimators("numpyro")[name]}, maps.paths
    optimizer = adapt_imle(optax.adam(LEARNING_RATE), config)
    svi = SVI(model, imle(guide, config), optimizer, loss=TraceMeanField_ELBO())
    state = svi.init(jax.random.key(0), maps.features[:BATCH_SIZE], targets[:BATCH_SIZE])
    update = jax.jit(svi.update)
    for rows in batches(name):
        state, _ = update(state, maps.features[rows], targets[rows])
    return {key: np.asarray(value) for key, value in svi.get_params(state).items()}


def pyro_fit(name: str, maps: Maps, solver: Any) -> dict[str, np.ndarray]:
    import pyro
    import torch
    from pyro import distributions as dist
    from pyro.infer import SVI, TraceMeanField_ELBO

    from pyro_gradest import PerturbAndMAP, imle

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    site = partial(PerturbAndMAP, solver=solver, temperature=TEMPERATURE)
    model, guide, cost_model = programs(pyro, dist, torch, torch.as_tensor, site)
    if name == TRUE_COSTS:
        model, guide, config, targets = cost_model, lambda *_: None, {}, maps.costs
    else:
        config, targets = {"path": estimators("pyro")[name]}, maps.paths
    optimizer = pyro.optim.Adam({"lr": LEARNING_RATE})
    svi = SVI(model, imle(guide, config), optimizer, loss=TraceMeanField_ELBO())
    for rows in batches(name):
        svi.step(torch.as_tensor(maps.features[rows]), torch.as_tensor(targets[rows]))
    return {key: value.detach().numpy() for key, value in pyro.get_param_store().items()}


FITS = {"numpyro": numpyro_fit, "pyro": pyro_fit}


def score(solve: Callable, params: dict[str, np.ndarray], maps: Maps) -> tuple[float, float]:
    """Share of the paths that cost as little as possible, and what all cost beyond that."""
    paths = solve(-costs_of(np, params, maps.features))
    reached, least = ((maps.costs * path).sum((1, 2)) for path in (paths, maps.paths))
    return float(np.mean(reached < least + 1e-3)), float(reached.sum() / least.sum() - 1)


def main(hosts: list[str]) -> None:
    warnings.filterwarnings("ignore", ".*discrete latent variables")  # these have a gradient
    for host in hosts:
        solver = import_module(f"{host}_gradest.estimators").shortest_path()
        asarray = import_module("torch").as_tensor if host == "pyro" else np.asarray

        def solve(theta: np.ndarray, solver: Any = solver, asarray: Callable = asarray) -> Any:
            return np.asarray(solver(asarray(theta)))

        maps, held_out = simulate(solve)
        fits = {"untrained": lambda *_: initial_parameters()}
        for name in (*estimators(host), TRUE_COSTS):
            fits[name] = partial(FITS[host], name)
        print(f"\n{host}, {NUM_HELD_OUT} held-out maps")
        print(f"{'':18}{'optimal paths':>15}{'excess cost':>13}{'s a fit':>9}")
        for name, fit in fits.items():
            start = time.process_time()
            params = fit(maps, solver)
            seconds = time.process_time() - start
            share, excess = score(solve, params, held_out)
            print(f"{name:18}{share:15.1%}{excess:13.1%}{seconds:9.0f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(FITS))
