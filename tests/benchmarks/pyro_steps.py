"""Pyro: seconds per training step, against the same step without what is measured.

Prints one line of JSON; ``python -m tests.benchmarks`` runs it with one thread and reads it.
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import ELBO, SVI, RenyiELBO
from torch.nn.utils import parameters_to_vector

from pyro_gradest import IWAE, NVIL, OVIS, TVO, VIMCO
from pyro_gradest.estimators import (
    normalized_weights,
    ovis_gamma_learning_signal,
    vimco_learning_signal,
)
from tests.benchmarks import handwritten_torch
from tests.benchmarks.settings import (
    BATCH_SIZE,
    LAYER_1_SHAPE,
    LEARNING_RATE,
    NUM_AUXILIARY,
    NUM_GRADIENT_DRAWS,
    NUM_PARTICLES,
    NUM_ROUNDS,
)
from tests.benchmarks.timing import interleaved_seconds
from tests.benchmarks.vae_pyro import VariationalAutoencoder
from tutorials.digits import load_digits
from tutorials.sbn_pyro import OPTIONS, SigmoidBeliefNetwork

pyro.set_rng_seed(0)
DIGITS = load_digits()
# One network for all steps: what it has learnt does not change how long they take.
NETWORK = SigmoidBeliefNetwork(DIGITS.pixel_logits)


def svi_step(objective: ELBO, batch: torch.Tensor, programs: Any = NETWORK) -> Callable[[], None]:
    """``svi.step``, with the validation that Pyro has on by default."""
    optimizer = pyro.optim.Adam({"lr": LEARNING_RATE})
    svi = SVI(programs.model, programs.guide, optimizer, loss=objective)
    return lambda: svi.step(batch) and None


def without_validation(step: Callable[[], None]) -> Callable[[], None]:
    """The step with Pyro's validation off, which a hand-written one has none of."""

    def run() -> None:
        with pyro.validation_enabled(False):
            step()

    return run


def handwritten_step(num_particles: int, batch: torch.Tensor) -> Callable[[], None]:
    """The OVIS step without Pyro."""
    optimizer = torch.optim.Adam(NETWORK.parameters(), lr=LEARNING_RATE)
    return lambda: handwritten_torch.step(NETWORK, optimizer, batch, num_particles) and None


def gradient_noise(objective: ELBO, batch: torch.Tensor) -> float:
    """Root of the total variance of the gradient, before training."""
    pyro.set_rng_seed(0)
    network = SigmoidBeliefNetwork(DIGITS.pixel_logits)
    draws = []
    for _ in range(NUM_GRADIENT_DRAWS):
        network.zero_grad()
        objective.loss_and_grads(network.model, network.guide, batch)
        draws.append(parameters_to_vector([param.grad for param in network.parameters()]).numpy())
    return float(np.sqrt(np.stack(draws).astype(np.float64).var(axis=0, ddof=1).sum()))


def layer_1_steps() -> dict[str, Callable[[], None]]:
    """What turns log-weights into coefficients, and the model's step."""
    num_particles, batch_size = LAYER_1_SHAPE
    log_weights = 10.0 * torch.randn(LAYER_1_SHAPE)
    batch = torch.as_tensor(DIGITS.train[:batch_size])

    def coefficients(learning_signal: Callable) -> Callable[[], None]:
        return lambda: (normalized_weights(log_weights), learning_signal(log_weights)) and None

    return {
        "VIMCO": coefficients(vimco_learning_signal),
        "OVIS": coefficients(ovis_gamma_learning_signal),
        "model": svi_step(OVIS(num_particles, **OPTIONS), batch),
    }


def main() -> None:
    batch = torch.as_tensor(DIGITS.train[:BATCH_SIZE])
    autoencoder = VariationalAutoencoder(batch.shape[-1])
    results: dict = {"steps": {}, "noise": {}}
    for num_particles in NUM_PARTICLES:
        objectives = {
            "IWAE": IWAE(num_particles, **OPTIONS),
            "VIMCO": VIMCO(num_particles, **OPTIONS),
            "OVIS": OVIS(num_particles, **OPTIONS),
        }
        steps = {name: svi_step(objective, batch) for name, objective in objectives.items()}
        further = {
            "NVIL": NVIL(num_particles, **OPTIONS),
            "TVO": TVO(num_particles, **OPTIONS),
            "OVIS-MC": OVIS(num_particles, num_auxiliary=NUM_AUXILIARY, **OPTIONS),
        }
        steps |= {name: svi_step(objective, batch) for name, objective in further.items()}
        for reparam in ("pathwise", "dreg"):
            objective = IWAE(num_particles, reparam=reparam, **OPTIONS)
            steps[reparam] = svi_step(objective, batch, autoencoder)
        steps["OVIS, no validation"] = without_validation(steps["OVIS"])
        steps["handwritten"] = handwritten_step(num_particles, batch)
        renyi = RenyiELBO(alpha=0.0, num_particles=num_particles, **OPTIONS)
        steps["RenyiELBO"] = svi_step(renyi, batch)
        results["steps"][num_particles] = interleaved_seconds(steps, rounds=NUM_ROUNDS)
        results["noise"][num_particles] = {
            name: gradient_noise(objective, batch) for name, objective in objectives.items()
        }
    results["layer_1"] = interleaved_seconds(layer_1_steps(), rounds=3)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
