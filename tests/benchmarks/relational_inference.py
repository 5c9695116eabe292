"""Which particles are joined by springs, inferred from how they move.

    python -m tests.benchmarks.relational_inference [numpyro pyro] [--figure PATH]

After Kipf et al., "Neural Relational Inference for Interacting Systems" (2018), with the latent
spanning tree of Paulus et al., "Gradient Estimation with Stochastic Softmax Tricks" (2020): ten
particles in the plane, springs along a random tree, and ten noisy steps of each system. One network
scores all pairs of particles by their trajectories; the tree is a site whose state the solver
finds; another network, which knows neither the trees nor the law of springs, predicts how
velocities change from messages along the tree's edges alone.

Of held-out systems, with the heaviest tree of the scores: the share of its edges that are there,
which is precision and recall at once, as all trees have as many edges; the share of systems whose
tree is right throughout; and the root of the mean squared error of the predicted changes, in units
of the noise in them. "RLOO" is the score function at a ``SpanningTree`` site, at which "SIMPLE" and
"ReinMax" draw too; the others draw heaviest trees of perturbed scores. "known trees" is the first
network fitted to the trees themselves, by their exact log-probability: a reference. So is "least
squares", each system's own regression of accelerations on differences of positions, which is told
that springs are linear.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse.csgraph import minimum_spanning_tree
from tqdm import trange

NUM_PARTICLES, NUM_TIMES, NUM_SYSTEMS, NUM_HELD_OUT = 10, 10, 2000, 300
TIME_STEP, NUM_SUBSTEPS, SPRING, NOISE = 0.3, 30, 1.0, 0.05
NUM_HIDDEN, NUM_DECODER_HIDDEN = 32, 16
NUM_STEPS, BATCH_SIZE, LEARNING_RATE = 300, 16, 0.005
UNTRAINED, KNOWN, LEAST_SQUARES = "untrained", "known trees", "least squares"
CHANGE_NOISE = NOISE * np.sqrt(2)
"""Of a difference of two velocities."""
CHANCE = 2 / NUM_PARTICLES
"""Probability of an edge to be in a random tree."""


class Systems(NamedTuple):
    """Systems along the first axis."""

    places: np.ndarray
    """Halfway of each step, ``[systems, NUM_TIMES, NUM_PARTICLES, 2]``."""
    changes: np.ndarray
    """Of the velocities in each step, of the same shape."""
    trees: np.ndarray
    """Adjacency matrices."""


def heaviest_trees(weights: np.ndarray) -> np.ndarray:
    """Of symmetric weights ``[systems, n, n]``."""
    costs = np.triu(1 + weights.max() - weights, k=1)
    marked = np.stack([minimum_spanning_tree(cost).toarray() > 0 for cost in costs])
    return (marked | marked.transpose(0, 2, 1)).astype(np.float32)


def simulate(seed: int = 0) -> tuple[Systems, Systems]:
    """Systems to learn from, and held-out ones."""
    rng = np.random.default_rng(seed)
    shape = (NUM_SYSTEMS + NUM_HELD_OUT, NUM_PARTICLES)
    trees = heaviest_trees(rng.uniform(size=(*shape, NUM_PARTICLES)))
    laplacian = np.eye(NUM_PARTICLES) * trees.sum(axis=-1, keepdims=True) - trees
    place, velocity = rng.normal(size=(2, *shape, 2))
    step, states = TIME_STEP / NUM_SUBSTEPS, []
    for substep in range(NUM_TIMES * NUM_SUBSTEPS + 1):
        if substep % NUM_SUBSTEPS == 0:
            states.append((place, velocity))
        # Leapfrog: half a kick, a drift, half a kick.
        velocity = velocity - step / 2 * SPRING * laplacian @ place
        place = place + step * velocity
        velocity = velocity - step / 2 * SPRING * laplacian @ place
    places, velocities = np.moveaxis(np.array(states), 1, 0).swapaxes(1, 2)
    places = places + NOISE * rng.normal(size=places.shape)
    velocities = velocities + NOISE * rng.normal(size=velocities.shape)
    halfway, changes = (places[:, 1:] + places[:, :-1]) / 2, np.diff(velocities, axis=1)
    arrays = [x.astype(np.float32) for x in (halfway, changes, trees)]
    train, held_out = slice(NUM_SYSTEMS), slice(NUM_SYSTEMS, None)
    return Systems(*(x[train] for x in arrays)), Systems(*(x[held_out] for x in arrays))


def least_squares(systems: Systems, ridge: float = 0.01) -> np.ndarray:
    """Symmetric scores of the pairs: what differences of places do to changes of velocities."""
    moved = differences(systems.places).transpose(0, 2, 1, 4, 3)
    inputs = moved.reshape(*moved.shape[:2], -1, NUM_PARTICLES)
    outputs = systems.changes.swapaxes(1, 2).reshape(*inputs.shape[:3], 1)
    gram = inputs.mT @ inputs + ridge * np.eye(NUM_PARTICLES)
    springs = np.linalg.solve(gram, inputs.mT @ outputs)[..., 0]
    return springs + springs.mT


def initial_parameters() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    sizes = {
        "pair": (4, NUM_HIDDEN),
        "edge": (NUM_HIDDEN, NUM_HIDDEN),
        "node": (NUM_HIDDEN, NUM_HIDDEN),
        "score": (NUM_HIDDEN, 1),
        "message": (2, NUM_DECODER_HIDDEN),
        "change": (NUM_DECODER_HIDDEN, 2),
    }
    params = {}
    for name, (inputs, outputs) in sizes.items():
        params[name] = rng.normal(size=(inputs, outputs)) / np.sqrt(inputs)
        params[f"{name}_bias"] = np.zeros(outputs)
    return {name: value.astype(np.float32) for name, value in params.items()}


def differences(places: Any) -> Any:
    """From particle i to j, ``[..., i, j, 2]``."""
    return places[..., None, :, :] - places[..., :, None, :]


def scores_of(np: Any, params: dict[str, Any], places: Any, changes: Any) -> Any:
    """Of each pair, symmetric, ``[systems, n, n]``; ``np`` is the host's array library.

    What is put in of each step are the inner products of a pair's difference and the two changes,
    which no rotation changes.
    """

    def layer(name: str, values: Any) -> Any:
        return values @ params[name] + params[f"{name}_bias"]

    across = differences(places)
    own, other = changes[..., :, None, :], changes[..., None, :, :]
    products = [(across, across), (across, own), (across, other), (own, other)]
    pairs = np.stack([(one * two).sum(-1) for one, two in products], -1)
    edges = np.tanh(layer("edge", np.tanh(layer("pair", pairs)).mean(-4)))
    nodes = layer("node", edges.mean(-2))
    hidden = np.tanh(edges + nodes[..., :, None, :] + nodes[..., None, :, :])
    scores = layer("score", hidden)[..., 0]
    return scores + scores.mT


def changes_of(np: Any, params: dict[str, Any], places: Any, trees: Any) -> Any:
    """Predicted changes of velocities: each particle's sum of messages from its neighbours."""
    hidden = np.tanh(differences(places) @ params["message"] + params["message_bias"])
    messages = hidden @ params["change"] + params["change_bias"]
    return (trees[..., None, :, :, None] * messages).sum(-2)


