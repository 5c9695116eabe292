"""DisARM inside of NumPyro: the two draws of a pair share all noise but that of Bernoulli sites."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI

from numpyro_gradest import DisARM
from numpyro_gradest.infer._antithetic import trace_pair
from numpyro_gradest.infer._site_estimators import SiteEstimators
from numpyro_gradest.infer._trace import Program

X = jnp.array([-0.5, 0.2, 2.9, 3.3])


def model(x):
    with numpyro.plate("data", len(x), subsample_size=3) as rows:
        y = numpyro.sample("y", dist.Normal(0.0, 1.0))
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        numpyro.sample("x", dist.Normal(3.0 * z + y, 1.0), obs=x[rows])


def guide(x):
    slope = numpyro.param("slope", 0.1)
    with numpyro.plate("data", len(x), subsample_size=3) as rows:
        y = numpyro.sample("y", dist.Normal(0.3 * x[rows], 0.7))
        numpyro.sample("z", dist.Bernoulli(logits=slope * (x[rows] - y)))


def test_pairs():
    program = Program(
        model, guide, {"slope": 0.5}, (X,), {}, SiteEstimators("pathwise"), is_weighted=False
    )
    program = program.with_plate_key(random.key(1))
    (_, first), (_, partner) = trace_pair(program, random.key(0))
    assert (first["y"]["value"] == partner["y"]["value"]).all()
    values, partners = (one["z"]["value"] for one in (first, partner))
    assert (first["z"]["partner"] == partners).all()
    assert (partner["z"]["partner"] == values).all()
    # A value less likely than the other is never drawn at both.
    rare = values == (first["z"]["fn"].logits < 0)
    assert (partners != values)[rare].all()


def test_steps_without_retracing():
    num_traces = []

    def counted(x):
        num_traces.append(1)
        return guide(x)

    svi = SVI(model, counted, optax.adam(0.05), loss=DisARM(2))
    state, update = svi.init(random.key(0), X), jax.jit(svi.update)
    counts = []
    for _ in range(3):
        state, loss = update(state, X)
        counts.append(len(num_traces))
    assert jnp.isfinite(loss)
    assert counts[0] == counts[-1]


def test_refuses_draws_inside_scan():
    def model():
        def step(carry, _):
            numpyro.sample("z", dist.Bernoulli(0.3))
            return carry, None

        scan(step, 0.0, None, length=3)

    program = Program(model, model, {}, (), {}, SiteEstimators("pathwise"), is_weighted=False)
    with pytest.raises(ValueError, match=r"'z', inside scan.*VIMCO"):
        trace_pair(program, random.key(0))
