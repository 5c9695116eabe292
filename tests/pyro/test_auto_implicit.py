"""The ready implicit guide: what it draws, its gradient draw for draw, and what it fits."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import plate, poutine, sample
from pyro.infer import SVI, Predictive
from pyro.infer.autoguide import init_to_value
from pyro.poutine.messenger import Messenger

from pyro_gradest import IWAE, AutoImplicit, ImplicitELBO, importance_samples

K = 7
X = torch.tensor([0.9, -0.4, 0.1])
INITIAL = {"w": torch.tensor([0.2, 0.5, 0.3]), "s": torch.tensor(1.5), "z": X}


def constrained():
    """A simplex (two dims for three numbers), a positive number, and a latent in a plate."""
    w = sample("w", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    s = sample("s", dist.LogNormal(0.0, 1.0))
    with plate("data", 3):
        z = sample("z", dist.Normal(0.0, s))
        sample("x", dist.Normal(z * w[..., 0], 1.0), obs=X)


def known_score(samples):
    return torch.sin(3.0 * samples) - 0.3 * samples.sum(-1, keepdim=True)


def started(num_noise=8):
    start = init_to_value(values=INITIAL)
    guide = AutoImplicit(constrained, hidden=(5, 4), num_noise=num_noise, init_loc_fn=start)
    guide()
    return guide


def test_starts_as_a_gaussian_around_the_initial_values():
    guide = started()
    trace = poutine.trace(guide).get_trace()
    noise, latent = (trace.nodes[f"_AutoImplicit_{name}"]["value"] for name in ("noise", "latent"))
    torch.testing.assert_close(latent - guide.loc, 0.1 * noise[:6])
    values = poutine.condition(guide, {"_AutoImplicit_noise": torch.zeros(8)})()
    for name, value in INITIAL.items():
        torch.testing.assert_close(values[name].detach(), value)


class Noise(Messenger):
    def __init__(self):
        super().__init__()
        self.values = []

    def _pyro_post_sample(self, msg):
        if msg["name"] == "_AutoImplicit_noise":
            self.values.append(msg["value"].reshape(-1, 8))


@pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vectorized"])
def test_loss_gradient_follows_the_definition(vectorize):
    """Also: it reaches every parameter."""
    guide = started()
    parameters = dict(guide.named_parameters())
    with torch.no_grad():  # the last layer starts at zero, which keeps the others still
        for value in parameters.values():
            value += 0.1 * torch.cos(1.0 + value)
    elbo = ImplicitELBO(K, score_estimator=known_score, vectorize_particles=vectorize)
    elbo.loss(constrained, guide)  # finds what depends on what
    with Noise() as noise:
        elbo.loss_and_grads(constrained, guide)
    actual = {}
    for name, value in parameters.items():
        actual[name], value.grad = value.grad, None

    (first_weight, first_bias), (weight, bias) = (
        (guide.network[i].weight, guide.network[i].bias) for i in (0, 2)
    )
    e = torch.cat(noise.values)
    layer = torch.tanh(torch.tanh(e @ first_weight.T + first_bias) @ weight.T + bias)
    u = guide.loc + e @ guide.skip + layer @ guide.network[4].weight.T

    # Sites in the order of the model: w, s, z.
    stick = torch.distributions.StickBreakingTransform()
    w, s, z = stick(u[:, :2]), torch.exp(u[:, 2:3]), u[:, 3:]
    log_p = dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])).log_prob(w)
    log_p = log_p + dist.LogNormal(0.0, 1.0).log_prob(s).sum(-1)
    log_p = log_p + dist.Normal(0.0, s).log_prob(z).sum(-1)
    log_p = log_p + dist.Normal(z * w[:, :1], 1.0).log_prob(X).sum(-1)
    log_jacobian = u[:, 2] + stick.log_abs_det_jacobian(u[:, :2], w)
    score = known_score(u.detach())
    (-(log_p + log_jacobian - (score * u).sum(-1)).mean()).backward()
    for name, value in parameters.items():
        assert (value.grad != 0).all(), name
        torch.testing.assert_close(actual[name], value.grad, rtol=1e-9, atol=1e-12, msg=name)


SD = torch.tensor([0.5, 1.0, 1.5, 2.0])
LOC = torch.tensor([1.0, -1.0, 2.0, 0.0])


def correlated():
    covariance = (0.9 + 0.1 * torch.eye(4)) * SD * SD[:, None]
    sample("z", dist.MultivariateNormal(LOC, covariance))


def test_training_finds_a_correlated_posterior():
    guide = AutoImplicit(correlated, hidden=(16,))
    optimizer = pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.03}, "gamma": 0.99}
    )
    loss = ImplicitELBO(100, vectorize_particles=True)
    svi = SVI(correlated, guide, optimizer, loss=loss)
    for _ in range(400):
        svi.step()
        optimizer.step()
    with torch.no_grad():
        draws = Predictive(guide, num_samples=4000, parallel=True)()["z"].reshape(-1, 4)
    torch.testing.assert_close((draws.mean(0) - LOC) / SD, torch.zeros(4), atol=0.1, rtol=0)
    torch.testing.assert_close(draws.std(0) / SD, torch.ones(4), atol=0.1, rtol=0)
    correlation = np.corrcoef(draws.T)[np.triu_indices(4, 1)]
    np.testing.assert_allclose(correlation, 0.9, atol=0.04)


@pytest.mark.parametrize("parallel", [False, True], ids=["loop", "parallel"])
def test_draws_go_through_predictive(parallel):
    guide = started()
    draws = Predictive(constrained, guide=guide, num_samples=7, parallel=parallel)()
    assert draws["x"].shape == (7, 3)
    draws = Predictive(guide, num_samples=7, parallel=parallel)()
    assert draws["z"].shape == (7, 3)
    torch.testing.assert_close(draws["w"].sum(-1).flatten(), torch.ones(7))


# --- bad input -----------------------------------------------------------------------------------


def test_what_needs_a_density_is_refused():
    guide = started()
    for refused in (guide.median, lambda: guide.quantiles([0.5])):
        with pytest.raises(NotImplementedError, match=r"closed form.*Predictive"):
            refused()
    with pytest.raises(NotImplementedError, match="no posterior to evaluate"):
        guide.get_posterior()
    with pytest.raises(NotImplementedError, match=r"no density.*importance weights"):
        importance_samples(constrained, guide)
    with pytest.raises(NotImplementedError, match=r"ImplicitELBO\(num_particles"):
        IWAE(3).loss(constrained, guide)


def test_subsampled_latents_are_refused():
    def model():
        with plate("data", 4, subsample_size=2):
            sample("z", dist.Normal(0.0, 1.0))

    guide = AutoImplicit(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"plate 'data'.*subsampled \(2 of 4\).*jointly"):
            guide()


def test_too_little_noise_is_refused():
    guide = AutoImplicit(correlated, num_noise=3)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"num_noise >= 4.*got 3.*entropy is -inf"):
            guide()


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
