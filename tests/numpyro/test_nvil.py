"""NVIL inside of SVI: its baselines are trained, and its state is part of SVI's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import linen
from jax import random
from numpyro.contrib.module import flax_module
from numpyro.infer import SVI

from numpyro_gradest import NVIL
from tests.conformance.backends import QUICK_TO_COMPILE

X = jnp.array([-0.5, 0.2, 2.9, 3.3])


def model(x):
    with numpyro.plate("data", len(x), subsample_size=3) as rows:
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        numpyro.sample("x", dist.Normal(3.0 * z, 1.0), obs=x[rows])


def guide(x):
    slope = numpyro.param("slope", 0.1)
    with numpyro.plate("data", len(x), subsample_size=3) as rows:
        numpyro.sample("z", dist.Bernoulli(logits=slope * x[rows] + 0.1))


def baseline(x):
    """One number for each row of the same mini-batch."""
    network = flax_module("network", linen.Dense(1), input_shape=(1,))
    with numpyro.plate("data", len(x), subsample_size=3) as rows:
        return network(x[rows, None])[..., 0]


def svi_of(loss, guide=guide):
    return SVI(model, loss.with_baseline(guide), optax.adam(0.05), loss=loss)


def quick_update(svi):
    return jax.jit(svi.update, compiler_options=QUICK_TO_COMPILE)


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}])
def test_moments_and_baseline_move_with_each_step(options):
    svi = svi_of(NVIL(3, baseline=baseline, **options))
    state = svi.init(random.key(0), X)
    before = svi.get_params(state)
    update = quick_update(svi)
    for _ in range(3):
        state, _ = update(state, X)

    moments = state.mutable_state["nvil"]
    assert moments["num_updates"] == 3
    assert moments["mean"] != 0 and moments["variance"] > 0
    after = svi.get_params(state)
    jax.tree.map(lambda one, other: np.testing.assert_(jnp.all(one != other)), before, after)


def test_run():
    svi = svi_of(NVIL(3, baseline=baseline))
    result = svi.run(random.key(0), 300, X, progress_bar=False)
    assert result.state.mutable_state["nvil"]["num_updates"] == 300
    without = svi_of(NVIL(3)).run(random.key(0), 300, X, progress_bar=False)
    explained, left = (one.state.mutable_state["nvil"]["variance"] for one in (result, without))
    assert explained < left
    assert result.params["slope"] > 0.1


def test_state_is_all_that_a_checkpoint_needs():
    """The objective holds nothing: a step from the same state is the same step."""
    svi = svi_of(NVIL(3, baseline=baseline))
    update = quick_update(svi)
    state, _ = update(svi.init(random.key(0), X), X)
    first = update(state, X)
    update(first[0], X)
    again = update(state, X)
    without_key = partial(jax.tree.map, np.testing.assert_array_equal)
    without_key(
        (first[0].optim_state, first[0].mutable_state, first[1]),
        (again[0].optim_state, again[0].mutable_state, again[1]),
    )


def test_baseline_sees_the_mini_batch_of_the_step():
    """A baseline that is right for each row leaves no variance; for other rows it would."""

    def known_model(x):
        with numpyro.plate("data", len(x), subsample_size=3) as rows:
            z = numpyro.sample("z", dist.Bernoulli(0.5))
            numpyro.factor("x", x[rows] + 0.0 * z)

    def known_guide(x):
        with numpyro.plate("data", len(x), subsample_size=3):
            numpyro.sample("z", dist.Bernoulli(probs=0.5))

    def known_baseline(x):
        with numpyro.plate("data", len(x), subsample_size=3) as rows:
            return x[rows]

    loss = NVIL(2, baseline=known_baseline)
    svi = SVI(known_model, loss.with_baseline(known_guide), optax.sgd(0.1), loss=loss)
    state = svi.init(random.key(0), X)
    for _ in range(2):
        state, _ = svi.update(state, X)
    assert state.mutable_state["nvil"]["variance"] < 1e-20


def test_a_guide_without_the_state_is_refused():
    svi = SVI(model, guide, optax.adam(0.05), loss=NVIL(3))
    state = svi.init(random.key(0), X)
    with pytest.raises(ValueError, match=r"loss\.with_baseline\(guide\)"):
        svi.update(state, X)
