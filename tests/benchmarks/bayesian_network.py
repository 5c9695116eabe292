"""A Bayesian neural network on real data: guides that can only be sampled, mean field, and NUTS.

    python -m tests.benchmarks.bayesian_network [numpyro pyro]

Fuel consumption of 392 cars from 7 features (UCI's Auto MPG), 20 tanh units, 182 latents, over
random splits with a tenth of the cars held out. For each way to the posterior: log-likelihood per
held-out car of the mixture over posterior draws, and root-mean-square error of their mean, in miles
per gallon, with the standard error over splits. The column "beyond mean field" compares split by
split, which takes away how hard a split is.

The joint guide draws all 182 latents at once from 100 particles, where the rule of five particles
per dimension would ask for 910. The guide by units has 9 dimensions a unit and keeps to it.
"""

import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module

import numpy as np

from tutorials.auto_mpg import Split, load_split

NUM_SPLITS = {"numpyro": 6, "pyro": 3}
NUTS_DRAWS = {
    "numpyro": {"num_warmup": 500, "num_samples": 500},
    # Fewer and shorter trajectories: a gradient costs many times as much.
    "pyro": {"num_warmup": 150, "num_samples": 150, "max_tree_depth": 7},
}
NUM_STEPS = 4000
BATCH_SIZE = 64


def methods(host: str) -> dict[str, Callable]:
    """From seed, features and targets to posterior draws."""
    bnn = import_module(f"tutorials.bnn_{host}")
    gradest = import_module(f"{host}_gradest")
    stock = import_module(f"{host}.infer")
    nu_method = gradest.estimators.nu_method_score

    def fit(guide: Callable, objective: type, num_particles: int, learning_rate: float, **options):
        loss = objective(num_particles, **options, **bnn.OPTIONS)
        return bnn.fitter(
            guide, loss, num_steps=NUM_STEPS, learning_rate=learning_rate, batch_size=BATCH_SIZE
        )

    implicit = gradest.ImplicitELBO
    return {
        "mean field": fit(bnn.mean_field_guide(), stock.Trace_ELBO, 10, 0.01),
        "implicit, by units": fit(bnn.unit_guide, implicit, 50, 0.01),
        "implicit, joint": fit(bnn.joint_guide(), implicit, 100, 0.003),
        "joint, nu-method": fit(bnn.joint_guide(), implicit, 100, 0.003, score_estimator=nu_method),
        "NUTS": partial(bnn.nuts_draws, **NUTS_DRAWS[host]),
    }


def evaluate(host: str, method: Callable, split: Split, seed: int) -> tuple[float, float]:
    """Log-likelihood per held-out car, and root-mean-square error."""
    bnn = import_module(f"tutorials.bnn_{host}")
    asarray = import_module("torch").as_tensor if host == "pyro" else np.asarray
    draws = method(seed, asarray(split.features), asarray(split.targets))
    mean, noise = bnn.predict(asarray(split.held_out_features), draws)
    return split.scores(np.asarray(mean), np.asarray(noise))


def with_error(values: np.ndarray) -> str:
    return f"{values.mean():8.3f} ± {values.std(ddof=1) / np.sqrt(len(values)):.3f}"


def main(hosts: list[str]) -> None:
    warnings.filterwarnings("ignore", ".* they do not span the space")  # as said above
    for host in hosts:
        splits = [load_split(seed) for seed in range(NUM_SPLITS[host])]
        print(f"\n{host}, {len(splits)} splits: nats per car, and miles per gallon")
        print(f"{'':20}{'log-likelihood':>17}{'RMSE':>17}{'beyond mean field':>19}{'s a fit':>9}")
        scores = {}
        for name, method in methods(host).items():
            start = time.process_time()
            scores[name] = np.array(
                [evaluate(host, method, split, seed) for seed, split in enumerate(splits)]
            )
            seconds = (time.process_time() - start) / len(splits)
            lead = scores[name][:, 0] - scores["mean field"][:, 0]
            row = [with_error(column) for column in (*scores[name].T, lead)]
            print(f"{name:20}{row[0]:>17}{row[1]:>17}{row[2]:>19}{seconds:9.0f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(NUM_SPLITS))
