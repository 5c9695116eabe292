"""Peak memory of one chunked training step, in a process of its own.

    python -m tests.benchmarks.memory HOST NUM_PARTICLES

Prints one line of JSON: the peak resident memory in bytes, interpreter and libraries included.
"""

import json
import resource
import sys

from tests.benchmarks.settings import BATCH_SIZE, LEARNING_RATE, MEMORY_CHUNK
from tutorials.digits import load_digits


def numpyro_step(num_particles: int) -> float:
    """One update with NumPyro; returns the loss."""
    import jax
    import jax.numpy as jnp
    import optax
    from numpyro.infer import SVI

    from numpyro_gradest import OVIS
    from tutorials.sbn_numpyro import SigmoidBeliefNetwork

    digits = load_digits()
    network = SigmoidBeliefNetwork(digits.pixel_logits)
    objective = OVIS(num_particles, chunk_size=MEMORY_CHUNK)
    svi = SVI(network.model, network.guide, optax.adam(LEARNING_RATE), loss=objective)
    batch = jnp.asarray(digits.train[:BATCH_SIZE])
    _, loss = jax.jit(svi.update)(svi.init(jax.random.key(0), batch), batch)
    return float(loss)


def pyro_step(num_particles: int) -> float:
    """One step with Pyro; returns the loss."""
    import pyro
    import torch
    from pyro.infer import SVI

    from pyro_gradest import OVIS
    from tutorials.sbn_pyro import OPTIONS, SigmoidBeliefNetwork

    pyro.set_rng_seed(0)
    digits = load_digits()
    network = SigmoidBeliefNetwork(digits.pixel_logits)
    objective = OVIS(num_particles, chunk_size=MEMORY_CHUNK, **OPTIONS)
    optimizer = pyro.optim.Adam({"lr": LEARNING_RATE})
    svi = SVI(network.model, network.guide, optimizer, loss=objective)
    return svi.step(torch.as_tensor(digits.train[:BATCH_SIZE]))


def main(host: str, num_particles: int) -> None:
    loss = {"numpyro": numpyro_step, "pyro": pyro_step}[host](num_particles)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform != "darwin":  # which counts in bytes, others in KiB
        peak *= 1024
    print(json.dumps({"peak_bytes": peak, "loss": loss}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
