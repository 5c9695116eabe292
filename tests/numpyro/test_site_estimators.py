"""Estimators by site in NumPyro: autoguides, control flow, compiled steps."""

from functools import partial

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import linen, nnx
from jax import numpy as jnp
from jax import random
from numpyro import sample
from numpyro.contrib.control_flow import scan
from numpyro.contrib.module import flax_module, nnx_module
from numpyro.infer import SVI, autoguide

from numpyro_gradest import (
    IMLE,
    IWAE,
    OVIS,
    VIMCO,
    AdaptiveIMLE,
    Implicit,
    ImplicitELBO,
    adapt_imle,
    configure_estimators,
)
from numpyro_gradest.estimators import (
    reinforce_leave_one_out_learning_signal,
    vimco_learning_signal,
)
from tests.conformance.backends import QUICK_TO_COMPILE

PARAMS = {"loc": 0.2, "slope": 0.6}


def layers():
    y = sample("y", dist.Normal(0.0, 1.0))
    u = sample("u", dist.Normal(0.7 * y, 0.8))
    sample("x", dist.Normal(u + 0.3 * y, 1.5), obs=0.6)


def layers_guide():
    y = sample("y", dist.Normal(numpyro.param("loc", PARAMS["loc"]), 0.9))
    sample("u", dist.Normal(numpyro.param("slope", PARAMS["slope"]) * y, 0.7))


def gradient(loss, model, guide, params=PARAMS):
    def at(params):
        return loss.loss(random.key(0), params, model, guide)

    start = {name: jnp.asarray(value) for name, value in params.items()}
    return jax.jit(jax.grad(at), compiler_options=QUICK_TO_COMPILE)(start)


def assert_same(actual, desired):
    for name, value in desired.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-9, atol=1e-12, err_msg=name)
    assert any(np.abs(value).max() > 1e-3 for value in desired.values())


@pytest.mark.parametrize(
    ("make", "site"),
    [(autoguide.AutoNormal, "y"), (autoguide.AutoMultivariateNormal, "_auto_latent")],
)
def test_autoguides(make, site):
    guide = make(layers)
    svi = SVI(layers, guide, optax.sgd(0.1), IWAE(1))
    params = svi.get_params(svi.init(random.key(1)))
    sites = [site, "u"] if site == "y" else [site]
    by_site = configure_estimators(guide, dict.fromkeys(sites, "dreg"))
    desired = gradient(IWAE(3, reparam="dreg"), layers, guide, params)
    assert_same(gradient(IWAE(3), layers, by_site, params), desired)


def test_a_compiled_run():
    """Every kind of estimator in one guide, under svi.run and by single steps."""

    def model():
        a = sample("a", dist.Bernoulli(0.3))
        b = sample("b", dist.Bernoulli(0.3))
        y = sample("y", dist.Normal(a + b, 1.0))
        sample("x", dist.Normal(y, 1.0), obs=0.6)

    config = {"a": AdaptiveIMLE(), "b": vimco_learning_signal, "y": "dreg"}

    @configure_estimators(config=config)
    def guide():
        logits = numpyro.param("logits", jnp.array([0.2, -0.4]))
        a = sample("a", dist.Bernoulli(logits=logits[0]))
        b = sample("b", dist.Bernoulli(logits=logits[1]))
        sample("y", dist.Normal(a - b + numpyro.param("loc", 0.1), 0.8))

    # The optimizer of the adaptive state reads the same config.
    svi = SVI(model, guide, adapt_imle(optax.adam(0.05), config), IWAE(3))
    result = svi.run(random.key(0), 4, progress_bar=False)
    assert np.isfinite(result.losses).all()
    assert (result.params["logits"] != jnp.array([0.2, -0.4])).all()
    assert result.params["loc"] != 0.1
    assert (result.params["a_imle"][3:] == 0).all()  # counts that another optimizer would move


FEATURES = jnp.array([0.5, -1.0])
KERNEL = jnp.array([[0.3, -0.2, 0.4], [0.1, 0.5, -0.6]])
BIAS = jnp.array([0.2, -0.1, 0.3])


def two_bits_and_a_number():
    a = sample("a", dist.Bernoulli(0.3))
    b = sample("b", dist.Bernoulli(0.4))
    y = sample("y", dist.Normal(a + b, 1.0))
    sample("x", dist.Normal(y + 0.5 * b, 1.0), obs=0.6)


def guide_by(outputs):
    """Of one layer that all sites share; each has a column of its own."""
    a = sample("a", dist.Bernoulli(logits=outputs[0]))
    b = sample("b", dist.Bernoulli(logits=outputs[1]))
    sample("y", dist.Normal(outputs[2] + a - b, 0.8))


def linen_guide():
    guide_by(flax_module("net", linen.Dense(3), input_shape=(2,))(FEATURES))


NNX_LAYER = nnx.Linear(2, 3, rngs=nnx.Rngs(0))


def nnx_guide():
    guide_by(nnx_module("net", NNX_LAYER)(FEATURES))


def guide_without_module():
    layer = numpyro.param("net$params")
    guide_by(FEATURES @ layer["kernel"] + layer["bias"])


CHOICES = {"a": vimco_learning_signal, "b": IMLE(), "y": "dreg"}


