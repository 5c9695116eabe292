"""Discrete estimators under jit, vmap, scan and grad."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_gradest.estimators import (
    IMLE,
    AdaptiveIMLE,
    Noise,
    ReinMax,
    StraightThrough,
    assignment,
    numpy_solver,
    perturb_and_map,
    spanning_tree,
    top_k,
)

THETA = jnp.array(np.random.default_rng(0).normal(size=(4, 3, 3)))
COSTS = jnp.array([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0], [2.0, 3.0, 1.0]])
WEIGHTS = jnp.array(np.random.default_rng(1).normal(size=(3, 3)))
KEY = jax.random.key(0)
ESTIMATORS = [
    (IMLE(), assignment()),
    (IMLE(), top_k(2)),
    (StraightThrough(), assignment()),
    (ReinMax(), spanning_tree()),
]
every_estimator = pytest.mark.parametrize(
    ("estimator", "solver"),
    ESTIMATORS,
    ids=["imle-host", "imle", "straight-through-host", "reinmax-trees"],
)


def loss(estimator, solver, theta, key):
    z = estimator.sample(key, theta, solver)
    return jnp.sum((z @ WEIGHTS) ** 2)


@every_estimator
def test_jit_vmap_and_scan_are_the_loop(estimator, solver):
    gradient = jax.jit(jax.grad(lambda theta, key: loss(estimator, solver, theta, key)))
    keys = jax.random.split(KEY, 4)
    looped = jnp.stack([gradient(t, key) for t, key in zip(THETA, keys, strict=True)])

    mapped = jax.jit(jax.vmap(gradient))(THETA, keys)
    _, scanned = jax.lax.scan(lambda _, x: (None, gradient(*x)), None, (THETA, keys))

    assert jnp.abs(looped).max() > 0
    np.testing.assert_allclose(mapped, looped, atol=1e-12)
    np.testing.assert_allclose(scanned, looped, atol=1e-12)


def test_adaptive_training_in_a_scan():
    """The state goes round with the parameters; counts add up over mapped draws."""
    estimator, solver = AdaptiveIMLE(initial_step=0.01), top_k(1)

    def objective(theta, counts, state, key):
        def one(key):
            z = estimator.sample(key, theta, solver, state=state, counts=counts)
            return jnp.sum(z * COSTS)

        return jnp.mean(jax.vmap(one)(jax.random.split(key, 5)))

    def step(carry, key):
        theta, state = carry
        gradient, counts = jax.grad(objective, (0, 1))(theta, jnp.zeros(2), state, key)
        return (theta - 0.1 * gradient, estimator.update(state, counts)), counts

    theta = jnp.zeros((3, 3))
    (theta, state), counts = jax.jit(
        lambda carry: jax.lax.scan(step, carry, jax.random.split(KEY, 500))
    )((theta, estimator.init(theta)))

    assert (counts[:, 1] == 15).all()  # 5 draws of 3 data
    np.testing.assert_allclose(counts[-200:, 0].mean() / 15, estimator.target, atol=0.1)
    assert state.relative_step > 0.02
    assert (jnp.argmax(theta, axis=-1) == jnp.argmin(COSTS, axis=-1)).all()


def test_a_step_is_traced_once():
    traces = []

    def solve(theta):
        traces.append(theta.shape)
        return top_k(1).solve(theta)

    step = jax.jit(jax.grad(lambda theta, key: loss(IMLE(), solve, theta, key)))
    for key in jax.random.split(KEY, 3):
        step(THETA, key)
    assert len(traces) <= 4  # forward, both sides of the difference, and once for the output


def test_errors_on_the_host_reach_the_caller_of_a_compiled_step():
    def fail(theta):
        raise RuntimeError("no solution")

    step = jax.jit(lambda theta: perturb_and_map(KEY, theta, numpy_solver(fail)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="no solution"):
        jax.block_until_ready(step(THETA))


def test_wrong_states_and_scores_show_as_nan_under_jit():
    relaxed = jax.jit(lambda theta: perturb_and_map(KEY, theta, lambda t: t + 0.5))(THETA)
    diverged = jax.jit(lambda theta: perturb_and_map(KEY, theta, top_k(1)))(
        THETA.at[0, 0, 0].set(jnp.nan)
    )

    assert jnp.isnan(relaxed).all()
    assert jnp.isnan(diverged[0, 0]).any()
    assert not jnp.isnan(diverged[1:]).any()


def test_a_solver_may_close_over_what_is_traced():
    class Silent(Noise):
        def sample_like(self, key, theta):
            return jnp.zeros_like(theta)

    @jax.jit
    def gradient(theta, allowed):
        def solve(theta):
            return top_k(1).solve(jnp.where(allowed, theta, -1e9))

        estimator = IMLE(noise=Silent(), step_size=10.0)
        return jax.grad(lambda t: jnp.sum(estimator.sample(KEY, t, solve) * jnp.arange(3.0)))(theta)

    actual = gradient(jnp.array([0.0, 0.1, 0.2]), jnp.array([True, True, False]))
    np.testing.assert_allclose(actual, [-0.05, 0.05, 0.0])


ON_ONE_CORE = """
import os, sys, warnings
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import numpyro
numpyro.set_host_device_count(int(sys.argv[1]))
import jax, numpy as np
from numpyro_gradest.estimators import numpy_solver
solver = numpy_solver(lambda theta: theta > 0, batched=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    lowered = jax.jit(lambda theta: solver(theta)).lower(np.ones((1000, 200), np.float32))
print([warning.category.__name__ for warning in caught])
if sys.argv[1] == "2":
    print(lowered.compile()(np.ones((1000, 200), np.float32)).sum())
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be chosen here")
@pytest.mark.parametrize(("num_devices", "printed"), [(1, "['UserWarning']"), (2, "[]\n200000.0")])
def test_on_one_core_numpy_solver_warns_until_there_is_a_second_thread(num_devices, printed):
    """Without it the call waits for ever: JAX's own transfer needs the thread that waits for it."""
    ran = subprocess.run(
        [sys.executable, "-c", ON_ONE_CORE, str(num_devices)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    assert ran.stdout.strip() == printed
