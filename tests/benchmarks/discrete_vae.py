"""An autoencoder whose code is made of subsets, on real digits: which gradient trains it?

    python -m tests.benchmarks.discrete_vae [numpyro] [pyro] [--epochs 10]

The code of an image is 20 groups of 20 bits, ten of them ones in each: a ``KSubset`` site under
``imle``, with a uniform prior. Encoder and decoder have hidden layers of 512 and 256 units; the
data are the binary digits of the tutorials, 4,500 to learn from and 500 held out. All start at the
same parameters and see the same batches. Per estimator, from one seed:

    train, held out    the negative evidence lower bound in nats per image, with the exact KL
                       divergence and the log-likelihood's mean over 5 draws; of as many images
    ms a step          processor time of the whole training step, at a batch of 100

In the first half of the training the divergence counts for less, with a weight that grows from zero
to one: in full from the start, it empties the code before the decoder has learned to read it. The
bounds given are those without a weight. "independent pixels" is the bound of an empty code; an
estimator that is still there has not begun to learn.

RLOO takes the score function with two draws of the code a step, the others one. At these sites
``StraightThrough`` has the gradient of ``SIMPLE``, and is left out. To end within minutes there are
45 steps an epoch and few epochs: the bounds are those of an early stage of training, and not what
the autoencoder could reach, nor how the estimators would rank there.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import pairwise
from typing import Any

import numpy as np
from tqdm import tqdm

from tests.benchmarks.__main__ import pin_to_one_core
from tutorials.digits import NUM_PIXELS, Digits, load_digits

GROUPS, ITEMS, ONES = 20, 20, 10
SIZES = {
    "encoder": (NUM_PIXELS, 512, 256, GROUPS * ITEMS),
    "decoder": (GROUPS * ITEMS, 256, 512, NUM_PIXELS),
}
BATCH, LEARNING_RATE, NUM_DRAWS = 100, 2e-3, 5
SITE = "code"
BATCHED = {"vectorize_particles": True, "max_plate_nesting": 1}


def initial_parameters(digits: Digits) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    parameters = {}
    for name, sizes in SIZES.items():
        for i, (inputs, outputs) in enumerate(pairwise(sizes)):
            weights = rng.normal(size=(inputs, outputs)) * np.sqrt(2 / inputs)
            parameters[f"{name}.{i}.weight"] = weights.astype(np.float32)
            parameters[f"{name}.{i}.bias"] = np.zeros(outputs, np.float32)
    parameters["decoder.2.bias"] = digits.pixel_logits
    return parameters


def network(name: str, parameters: dict[str, Any], values: Any) -> Any:
    for i in range(len(SIZES[name]) - 1):
        if i > 0:
            values = values.clip(0)
        values = values @ parameters[f"{name}.{i}.weight"] + parameters[f"{name}.{i}.bias"]
    return values


def estimators(package: Any) -> dict[str, Any]:
    return {
        "IMLE, step 0.2": package.IMLE(step_size=0.2),
        "IMLE, step 1": package.IMLE(),
        "AdaptiveIMLE": package.AdaptiveIMLE(),
        "ReinMax": package.ReinMax(),
        "SIMPLE": package.SIMPLE(),
        "RLOO, 2 draws": None,
    }


def programs(
    ppl: Any, dist: Any, scale: Any, package: Any, asarray: Callable, first: dict
) -> tuple[Callable, Callable]:
    """Model and guide in either host's primitives."""

    def parameters() -> dict[str, Any]:
        return {name: ppl.param(name, asarray(value)) for name, value in first.items()}

    def model(images: Any, weight: Any = 1.0) -> None:
        values, zeros = parameters(), asarray(np.zeros((GROUPS, ITEMS), np.float32))
        with ppl.plate("images", len(images)):
            with scale(scale=weight):
                code = ppl.sample(SITE, package.KSubset(zeros, ONES).to_event(1))
            logits = network("decoder", values, 2 * code.reshape(*code.shape[:-2], -1) - 1)
            ppl.sample("pixels", dist.Bernoulli(logits=logits).to_event(1), obs=images)

    def guide(images: Any, weight: Any = 1.0) -> None:
        logits = network("encoder", parameters(), images).reshape(-1, GROUPS, ITEMS)
        with ppl.plate("images", len(images)), scale(scale=weight):
            ppl.sample(SITE, package.KSubset(logits, ONES).to_event(1))

    return model, guide