@pytest.mark.parametrize("guide", [linen_guide, nnx_guide])
def test_modules_of_flax(guide):
    """Their parameters are nested; each site's column gets what it gets without a module."""

    def of(guide):
        def at(layer):
            loss, params = IWAE(3), {"net$params": layer}
            return loss.loss(random.key(0), params, two_bits_and_a_number, guide)

        layer = {"kernel": KERNEL, "bias": BIAS}
        return jax.jit(jax.grad(at), compiler_options=QUICK_TO_COMPILE)(layer)

    actual = of(configure_estimators(guide, CHOICES))
    assert_same(actual, of(configure_estimators(guide_without_module, CHOICES)))
    configured = configure_estimators(guide, CHOICES)
    svi = SVI(two_bits_and_a_number, configured, optax.sgd(0.1), IWAE(3))
    assert set(svi.get_params(svi.init(random.key(0)))["net$params"]) == {"kernel", "bias"}
    by_default = of(guide_without_module)
    assert (np.abs(actual["kernel"] - by_default["kernel"]) > 1e-3).all()


def chain():
    def step(z, _):
        z = sample("z", dist.Normal(0.8 * z, 1.0))
        sample("x", dist.Normal(z, 1.0), obs=0.6)
        return z, None

    y = sample("y", dist.Normal(0.0, 1.0))
    scan(step, y, None, length=2)


def chain_guide():
    loc, slope = (numpyro.param(name, value) for name, value in PARAMS.items())

    def step(z, _):
        return sample("z", dist.Normal(slope * z, 0.7)), None

    scan(step, sample("y", dist.Normal(loc, 0.9)), None, length=2)


def test_sites_inside_of_control_flow():
    desired = gradient(OVIS(2, reparam="score"), chain, chain_guide)
    by_site = configure_estimators(chain_guide, {"z": "score", "y": "score"})
    assert_same(gradient(OVIS(2), chain, by_site), desired)


def test_two_kinds_of_paths_through_control_flow_are_refused():
    guide = configure_estimators(chain_guide, {"z": "dreg", "y": "pathwise"})
    with pytest.raises(NotImplementedError, match=r"scan or cond.*Choose the same for all"):
        jax.eval_shape(lambda: IWAE(2).loss(random.key(0), PARAMS, chain, guide))


def test_a_predicate_chooses_by_site():
    by_predicate = configure_estimators(
        layers_guide, lambda site: "score" if site["name"] == "y" else None
    )
    by_name = configure_estimators(layers_guide, {"y": "score"})
    desired = gradient(OVIS(3), layers, by_name)
    assert_same(gradient(OVIS(3), layers, by_predicate), desired)


def test_the_outermost_choice_counts():
    inner = configure_estimators(layers_guide, {"y": "score", "u": "score"})
    outer = configure_estimators(inner, {"y": "stl"})
    both = configure_estimators(layers_guide, {"y": "stl", "u": "score"})
    assert_same(gradient(IWAE(3), layers, outer), gradient(IWAE(3), layers, both))


def test_chunks_of_two_kinds_of_paths():
    guide = configure_estimators(layers_guide, {"y": "pathwise", "u": "dreg"})
    whole, chunks = (gradient(VIMCO(4, **one), layers, guide) for one in ({}, {"chunk_size": 2}))
    assert_same(chunks, whole)


def implicit_model():
    z = sample("z", dist.Normal(3.0, 0.5))
    y = sample("y", dist.Normal(z, 1.0))
    sample("x", dist.Normal(y, 1.0), obs=0.6)


def implicit_guide(**of_noise):
    infer = {"is_auxiliary": True, **of_noise}
    noise = sample("noise", dist.Normal(0.0, 1.0), infer=infer)
    sample("z", Implicit(numpyro.param("loc", 0.0) + noise))
    sample("y", dist.Normal(numpyro.param("y_loc", 0.3), 0.7))


def test_implicit_sites_stay_on_the_path_beside_score_sites():
    """reparam="score" is about sites with a density; and so is a site's own choice."""
    params = {"loc": 0.0, "y_loc": 0.3}
    pathwise, score = (
        gradient(ImplicitELBO(6, reparam=reparam), implicit_model, implicit_guide, params)
        for reparam in ("pathwise", "score")
    )
    np.testing.assert_allclose(score["loc"], pathwise["loc"], rtol=1e-9)
    assert abs(score["y_loc"] - pathwise["y_loc"]) > 1e-3
    guide = configure_estimators(implicit_guide, {"y": reinforce_leave_one_out_learning_signal})
    assert_same(gradient(ImplicitELBO(6), implicit_model, guide, params), score)


def test_implicit_sites_and_their_noise_have_no_estimator():
    def run(guide):
        params = {"loc": 0.0, "y_loc": 0.3}
        jax.eval_shape(lambda: ImplicitELBO(6).loss(random.key(0), params, implicit_model, guide))

    with pytest.raises(ValueError, match=r"'z' is Implicit and has no density.*'score'"):
        run(configure_estimators(implicit_guide, {"z": "score"}))
    with pytest.raises(ValueError, match=r"'z' is computed from 'noise'.*Remove the estimator"):
        run(partial(implicit_guide, estimator="pathwise"))