class Way(NamedTuple):
    """How trees are inferred."""

    estimator: Any = None
    loss: Any = None


def ways(host: str) -> dict[str, Way]:
    package = import_module(f"{host}_gradest")
    e = package.estimators
    options = {} if host == "numpyro" else {"vectorize_particles": True, "max_plate_nesting": 1}
    return {
        "IMLE, step 0.1": Way(e.IMLE(step_size=0.1)),
        "IMLE, step 1": Way(e.IMLE()),
        "AdaptiveIMLE": Way(e.AdaptiveIMLE()),
        "StraightThrough": Way(e.StraightThrough()),
        "SIMPLE": Way(e.SIMPLE()),
        "ReinMax": Way(e.ReinMax()),
        "RLOO, 2 draws": Way(loss=package.RLOO(2, **options)),
        KNOWN: Way(),
    }


def batches(name: str, systems: Systems) -> Iterator[Systems]:
    """Systems of each step, under a progress bar."""
    rng = np.random.default_rng(2)
    for _ in trange(NUM_STEPS, desc=name, leave=False, mininterval=1.0):
        rows = rng.choice(NUM_SYSTEMS, size=BATCH_SIZE, replace=False)
        yield Systems(*(x[rows] for x in systems))


def programs(ppl: Any, dist: Any, np: Any, asarray: Callable, way: Way, package: Any) -> tuple:
    """Model and guide, and a model of known trees, in either host's primitives."""
    solver = package.estimators.spanning_tree()
    exact = package.SIMPLE, package.ReinMax

    def site(scores: Any) -> Any:
        if way.estimator is None or isinstance(way.estimator, exact):
            return package.SpanningTree(scores)
        return package.PerturbAndMAP(scores, solver)

    def parameters() -> dict[str, Any]:
        return {key: ppl.param(key, asarray(x)) for key, x in initial_parameters().items()}

    def model(places: Any, changes: Any, trees: Any) -> None:
        params = parameters()
        with ppl.plate("systems", len(places)):
            tree = ppl.sample("tree", site(np.zeros_like(trees)))
            predicted = changes_of(np, params, places, tree)
            ppl.sample("changes", dist.Normal(predicted, CHANGE_NOISE).to_event(3), obs=changes)

    def guide(places: Any, changes: Any, trees: Any) -> None:
        scores = scores_of(np, parameters(), places, changes)
        with ppl.plate("systems", len(places)):
            ppl.sample("tree", site(scores))

    def model_of_trees(places: Any, changes: Any, trees: Any) -> None:
        params = parameters()
        scores = scores_of(np, params, places, changes)
        with ppl.plate("systems", len(places)):
            ppl.sample("tree", site(scores), obs=trees)
            predicted = changes_of(np, params, places, trees)
            ppl.sample("changes", dist.Normal(predicted, CHANGE_NOISE).to_event(3), obs=changes)

    return model, guide, model_of_trees


