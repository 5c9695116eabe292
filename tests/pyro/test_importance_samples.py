"""Posterior draws: of the right law and shape, and fit for the host's ``Predictive``."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import plate, sample
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pyro_gradest import IWAE, importance_samples

X = torch.tensor([0.9, -0.4, 0.1, 1.7])
each_run = pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vectorized"])


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


@each_run
def test_draws_have_the_posterior_of_a_shared_latent(vectorize):
    x = X.expand(2, 4)
    draws = importance_samples(
        shared_latent,
        lambda x: sample("g", dist.Normal(0.0, 1.0)),
        x,
        num_samples=700,
        num_particles=500,
        vectorize_particles=vectorize,
    )
    assert draws.samples["g"].shape == (700,)
    assert draws.log_evidence.shape == draws.effective_sample_size.shape == ()
    assert 1 <= draws.effective_sample_size <= 500
    # The posterior is Normal(sum(x) / 9, 1/9); the draws resample ESS particles.
    standard_error = (1 / 9 * (1 / draws.effective_sample_size + 1 / 700)).sqrt()
    assert abs(draws.samples["g"].mean() - x.sum() / 9) < 4.5 * standard_error
    assert standard_error < 0.1, "uninformative"


@each_run
def test_data_are_resampled_by_weights_of_their_own(vectorize):
    x = X[:, None] + torch.tensor([0.1, 0.0, -0.1])
    draws = importance_samples(
        latent_per_datum,
        guide_per_datum,
        x,
        num_samples=2000,
        num_particles=1000,
        vectorize_particles=vectorize,
    )
    assert draws.samples["v"].shape == (2000, 4, 1, 2)
    assert draws.samples["b"].shape == (2000, 4, 1)
    assert draws.log_evidence.shape == draws.effective_sample_size.shape == (4,)

    # Given b, v1 + v2 ~ Normal(0, 2) is seen three times with variance 1/4.
    prior, noise = 2.0, 0.25
    covariance = noise * torch.eye(3) + prior
    evidences = torch.stack(
        [
            dist.MultivariateNormal(torch.full((3,), b), covariance).log_prob(x) + math.log(0.5)
            for b in (0.0, 1.0)
        ]
    )
    expected = evidences.softmax(dim=0)[1]
    actual = draws.samples["b"].mean(0).squeeze(-1)
    standard_error = (expected * (1 - expected) / draws.effective_sample_size).sqrt()
    assert (abs(actual - expected) < 4.5 * standard_error + 0.02).all()
    # E exp(bound) = evidence, and its relative error is about that of the weights.
    error = (1 / draws.effective_sample_size).sqrt()
    assert (abs(draws.log_evidence - evidences.logsumexp(0)) < 4.5 * error).all()
    assert error.max() < 0.2, "uninformative"


@each_run
def test_evidence_is_the_bound_of_the_objective(vectorize):
    x = X[:, None].expand(4, 3)
    pyro.set_rng_seed(1)
    options = {"vectorize_particles": vectorize, "max_plate_nesting": 2}
    draws = importance_samples(latent_per_datum, guide_per_datum, x, num_particles=5, **options)
    pyro.set_rng_seed(1)
    loss = IWAE(5, **options).loss(latent_per_datum, guide_per_datum, x)
    assert draws.log_evidence.sum() == pytest.approx(-loss, rel=1e-12)


@pytest.mark.parametrize("parallel", [False, True], ids=["one-by-one", "parallel"])
@pytest.mark.parametrize("model", [shared_latent, latent_per_datum])
@each_run
def test_draws_go_into_predictive(model, vectorize, parallel):
    x = (X.expand(2, 4) if model is shared_latent else X[:, None].expand(4, 3)).contiguous()
    guide = guide_per_datum
    if model is shared_latent:
        guide = AutoNormal(model)
    draws = importance_samples(
        model, guide, x, num_samples=6, num_particles=4, vectorize_particles=vectorize
    )
    predictive = Predictive(model, draws.samples, parallel=parallel)()
    assert predictive["x"].shape == (6, *x.shape)
    again = Predictive(model, draws.samples, return_sites=list(draws.samples), parallel=parallel)()
    for name, value in draws.samples.items():
        assert torch.equal(again[name].reshape(value.shape), value)


@each_run
def test_one_particle_is_returned_as_it_is(vectorize):
    x = X[:, None].expand(4, 3)
    draws = importance_samples(
        latent_per_datum,
        guide_per_datum,
        x,
        num_samples=3,
        num_particles=1,
        vectorize_particles=vectorize,
    )
    assert torch.equal(draws.samples["v"][0], draws.samples["v"][2])
    torch.testing.assert_close(draws.effective_sample_size, torch.ones(4))


def test_joint_autoguides_are_resampled_as_a_whole():
    def model():
        with plate("data", 4):
            z = sample("z", dist.Normal(0.0, 1.0))
            sample("x", dist.Normal(z, 1.0), obs=X)

    draws = importance_samples(model, AutoMultivariateNormal(model), num_samples=7, num_particles=9)
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

    draws = importance_samples(model, guide, num_samples=7, num_particles=9)
    assert draws.samples["z"].shape == (7, 2)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"num_samples": 0}, ValueError, "importance_samples needs num_samples >= 1, got 0"),
        ({"num_particles": 2.5}, TypeError, r"(?s)num_particles.*2\.5"),
    ],
)
def test_counts_are_checked(options, error, match):
    with pytest.raises(error, match=match):
        importance_samples(shared_latent, lambda x: None, X, **options)


def test_nothing_to_resample_is_refused():
    def model():
        with plate("data", 2):
            sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("impossible", torch.tensor([0.0, -math.inf]))

    def guide():
        with plate("data", 2):
            sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="all 10 have none"):
        importance_samples(model, guide, num_particles=10)


def test_sequential_plates_are_refused():
    def model():
        for i in plate("data", 2):
            sample(f"z_{i}", dist.Normal(0.0, 1.0))

    with pytest.raises(NotImplementedError, match=r"sequential plates.*vectorised plates"):
        importance_samples(model, model, num_particles=3)
