"""Posterior draws: of the right law and shape, and fit for the host's ``Predictive``."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from jax.scipy.special import logsumexp
from numpyro import factor, param, plate, sample
from numpyro.infer import SVI, Predictive
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from numpyro_gradest import IWAE, importance_samples

X = jnp.array([0.9, -0.4, 0.1, 1.7])


def shared_latent(x=None):
    g = sample("g", dist.Normal(0.0, 1.0))
    with plate("rows", 2, dim=-2), plate("data", 4, dim=-1):
        return sample("x", dist.Normal(g, 1.0), obs=x)


def latent_per_datum(x=None):
    """Every datum has a vector and a number; their plate leaves room for another at its right."""
    with plate("data", 4, dim=-2):
        v = sample("v", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        b = sample("b", dist.Bernoulli(0.5))
        with plate("repeats", 3, dim=-1):
            return sample("x", dist.Normal(v.sum(-1) + b, 0.5), obs=x)


def guide_per_datum(x):
    with plate("data", 4, dim=-2):
        sample("v", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        sample("b", dist.Bernoulli(0.5))


def prior_of_shared(x):
    sample("g", dist.Normal(0.0, 1.0))


def posterior_draws(model, guide, *args, params=None, seed=0, **options):
    return importance_samples(random.key(seed), model, guide, params or {}, *args, **options)


def initial_params(model, guide, *args):
    svi = SVI(model, guide, optax.adam(0.1), loss=IWAE(1))
    return svi.get_params(svi.init(random.key(0), *args))


def test_draws_have_the_posterior_of_a_shared_latent():
    x = jnp.broadcast_to(X, (2, 4))
    draws = posterior_draws(shared_latent, prior_of_shared, x, num_samples=700, num_particles=500)
    assert draws.samples["g"].shape == (700,)
    assert draws.log_evidence.shape == draws.effective_sample_size.shape == ()
    assert 1 <= draws.effective_sample_size <= 500
    # The posterior is Normal(sum(x) / 9, 1/9); the draws resample ESS particles.
    standard_error = (1 / 9 * (1 / draws.effective_sample_size + 1 / 700)) ** 0.5
    assert abs(draws.samples["g"].mean() - x.sum() / 9) < 4.5 * standard_error
    assert standard_error < 0.1, "uninformative"


def test_data_are_resampled_by_weights_of_their_own():
    x = X[:, None] + jnp.array([0.1, 0.0, -0.1])
    draws = posterior_draws(
        latent_per_datum, guide_per_datum, x, num_samples=2000, num_particles=1000
    )
    assert draws.samples["v"].shape == (2000, 4, 1, 2)
    assert draws.samples["b"].shape == (2000, 4, 1)
    assert draws.log_evidence.shape == draws.effective_sample_size.shape == (4,)

    # Given b, v1 + v2 ~ Normal(0, 2) is seen three times with variance 1/4.
    covariance = 0.25 * jnp.eye(3) + 2.0
    evidences = jnp.stack(
        [dist.MultivariateNormal(jnp.full(3, b), covariance).log_prob(x) for b in (0.0, 1.0)]
    ) + jnp.log(0.5)
    expected = jax.nn.softmax(evidences, axis=0)[1]
    actual = draws.samples["b"].mean(0)[:, 0]
    standard_error = jnp.sqrt(expected * (1 - expected) / draws.effective_sample_size)
    assert (abs(actual - expected) < 4.5 * standard_error + 0.02).all()
    # E exp(bound) = evidence, and its relative error is about that of the weights.
    error = draws.effective_sample_size**-0.5
    assert (abs(draws.log_evidence - logsumexp(evidences, axis=0)) < 4.5 * error).all()
    assert error.max() < 0.2, "uninformative"


@pytest.mark.parametrize("parallel", [False, True], ids=["one-by-one", "parallel"])
@pytest.mark.parametrize("model", [shared_latent, latent_per_datum])
def test_draws_go_into_predictive(model, parallel):
    if model is shared_latent:
        x, guide = jnp.broadcast_to(X, (2, 4)), AutoNormal(model)
        params = initial_params(model, guide, x)
    else:
        x, guide, params = jnp.broadcast_to(X[:, None], (4, 3)), guide_per_datum, {}
    draws = posterior_draws(model, guide, x, params=params, num_samples=6, num_particles=4)
    predictive = Predictive(model, posterior_samples=draws.samples, parallel=parallel)
    assert predictive(random.key(1))["x"].shape == (6, *x.shape)


def test_one_particle_is_returned_as_it_is():
    x = jnp.broadcast_to(X[:, None], (4, 3))
    draws = posterior_draws(latent_per_datum, guide_per_datum, x, num_samples=3, num_particles=1)
    np.testing.assert_array_equal(draws.samples["v"][0], draws.samples["v"][2])
    np.testing.assert_allclose(draws.effective_sample_size, np.ones(4))


def test_joint_autoguides_are_resampled_as_a_whole():
    def model():
        with plate("data", 4):
            z = sample("z", dist.Normal(0.0, 1.0))
            sample("x", dist.Normal(z, 1.0), obs=X)

    guide = AutoMultivariateNormal(model)
    params = initial_params(model, guide)
    draws = posterior_draws(model, guide, params=params, num_samples=7, num_particles=9)
    assert draws.samples["z"].shape == (7, 4)
    assert draws.log_evidence.shape == ()


def test_a_subsample_is_resampled():
    def model():
        with plate("data", 4, subsample_size=2) as rows:
            z = sample("z", dist.Normal(0.0, 1.0))
            sample("x", dist.Normal(z, 1.0), obs=X[rows])

    def guide():
        with plate("data", 4, subsample_size=2):
            sample("z", dist.Normal(0.0, 1.0))

    draws = posterior_draws(model, guide, num_samples=7, num_particles=9)
    assert draws.samples["z"].shape == (7, 2)


def test_compiled_draws_are_those_of_an_eager_call():
    x = jnp.broadcast_to(X, (2, 4))

    def draw(key, loc):
        return importance_samples(
            key, shared_latent, guide, {"loc": loc}, x, num_samples=5, num_particles=6
        )

    def guide(x):
        sample("g", dist.Normal(param("loc", 0.0), 1.0))

    eager = draw(random.key(0), 0.2)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-9), jax.jit(draw)(random.key(0), 0.2), eager
    )


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"num_samples": 0}, ValueError, "importance_samples needs num_samples >= 1, got 0"),
        ({"num_particles": 2.5}, TypeError, r"(?s)num_particles.*2\.5"),
    ],
)
def test_counts_are_checked(options, error, match):
    with pytest.raises(error, match=match):
        posterior_draws(shared_latent, prior_of_shared, X, **options)


def test_nothing_to_resample_is_refused():
    def model():
        with plate("data", 2):
            sample("z", dist.Normal(0.0, 1.0))
            factor("impossible", jnp.array([0.0, -jnp.inf]))

    def guide():
        with plate("data", 2):
            sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="all 10 have none"):
        posterior_draws(model, guide, num_particles=10)