def numpyro_fit(name: str, systems: Systems) -> dict[str, np.ndarray]:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    import optax
    from numpyro.infer import SVI, TraceMeanField_ELBO

    import numpyro_gradest

    way = ways("numpyro")[name]
    args = numpyro, dist, jnp, jnp.asarray, way, numpyro_gradest
    model, guide, model_of_trees = programs(*args)
    optimizer = optax.adam(LEARNING_RATE)
    if name == KNOWN:
        model, guide = model_of_trees, lambda *_: None
    if way.estimator is not None:
        config = {"tree": way.estimator}
        guide = numpyro_gradest.imle(guide, config)
        optimizer = numpyro_gradest.adapt_imle(optimizer, config)
    svi = SVI(model, guide, optimizer, loss=way.loss or TraceMeanField_ELBO())
    state = jax.jit(svi.init)(jax.random.key(0), *(x[:BATCH_SIZE] for x in systems))
    update = jax.jit(svi.update)
    for batch in batches(name, systems):
        state, _ = update(state, *batch)
    return {key: np.asarray(value) for key, value in svi.get_params(state).items()}


def pyro_fit(name: str, systems: Systems) -> dict[str, np.ndarray]:
    import pyro
    import torch
    from pyro import distributions as dist
    from pyro.infer import SVI, TraceMeanField_ELBO

    import pyro_gradest

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    way = ways("pyro")[name]
    args = pyro, dist, torch, torch.as_tensor, way, pyro_gradest
    model, guide, model_of_trees = programs(*args)
    if name == KNOWN:
        model, guide = model_of_trees, lambda *_: None
    if way.estimator is not None:
        guide = pyro_gradest.imle(guide, {"tree": way.estimator})
    optimizer = pyro.optim.Adam({"lr": LEARNING_RATE})
    svi = SVI(model, guide, optimizer, loss=way.loss or TraceMeanField_ELBO())
    for batch in batches(name, systems):
        svi.step(*map(torch.as_tensor, batch))
    return {key: value.detach().numpy() for key, value in pyro.get_param_store().items()}


FITS = {"numpyro": numpyro_fit, "pyro": pyro_fit}


def measure(scores: np.ndarray, params: dict[str, np.ndarray] | None, systems: Systems) -> tuple:
    """Shares of edges and of trees found, and the error of predictions along the trees."""
    trees = heaviest_trees(scores)
    edges = (trees * systems.trees).sum() / systems.trees.sum()
    whole = (trees == systems.trees).all(axis=(1, 2)).mean()
    if params is None:
        return edges, whole, np.nan
    error = changes_of(np, params, systems.places, trees) - systems.changes
    return edges, whole, np.sqrt((error**2).mean()) / CHANGE_NOISE


def draw_figure(by_host: dict[str, dict[str, tuple]], path: Path) -> None:
    """Shares of edges found, a panel for each host."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(by_host), figsize=(6 * len(by_host), 3.5), squeeze=False, layout="constrained"
    )
    for axis, (host, results) in zip(axes[0], by_host.items(), strict=True):
        bars = axis.barh(list(results), [100 * edges for edges, _, _ in results.values()])
        axis.bar_label(bars, fmt="%.0f", padding=2)
        axis.axvline(100 * CHANCE, color="black", linestyle=":", label="by chance")
        axis.set(title=host, xlabel="edges found, %", xlim=(0, 105))
        axis.invert_yaxis()
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("hosts", nargs="*", default=list(FITS), metavar="host")
    parser.add_argument("--figure", type=Path, help="where to save the plots")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", ".*discrete latent variables")  # these have a gradient
    systems, held_out = simulate()
    by_host: dict[str, dict[str, tuple]] = {}
    for host in arguments.hosts:
        print(f"\n{host}, {NUM_HELD_OUT} held-out systems; {CHANCE:.0%} of edges by chance")
        print(f"{'':18}{'edges':>9}{'trees':>9}{'error':>9}{'s a fit':>9}")
        fits: dict[str, Callable] = {UNTRAINED: lambda *_: initial_parameters()}
        fits |= {name: partial(FITS[host], name) for name in ways(host)}
        by_host[host] = {}
        for name, fit in fits.items():
            start = time.process_time()
            params = fit(systems)
            seconds = time.process_time() - start
            scores = scores_of(np, params, held_out.places, held_out.changes)
            edges, whole, error = by_host[host][name] = measure(scores, params, held_out)
            print(f"{name:18}{edges:9.1%}{whole:9.1%}{error:9.2f}{seconds:9.0f}", flush=True)
        edges, whole, _ = by_host[host][LEAST_SQUARES] = measure(
            least_squares(held_out), None, held_out
        )
        print(f"{LEAST_SQUARES:18}{edges:9.1%}{whole:9.1%}")
    if arguments.figure:
        draw_figure(by_host, arguments.figure)
        print(f"Plots saved as {arguments.figure}")


if __name__ == "__main__":
    main()
