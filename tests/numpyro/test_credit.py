"""``RLOO(credit="downstream")`` in NumPyro: under ``jit``, in ``svi.run``, and what it refuses."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import jit, random
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI

from numpyro_gradest import RLOO

X = jnp.array([-0.5, 0.2, 2.9, 3.3])


def model(x=X):
    shift = numpyro.sample("shift", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", 4, subsample_size=2) as index:
        z = numpyro.sample("fn", dist.Bernoulli(0.3))
        numpyro.sample("x", dist.Normal(3 * z + shift, 1.0), obs=x[index])


def guide(x=X):
    loc, slope = numpyro.param("loc", 0.1), numpyro.param("slope", 0.1)
    shift = numpyro.sample("shift", dist.Normal(loc, 0.5))
    with numpyro.plate("data", 4, subsample_size=2) as index:
        numpyro.sample("fn", dist.Bernoulli(logits=slope * (x[index] - shift)))


def test_svi_run():
    """It trains, whatever the sites' names, and is traced once."""
    num_traces = 0

    def counted_guide():
        nonlocal num_traces
        num_traces += 1
        guide()

    svi = SVI(model, counted_guide, optax.adam(0.05), loss=RLOO(4, credit="downstream"))
    state = svi.init(random.key(0))
    update = jit(svi.update)
    state, _ = update(state)
    before = num_traces
    for _ in range(20):
        state, _ = update(state)
    assert num_traces == before
    assert svi.get_params(state)["slope"] > 0.3
    result = svi.run(random.key(0), 2, progress_bar=False)
    assert np.isfinite(result.losses).all()


def test_loss_is_that_of_the_whole():
    params = {"loc": jnp.array(0.1), "slope": jnp.array(0.1)}
    losses = [
        RLOO(4, credit=credit, vectorize_particles=vectorize).loss(
            random.key(0), params, model, guide
        )
        for credit, vectorize in (("whole", True), ("downstream", True), ("downstream", False))
    ]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)


def test_refuses_draws_inside_of_scan():
    def program(logit):
        def step(carry, _):
            return carry, numpyro.sample("z", dist.Bernoulli(logits=logit))

        scan(step, 0.0, None, length=3)

    with pytest.raises(NotImplementedError, match=r"'z' is drawn inside of scan.*credit=\"whole\""):
        RLOO(2, credit="downstream").loss(
            random.key(0), {}, lambda: program(0.3), lambda: program(0.1)
        )