class Pyro:
    """torch, eager."""

    def __init__(self, first: dict[str, np.ndarray]) -> None:
        import pyro
        import torch

        torch.set_num_threads(1)
        self.package, self.pyro, self.asarray = import_module("pyro_gradest"), pyro, torch.tensor
        self.no_grad, self.bound = torch.no_grad, pyro.infer.TraceMeanField_ELBO()
        dist, scale = pyro.distributions, pyro.poutine.scale
        self.model, self.guide = programs(pyro, dist, scale, self.package, torch.tensor, first)

    def start(self, estimator: Any) -> Callable[[np.ndarray, float], Any]:
        """A function that takes a step on images, the divergence having a weight."""
        self.pyro.clear_param_store()
        self.pyro.set_rng_seed(0)
        guide, loss = self.guide, self.package.RLOO(2, **BATCHED)
        if estimator:
            loss, guide = self.bound, self.package.imle(guide, {SITE: estimator})
        optimizer = self.pyro.optim.Adam({"lr": LEARNING_RATE})
        svi = self.pyro.infer.SVI(self.model, guide, optimizer, loss)
        return lambda images, weight: svi.step(self.asarray(images), weight)

    def evaluate(self, images: np.ndarray) -> float:
        """Nats per image, where the last step led to."""
        # The host's exact divergence asks for sites that carry a gradient, whatever it be.
        guide = self.package.imle(self.guide, {SITE: self.package.SIMPLE()})
        self.pyro.set_rng_seed(1)
        with self.no_grad():
            pixels = self.asarray(images)
            losses = [self.bound.loss(self.model, guide, pixels) for _ in range(NUM_DRAWS)]
        return float(np.mean(losses)) / len(images)


class NumPyro:
    """JAX, compiled."""

    def __init__(self, first: dict[str, np.ndarray]) -> None:
        import jax
        import numpyro

        self.package, self.jax, self.infer = import_module("numpyro_gradest"), jax, numpyro.infer
        dist, scale, asarray = numpyro.distributions, numpyro.handlers.scale, jax.numpy.asarray
        self.model, self.guide = programs(numpyro, dist, scale, self.package, asarray, first)
        bound = numpyro.infer.TraceMeanField_ELBO(NUM_DRAWS, vectorize_particles=False)
        self.bound = jax.jit(
            lambda params, images: bound.loss(
                jax.random.key(1), params, self.model, self.guide, images
            )
        )

    def start(self, estimator: Any) -> Callable[[np.ndarray, float], Any]:
        """A function that takes a step on images, the divergence having a weight."""
        import optax

        optimizer, guide, loss = optax.adam(LEARNING_RATE), self.guide, self.package.RLOO(2)
        if estimator:
            config = {SITE: estimator}
            loss, guide = self.infer.TraceMeanField_ELBO(), self.package.imle(guide, config)
            optimizer = self.package.adapt_imle(optimizer, config)
        self.svi = self.infer.SVI(self.model, guide, optimizer, loss)
        shape = (BATCH, NUM_PIXELS)
        self.state = self.svi.init(self.jax.random.key(0), np.zeros(shape, np.float32))
        update = self.jax.jit(self.svi.update)

        def step(images: np.ndarray, weight: float) -> None:
            self.state, loss = update(self.state, images, weight)
            loss.block_until_ready()

        return step

    def evaluate(self, images: np.ndarray) -> float:
        """Nats per image, where the last step led to."""
        params = self.svi.get_params(self.state)
        # Those of the networks: what an estimator keeps beside them would compile it again.
        networks = {name: value for name, value in params.items() if "coder" in name}
        return float(self.bound(networks, images)) / len(images)


HOSTS = {"numpyro": NumPyro, "pyro": Pyro}


def independent_pixels(digits: Digits, images: np.ndarray) -> float:
    """Nats per image of the training pixels' frequencies."""
    logits = digits.pixel_logits
    return float((np.logaddexp(0, logits) - images * logits).sum(axis=1).mean())


def study(name: str, num_epochs: int) -> Iterator[tuple[str, list[float]]]:
    digits = load_digits()
    parts = digits.train[: len(digits.held_out)], digits.held_out
    yield "independent pixels", [*(independent_pixels(digits, x) for x in parts), 0.0]
    host = HOSTS[name](initial_parameters(digits))
    for label, estimator in estimators(host.package).items():
        step = host.start(estimator)
        rng, seconds = np.random.default_rng(2), []
        weights = iter(
            np.linspace(0, 2, num_epochs * len(digits.train) // BATCH + 1)[1:].clip(0, 1)
        )
        for _ in tqdm(range(num_epochs), desc=label, unit="epoch", leave=False):
            order = rng.permutation(len(digits.train))
            for rows in order.reshape(-1, BATCH):
                before = time.process_time()
                step(digits.train[rows], float(next(weights)))
                seconds.append(time.process_time() - before)
        bounds = [host.evaluate(x) for x in parts]
        yield label, [*bounds, 1e3 * float(np.median(seconds))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("hosts", nargs="*", default=list(HOSTS))
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()
    pin_to_one_core()
    warnings.filterwarnings("ignore", ".*discrete latent variables")  # these have a gradient
    for host in arguments.hosts:
        title = f"{host}, {arguments.epochs} epochs"
        columns = ("train", "held out", "ms a step")
        print(f"\n{title:24}" + "".join(f"{column:>11}" for column in columns))
        for label, figures in study(host, arguments.epochs):
            print(f"{label:24}" + "".join(f"{x:11.1f}" for x in figures), flush=True)


if __name__ == "__main__":
    main()
