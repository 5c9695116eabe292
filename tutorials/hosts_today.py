"""What the hosts' importance-weighted losses get wrong today, beside gradest and the exact answer.

Run as ``python tutorials/hosts_today.py``. Every "exact" figure is computed without sampling, by
enumeration or in closed form; the others are means of many draws, with their standard errors.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as ndist
import pyro
import pyro.distributions as pdist
import torch
from numpyro.infer.autoguide import AutoMultivariateNormal as NumpyroJointGuide
from pyro.infer.autoguide import AutoMultivariateNormal as PyroJointGuide

import numpyro_gradest
import pyro_gradest


class Row(NamedTuple):
    """One comparison: what is right, what the host says, and what gradest says."""

    host: str
    exact: float
    renyi: tuple[float, float]
    gradest: tuple[float, float]


def mean_and_error(draws: np.ndarray) -> tuple[float, float]:
    """Mean of independent draws and its standard error."""
    return float(np.mean(draws)), float(np.std(draws) / math.sqrt(len(draws)))


# 1. A discrete guide. One coin z ~ Bernoulli(0.5), x ~ Normal(2 z, 1) seen at 2, guide logit phi.
LOGIT, OBSERVED, NUM_PARTICLES = -1.0, 2.0, 3


def discrete_exact() -> float:
    """Gradient of the expected bound with respect to phi, summed over all K-tuples of coins."""

    def expected_bound(phi: float) -> float:
        q = np.array([1 / (1 + math.exp(phi)), 1 / (1 + math.exp(-phi))])
        likelihood = np.exp(-0.5 * (OBSERVED - 2 * np.arange(2)) ** 2) / math.sqrt(2 * math.pi)
        weights = 0.5 * likelihood / q
        return sum(
            math.prod(q[list(z)]) * math.log(weights[list(z)].mean())
            for z in itertools.product([0, 1], repeat=NUM_PARTICLES)
        )

    step = 1e-5
    return (expected_bound(LOGIT + step) - expected_bound(LOGIT - step)) / (2 * step)


def discrete_pyro(elbo: pyro.infer.ELBO, num_draws: int) -> tuple[float, float]:
    """Estimates of that gradient: as many copies of the datum as draws, each with its own logit."""

    def model() -> None:
        with pyro.plate("copies", num_draws):
            z = pyro.sample("z", pdist.Bernoulli(0.5))
            pyro.sample("x", pdist.Normal(2 * z, 1.0), obs=torch.full((num_draws,), OBSERVED))

    def guide() -> None:
        logits = pyro.param("logits", torch.full((num_draws,), LOGIT))
        with pyro.plate("copies", num_draws):
            pyro.sample("z", pdist.Bernoulli(logits=logits))

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    elbo.loss_and_grads(model, guide)
    gradient = pyro.param("logits").grad
    return mean_and_error(np.zeros(num_draws) if gradient is None else -gradient.numpy())


def discrete_numpyro(elbo: numpyro.infer.ELBO, num_draws: int) -> tuple[float, float]:
    """The same in NumPyro."""

    def model() -> None:
        with numpyro.plate("copies", num_draws):
            z = numpyro.sample("z", ndist.Bernoulli(0.5))
            numpyro.sample("x", ndist.Normal(2.0 * z, 1.0), obs=jnp.full(num_draws, OBSERVED))

    def guide() -> None:
        logits = numpyro.param("logits", jnp.full(num_draws, LOGIT))
        with numpyro.plate("copies", num_draws):
            numpyro.sample("z", ndist.Bernoulli(logits=logits))

    def loss(params: dict) -> jax.Array:
        return elbo.loss(jax.random.key(0), params, model, guide)

    gradient = jax.grad(loss)({"logits": jnp.full(num_draws, LOGIT)})["logits"]
    return mean_and_error(-np.asarray(gradient))


# 2. A joint guide over a plate. z_i ~ Normal(0, 1), x_i ~ Normal(z_i, 1), all x_i seen at 1.
NUM_DATA = 5


def joint_exact() -> float:
    """Log-evidence: x_i ~ Normal(0, sqrt 2) independently."""
    return NUM_DATA * (-0.5 * math.log(2 * math.pi * 2) - 1 / 4)


def joint_pyro(elbo: pyro.infer.ELBO, num_draws: int) -> tuple[float, float]:
    """Mean bound with a multivariate normal guide at its initial parameters."""

    def model() -> None:
        with pyro.plate("data", NUM_DATA):
            z = pyro.sample("z", pdist.Normal(0.0, 1.0))
            pyro.sample("x", pdist.Normal(z, 1.0), obs=torch.ones(NUM_DATA))

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = PyroJointGuide(model, init_scale=0.5)
    return mean_and_error(np.array([-elbo.loss(model, guide) for _ in range(num_draws)]))


def joint_numpyro(elbo: numpyro.infer.ELBO, num_draws: int) -> tuple[float, float]:
    """The same in NumPyro."""

    def model() -> None:
        with numpyro.plate("data", NUM_DATA):
            z = numpyro.sample("z", ndist.Normal(0.0, 1.0))
            numpyro.sample("x", ndist.Normal(z, 1.0), obs=jnp.ones(NUM_DATA))

    guide = NumpyroJointGuide(model, init_scale=0.5)
    svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(0.1), elbo)
    params = svi.get_params(svi.init(jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), num_draws)
    losses = jax.vmap(lambda key: elbo.loss(key, params, model, guide))(keys)
    return mean_and_error(-np.asarray(losses))


# 3. Mini-batches in Pyro. The same model and 20 equal data in batches of five, a wide guide.
NUM_ROWS, BATCH_SIZE, GUIDE_SCALE = 20, 5, 1.5


def minibatch_exact() -> float:
    """Twenty times the expected bound of one datum, from a million draws (error below 0.02)."""
    z = GUIDE_SCALE * np.random.default_rng(0).standard_normal((NUM_PARTICLES, 1_000_000))
    log_p = -0.5 * z**2 - 0.5 * (1 - z) ** 2 - math.log(2 * math.pi)
    log_q = -0.5 * (z / GUIDE_SCALE) ** 2 - 0.5 * math.log(2 * math.pi) - math.log(GUIDE_SCALE)
    return NUM_ROWS * float(np.log(np.exp(log_p - log_q).mean(axis=0)).mean())


def minibatch_pyro(elbo: pyro.infer.ELBO, num_draws: int) -> tuple[float, float]:
    """Mean bound on mini-batches."""

    def model() -> None:
        with pyro.plate("data", NUM_ROWS, subsample_size=BATCH_SIZE):
            z = pyro.sample("z", pdist.Normal(0.0, 1.0))
            pyro.sample("x", pdist.Normal(z, 1.0), obs=torch.ones(BATCH_SIZE))

    def guide() -> None:
        with pyro.plate("data", NUM_ROWS, subsample_size=BATCH_SIZE):
            pyro.sample("z", pdist.Normal(0.0, GUIDE_SCALE))

    pyro.set_rng_seed(0)
    return mean_and_error(np.array([-elbo.loss(model, guide) for _ in range(num_draws)]))


def pyro_renyi() -> pyro.infer.ELBO:
    """Pyro's importance-weighted bound."""
    return pyro.infer.RenyiELBO(
        alpha=0, num_particles=NUM_PARTICLES, vectorize_particles=True, max_plate_nesting=1
    )


