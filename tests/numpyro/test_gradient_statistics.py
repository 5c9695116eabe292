"""Measuring gradients: constraints, state, and networks, as SVI has them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import linen
from jax import random
from numpyro.contrib.module import flax_module
from numpyro.infer import TraceEnum_ELBO

from numpyro_gradest import (
    IWAE,
    NVIL,
    VIMCO,
    AdaptiveIMLE,
    OneHotCategorical,
    compare_estimators,
    gradient_statistics,
    imle,
)
from numpyro_gradest.diagnostics.gradient_statistics import _exact, _Gradients


def model():
    z = numpyro.sample("z", dist.Bernoulli(0.3))
    numpyro.sample("x", dist.Normal(3.0 * z, 1.0), obs=2.0)


def guide():
    positive = numpyro.param("odds", 1.5, constraint=dist.constraints.positive)
    numpyro.sample("z", dist.Bernoulli(logits=jnp.log(positive)))


def test_the_gradient_is_that_of_unconstrained_parameters():
    options = {"num_draws": 2}
    params = {"odds": 1.3}
    measured = gradient_statistics(random.key(0), VIMCO(2), model, guide, params, **options)

    def guide_of_logit():
        numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("odds", 0.0)))

    params = {"odds": jnp.log(1.3)}
    direct = gradient_statistics(random.key(0), VIMCO(2), model, guide_of_logit, params, **options)
    np.testing.assert_allclose(measured.mean["odds"], direct.mean["odds"], rtol=1e-6)
    np.testing.assert_allclose(
        measured.mean["odds"] - measured.bias["odds"],
        direct.mean["odds"] - direct.bias["odds"],
        rtol=1e-6,
    )


def test_state_and_networks():
    def baseline():
        return flax_module("network", linen.Dense(1), input_shape=(1,))(jnp.ones(1))[0]

    loss = NVIL(2, baseline=baseline)
    moments = {"mean": -2.0, "variance": 4.0, "num_updates": 9.0}
    state = jax.tree.map(jnp.asarray, {"odds": 1.5, "nvil": moments})
    measured = gradient_statistics(
        random.key(0), loss, model, loss.with_baseline(guide), state, num_draws=20
    )
    assert "odds" in measured.mean and len(measured.mean) == 3  # with the network's two
    assert "nvil" not in measured.mean
    assert measured.mean["odds"] != 0
    assert measured.bias is None  # a scaled gradient has another length


def test_functions_of_the_number_of_particles():
    comparison = compare_estimators(
        random.key(0), {"VIMCO": VIMCO}, model, guide, {}, num_particles=(2,), num_draws=5
    )
    assert [one.name for one in comparison.statistics] == ["VIMCO, K=2"]
    with pytest.raises(ValueError, match="at least one loss"):
        compare_estimators(random.key(0), {}, model, guide, {})


def test_the_state_of_adaptive_imle_is_no_parameter():
    """Counts arrive as its gradient, which are no noise of any."""
    adaptive = imle(guide, {"z": AdaptiveIMLE()})
    measured = gradient_statistics(random.key(0), IWAE(2), model, adaptive, {}, num_draws=5)
    assert list(measured.mean) == list(measured.bias) == ["odds"]
    with pytest.raises(ValueError, match=r"true of no parameter. There are odds\.$"):
        gradient_statistics(random.key(0), IWAE(2), model, adaptive, {}, only=lambda name: False)


def test_a_model_that_only_the_host_can_sum_over():
    def summed_model():
        z = numpyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        numpyro.sample("y", dist.Normal(2.0 * z, 1.0))

    def guide_of_y():
        numpyro.sample("y", dist.Normal(numpyro.param("loc", 0.1), 1.0))

    loss = TraceEnum_ELBO(max_plate_nesting=0)  # which takes funsor to run
    program = (summed_model, guide_of_y, {}, (), {}, random.key(0), None)
    gradients = _Gradients(loss, *program)
    assert _exact(gradients, "auto") is None
    with pytest.raises(ValueError, match="'z' is configured for enumeration"):
        _exact(gradients, "enumeration")


def test_sites_that_a_plate_expands_are_enumerated():
    def rows_model():
        with numpyro.plate("data", 2):
            z = numpyro.sample("z", OneHotCategorical(jnp.array([0.2, 0.5, 0.3])))
            numpyro.sample("x", dist.Normal(z @ jnp.arange(3.0), 1.0), obs=jnp.array([0.5, 2.0]))

    def rows_guide(is_expanded):
        logits = numpyro.param("logits", jnp.zeros(3))
        with numpyro.plate("data", 2):
            shape = (3,) if is_expanded else (2, 3)
            numpyro.sample("z", OneHotCategorical(logits=jnp.broadcast_to(logits, shape)))

    params = {"logits": jnp.array([0.1, -0.4, 0.3])}
    expanded, whole = (
        _exact(
            _Gradients(
                IWAE(2), rows_model, partial(rows_guide, which), params, (), {}, random.key(0), None
            ),
            "enumeration",
        )
        for which in (True, False)
    )
    assert (np.abs(whole) > 1e-3).all()
    np.testing.assert_allclose(expanded, whole, rtol=1e-6)
