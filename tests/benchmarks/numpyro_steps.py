"""NumPyro: seconds per training step, against the same step without what is measured.

Prints one line of JSON; ``python -m tests.benchmarks`` runs it with one thread and reads it.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from numpyro.infer import ELBO, SVI

from numpyro_gradest import IWAE, NVIL, OVIS, TVO, VIMCO
from numpyro_gradest.estimators import (
    normalized_weights,
    ovis_gamma_learning_signal,
    vimco_learning_signal,
)
from tests.benchmarks import handwritten_jax, vae_numpyro
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
from tutorials.digits import load_digits
from tutorials.sbn_numpyro import SigmoidBeliefNetwork

DIGITS = load_digits()
NETWORK = SigmoidBeliefNetwork(DIGITS.pixel_logits)


def svi_step(objective: ELBO, batch: jax.Array, programs: Any = NETWORK) -> Callable[[], None]:
    """A jitted ``svi.update``."""
    guide = programs.guide
    if isinstance(objective, NVIL):
        guide = objective.with_baseline(guide)
    svi = SVI(programs.model, guide, optax.adam(LEARNING_RATE), loss=objective)
    state = svi.init(jax.random.key(0), batch)
    update = jax.jit(svi.update)

    def step() -> None:
        nonlocal state
        state, loss = update(state, batch)
        loss.block_until_ready()

    return step


def handwritten_step(num_particles: int, batch: jax.Array) -> Callable[[], None]:
    """The OVIS step without NumPyro."""
    optimizer = optax.adam(LEARNING_RATE)
    params, key = start(batch), jax.random.key(0)
    state = optimizer.init(params)
    update = handwritten_jax.make_step(optimizer, DIGITS.pixel_logits, num_particles)

    def step() -> None:
        nonlocal params, state, key
        params, state, key, loss = update(params, state, key, batch)
        loss.block_until_ready()

    return step


def start(batch: jax.Array) -> dict[str, jax.Array]:
    """The parameters before training."""
    svi = SVI(NETWORK.model, NETWORK.guide, optax.adam(LEARNING_RATE), loss=IWAE(1))
    return svi.get_params(svi.init(jax.random.key(0), batch))


def gradient_noise(objective: ELBO, batch: jax.Array) -> float:
    """Root of the total variance of the gradient, before training."""
    params = start(batch)

    @jax.jit
    def gradient(key: jax.Array) -> jax.Array:
        loss = objective.loss
        return ravel_pytree(
            jax.grad(lambda p: loss(key, p, NETWORK.model, NETWORK.guide, batch))(params)
        )[0]

    keys = jax.random.split(jax.random.key(0), NUM_GRADIENT_DRAWS)
    draws = np.stack([np.asarray(gradient(key), np.float64) for key in keys])
    return float(np.sqrt(draws.var(axis=0, ddof=1).sum()))


def layer_1_steps() -> dict[str, Callable[[], None]]:
    """What turns log-weights into coefficients, compiled as one function, and the model's step."""
    num_particles, batch_size = LAYER_1_SHAPE
    log_weights = 10.0 * jax.random.normal(jax.random.key(0), LAYER_1_SHAPE)
    batch = jnp.asarray(DIGITS.train[:batch_size])

    def coefficients(learning_signal: Callable) -> Callable[[], None]:
        compiled = jax.jit(lambda lw: (normalized_weights(lw), learning_signal(lw)))
        return lambda: jax.block_until_ready(compiled(log_weights)) and None

    return {
        "VIMCO": coefficients(vimco_learning_signal),
        "OVIS": coefficients(ovis_gamma_learning_signal),
        "model": svi_step(OVIS(num_particles), batch),
    }


def main() -> None:
    batch = jnp.asarray(DIGITS.train[:BATCH_SIZE])
    results: dict = {"steps": {}, "noise": {}}
    for num_particles in NUM_PARTICLES:
        objectives = {
            "IWAE": IWAE(num_particles),
            "VIMCO": VIMCO(num_particles),
            "OVIS": OVIS(num_particles),
        }
        steps = {name: svi_step(objective, batch) for name, objective in objectives.items()}
        further = {
            "NVIL": NVIL(num_particles),
            "TVO": TVO(num_particles),
            "OVIS-MC": OVIS(num_particles, num_auxiliary=NUM_AUXILIARY),
        }
        steps |= {name: svi_step(objective, batch) for name, objective in further.items()}
        for reparam in ("pathwise", "dreg"):
            objective = IWAE(num_particles, reparam=reparam)
            steps[reparam] = svi_step(objective, batch, vae_numpyro)
        steps["handwritten"] = handwritten_step(num_particles, batch)
        results["steps"][num_particles] = interleaved_seconds(steps, rounds=NUM_ROUNDS)
        results["noise"][num_particles] = {
            name: gradient_noise(objective, batch) for name, objective in objectives.items()
        }
    results["layer_1"] = interleaved_seconds(layer_1_steps(), rounds=3)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