def pyro_ours(objective: Callable) -> pyro.infer.ELBO:
    """Ours, with the same options."""
    return objective(NUM_PARTICLES, vectorize_particles=True, max_plate_nesting=1)


def numpyro_renyi() -> numpyro.infer.ELBO:
    """NumPyro's importance-weighted bound."""
    return numpyro.infer.RenyiELBO(alpha=0, num_particles=NUM_PARTICLES)


def compare(num_draws: int = 100_000) -> dict[str, list[Row]]:
    """All comparisons, by title."""
    few = max(num_draws // 100, 100)
    return {
        "Gradient for a discrete guide (up is positive)": [
            Row(
                "Pyro",
                discrete_exact(),
                discrete_pyro(pyro_renyi(), num_draws),
                discrete_pyro(pyro_ours(pyro_gradest.VIMCO), num_draws),
            ),
            Row(
                "NumPyro",
                discrete_exact(),
                discrete_numpyro(numpyro_renyi(), num_draws),
                discrete_numpyro(numpyro_gradest.VIMCO(NUM_PARTICLES), num_draws),
            ),
        ],
        "Bound with a joint guide (exact: the log-evidence, which no bound exceeds)": [
            Row(
                "Pyro",
                joint_exact(),
                joint_pyro(pyro_renyi(), few),
                joint_pyro(pyro_ours(pyro_gradest.IWAE), few),
            ),
            Row(
                "NumPyro",
                joint_exact(),
                joint_numpyro(numpyro_renyi(), few),
                joint_numpyro(numpyro_gradest.IWAE(NUM_PARTICLES), few),
            ),
        ],
        "Bound on mini-batches of 5 of 20 data": [
            Row(
                "Pyro",
                minibatch_exact(),
                minibatch_pyro(pyro_renyi(), few),
                minibatch_pyro(pyro_ours(pyro_gradest.IWAE), few),
            ),
        ],
    }


def main() -> None:
    """Print the comparisons."""
    for title, rows in compare().items():
        print(f"\n{title}\n{'':10}{'exact':>9}{'RenyiELBO':>20}{'gradest':>20}")
        for row in rows:
            figures = "".join(f"{m:>12.3f} ± {error:.3f}" for m, error in (row.renyi, row.gradest))
            print(f"{row.host:10}{row.exact:>9.3f}{figures}")


if __name__ == "__main__":
    main()
