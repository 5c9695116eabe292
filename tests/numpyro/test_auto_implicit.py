"""The ready implicit guide: what it draws, its gradient draw for draw, and what it fits."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro import handlers, plate, sample
from numpyro.infer import SVI, Predictive, init_to_value

from numpyro_gradest import IWAE, AutoImplicit, ImplicitELBO, importance_samples
from tests.conformance.backends import QUICK_TO_COMPILE
from tests.numpyro.definition import evaluate, log_normal

K = 7
X = jnp.array([0.9, -0.4, 0.1])
quickly = partial(jax.jit, compiler_options=QUICK_TO_COMPILE)
INITIAL = {"w": jnp.array([0.2, 0.5, 0.3]), "s": jnp.array(1.5), "z": X}


def constrained():
    """A simplex (two dims for three numbers), a positive number, and a latent in a plate."""
    w = sample("w", dist.Dirichlet(jnp.array([1.0, 2.0, 3.0])))
    s = sample("s", dist.LogNormal(0.0, 1.0))
    with plate("data", 3):
        z = sample("z", dist.Normal(0.0, s))
        sample("x", dist.Normal(z * w[0], 1.0), obs=X)


def known_score(samples):
    return jnp.sin(3.0 * samples) - 0.3 * samples.sum(-1, keepdims=True)


@cache
def started():
    """The guide, and parameters at which no part of the network is silent."""
    start = init_to_value(values=INITIAL)
    guide = AutoImplicit(constrained, hidden=(5, 4), num_noise=8, init_loc_fn=start)
    trace = handlers.trace(handlers.seed(guide, 0)).get_trace()
    params = {name: site["value"] for name, site in trace.items() if site["type"] == "param"}
    moved = {name: value + 0.1 * jnp.cos(1.0 + value) for name, value in params.items()}
    return guide, params, moved


def test_starts_as_a_gaussian_around_the_initial_values():
    guide, params, _ = started()
    model = handlers.substitute(handlers.seed(guide, 1), params)
    trace = handlers.trace(model).get_trace()
    noise, latent = trace["_auto_noise"]["value"], trace["_auto_latent"]["value"]
    np.testing.assert_allclose(latent - params["auto_loc"], 0.1 * noise[:6], rtol=1e-9)
    still = handlers.substitute(guide, params | {"_auto_noise": jnp.zeros(8)})
    values = handlers.seed(still, 0)()
    for name, value in INITIAL.items():
        np.testing.assert_allclose(values[name], value, rtol=1e-9)


def push(params, noise):
    layer = jnp.tanh(noise @ params["auto_weight_0"] + params["auto_bias_0"])
    layer = jnp.tanh(layer @ params["auto_weight_1"] + params["auto_bias_1"])
    return params["auto_loc"] + noise @ params["auto_skip"] + layer @ params["auto_weight_last"]


def test_loss_gradient_follows_the_definition():
    """Also: it reaches every parameter."""
    guide, _, params = started()
    build = partial(ImplicitELBO, K, score_estimator=known_score)
    actual = evaluate(build, constrained, guide, params)

    def elbo(u):
        """Sites in the order of the model: w, s, z."""
        stick = dist.transforms.StickBreakingTransform()
        w, s, z = stick(u[:2]), jnp.exp(u[2]), u[3:]
        log_p = dist.Dirichlet(jnp.array([1.0, 2.0, 3.0])).log_prob(w)
        log_p += dist.LogNormal(0.0, 1.0).log_prob(s)
        log_p += (log_normal(z, 0.0, s) + log_normal(X, z * w[0], 1.0)).sum()
        return log_p + u[2] + stick.log_abs_det_jacobian(u[:2], w)

    def surrogate(params):
        u = push(params, actual.draws["_auto_noise"])
        score = known_score(jax.lax.stop_gradient(u))
        return -(jax.vmap(elbo)(u) - (score * u).sum(-1)).mean()

    gradient = quickly(jax.grad(surrogate))(params)
    assert gradient.keys() == actual.gradient.keys()
    for name, expected in gradient.items():
        assert (expected != 0).all(), name
        np.testing.assert_allclose(actual.gradient[name], expected, rtol=1e-9, atol=1e-12)


SD = np.array([0.5, 1.0, 1.5, 2.0])
LOC = np.array([1.0, -1.0, 2.0, 0.0])


def correlated():
    covariance = (0.9 + 0.1 * np.eye(4)) * SD * SD[:, None]
    sample("z", dist.MultivariateNormal(LOC, covariance))


def test_training_finds_a_correlated_posterior():
    guide = AutoImplicit(correlated, hidden=(16,))
    optimizer = optax.adam(optax.cosine_decay_schedule(0.03, 400))
    svi = SVI(correlated, guide, optimizer, loss=ImplicitELBO(100))
    params = svi.run(random.key(0), 400, progress_bar=False).params
    draws = guide.sample_posterior(random.key(1), params, sample_shape=(4000,))["z"]
    np.testing.assert_allclose((draws.mean(0) - LOC) / SD, 0.0, atol=0.1)
    np.testing.assert_allclose(draws.std(0) / SD, 1.0, atol=0.1)
    correlation = np.corrcoef(draws.T)[np.triu_indices(4, 1)]
    np.testing.assert_allclose(correlation, 0.9, atol=0.04)


def test_draws_go_through_predictive():
    guide, params, _ = started()
    draws = Predictive(constrained, guide=guide, params=params, num_samples=7)(random.key(0))
    assert draws["x"].shape == (7, 3)
    draws = guide.sample_posterior(random.key(0), params, sample_shape=(2, 3))
    assert {name: value.shape for name, value in draws.items()} == {
        "s": (2, 3),
        "w": (2, 3, 3),
        "z": (2, 3, 3),
    }
    np.testing.assert_allclose(draws["w"].sum(-1), 1.0)


# --- bad input -----------------------------------------------------------------------------------


def test_what_needs_a_density_is_refused():
    guide, params, _ = started()
    for refused in (guide.median, partial(guide.quantiles, quantiles=[0.5])):
        with pytest.raises(NotImplementedError, match=r"closed form.*sample_posterior"):
            refused(params)
    with pytest.raises(NotImplementedError, match="no posterior to evaluate"):
        guide.get_posterior(params)
    # Traced only: what is refused need not be computed.
    with pytest.raises(NotImplementedError, match=r"no density.*importance weights"):
        jax.eval_shape(lambda: importance_samples(random.key(0), constrained, guide, params))
    with pytest.raises(NotImplementedError, match=r"ImplicitELBO\(num_particles"):
        jax.eval_shape(lambda: IWAE(3).loss(random.key(0), params, constrained, guide))


def test_subsampled_latents_are_refused():
    def model():
        with plate("data", 4, subsample_size=2):
            sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="does not support local latent variables"):
        handlers.seed(AutoImplicit(model), 0)()


def test_too_little_noise_is_refused():
    guide = AutoImplicit(correlated, num_noise=3)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"num_noise >= 4.*got 3.*entropy is -inf"):
            handlers.seed(guide, 0)()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"hidden": (8, 0)}, ValueError, "hidden >= 1, got 0"),
        ({"num_noise": 0}, ValueError, "num_noise >= 1, got 0"),
        ({"init_scale": 0.0}, ValueError, r"init_scale > 0, got 0\.0"),
        ({"init_scale": float("nan")}, ValueError, "init_scale > 0, got nan"),
    ],
)
def test_options_are_checked(options, error, match):
    with pytest.raises(error, match=match):
        AutoImplicit(correlated, **options)
