"""Implicit sites: the gradient as it is defined, draw for draw, and what is refused.

With a score estimator that is a known function, nothing of ``ImplicitELBO`` is an estimate: at the
noise that was drawn, its loss and gradient can be written out.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import plate, poutine, sample
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger

from pyro_gradest import IWAE, Implicit, ImplicitELBO
from tests.oracles import score as oracle

K = 5
X = torch.tensor([0.9, -0.4, 0.1, 1.7])


def param(name, value):
    return pyro.param(name, lambda: torch.as_tensor(value).clone())


def log_normal(value, loc, scale):
    return dist.Normal(torch.as_tensor(loc), torch.as_tensor(scale)).log_prob(
        torch.as_tensor(value)
    )


def known_score(samples):
    """No score of anything, but a function whose every entry differs by sample and dim."""
    assert samples.shape[-2] == K
    return torch.sin(3.0 * samples) - 0.3 * samples.sum(-1, keepdim=True)


def noise(name="noise", shape=()):
    fn = dist.Normal(0.0, 1.0).expand(shape).to_event(len(shape))
    return sample(name, fn, infer={"is_auxiliary": True})


class Case(NamedTuple):
    model: Callable[[], Any]
    guide: Callable[[], Any]
    params: dict[str, Any]
    elbo: Callable[[dict, dict], Any]
    """(params, draws of one particle) -> log p - log q of the explicit sites, with scales."""
    implicit: Callable[[dict, dict], list]
    """(params, draws of one particle) -> [(draw ``[*plates, D]``, weight ``[*plates]``), ...]"""


def global_sites():
    """Two sites, one of them positive: their entropy is joint, in unconstrained space."""

    def model():
        y = sample("y", dist.Normal(0.0, 1.0))
        z = sample("z", dist.Gamma(2.0, 1.0).expand([2]).to_event(1))
        sample("x", dist.Normal(param("slope", 0.8) * y, z.sum(-1)), obs=torch.tensor(0.7))

    def guide():
        a, b = param("a", 0.3), param("b", 0.5)
        e = noise(shape=(3,))
        sample("y", Implicit(a + b * e[..., 0] * e[..., 1]))
        sample("z", Implicit(torch.exp(b * e[..., 1:] + a * e[..., :1]), event_dim=1))

    def latents(params, draws):
        a, b, e = params["a"], params["b"], draws["noise"]
        return a + b * e[0] * e[1], b * e[1:] + a * e[0]

    def elbo(params, draws):
        y, u = latents(params, draws)
        z = torch.exp(u)
        log_prior = log_normal(y, 0.0, 1.0) + (torch.log(z) - z).sum()
        # log|dz/du| = u belongs to the entropy of z.
        return log_prior + log_normal(0.7, params["slope"] * y, z.sum()) + u.sum()

    def implicit(params, draws):
        y, u = latents(params, draws)
        return [(torch.cat([y[None], u]), 1.0)]

    return Case(model, guide, {"slope": 0.8, "a": 0.3, "b": 0.5}, elbo, implicit)


def local_sites(wrap=lambda fn: fn, weight=1.0):
    """An entropy for each element of two plates."""

    def model():
        with plate("rows", 2, dim=-2), plate("data", 4, dim=-1):
            z = sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            sample("x", dist.Normal(param("slope", 0.8) * z.sum(-1), 1.0), obs=X)

    def guide():
        a = param("a", torch.linspace(-1.0, 1.0, 16).reshape(2, 4, 2))
        with plate("rows", 2, dim=-2), plate("data", 4, dim=-1):
            e = noise(shape=(2,))
            sample("z", Implicit(a * e + e**2, event_dim=1))

    def latents(params, draws):
        return params["a"] * draws["noise"] + draws["noise"] ** 2

    def elbo(params, draws):
        z = latents(params, draws)
        log_p = log_normal(z, 0.0, 1.0).sum(-1)
        log_p += log_normal(X, params["slope"] * z.sum(-1), 1.0)
        return (weight * log_p).sum()

    def implicit(params, draws):
        return [(latents(params, draws), torch.as_tensor(1.0 * weight).expand(2, 4))]

    params = {"slope": 0.8, "a": torch.linspace(-1.0, 1.0, 16).reshape(2, 4, 2)}
    return Case(wrap(model), wrap(guide), params, elbo, implicit)


def scaled():
    return local_sites(lambda fn: poutine.scale(fn, 0.3), 0.3)


def annealed():
    """The model alone is scaled: log p counts less, the entropy does not."""
    case = local_sites()
    return case._replace(
        model=poutine.scale(case.model, 0.3), elbo=lambda *args: 0.3 * case.elbo(*args)
    )


def masked():
    mask = torch.tensor([True, False, True, True])
    return local_sites(lambda fn: poutine.mask(fn, mask=mask), mask)


def subsampled():
    """A global implicit site beside local ones, of which each step sees half."""

    def model():
        y = sample("y", dist.Normal(0.0, 1.0))
        with plate("data", 4, subsample_size=2) as rows:
            z = sample("z", dist.Normal(y, 1.0))
            sample("x", dist.Normal(z, 1.0), obs=X[rows])

    def guide():
        a, b = param("a", 0.3), param("b", X)
        sample("y", Implicit(a * noise("e") ** 2))
        with plate("data", 4, subsample_size=2) as rows:
            sample("z", Implicit(b[rows] + a * noise("f")))

    def latents(params, draws):
        rows = draws["data"]
        return params["a"] * draws["e"] ** 2, params["b"][rows] + params["a"] * draws["f"]

    def elbo(params, draws):
        y, z = latents(params, draws)
        log_local = log_normal(z, y, 1.0) + log_normal(X[draws["data"]], z, 1.0)
        return log_normal(y, 0.0, 1.0) + 2.0 * log_local.sum()

    def implicit(params, draws):
        y, z = latents(params, draws)
        return [(y[None], 1.0), (z[:, None], torch.full((2,), 2.0))]

    return Case(model, guide, {"a": 0.3, "b": X}, elbo, implicit)


def explicit_given_implicit():
    """A site with a density may depend on one without; learnable noise is no latent."""

    def model():
        z = sample("z", dist.Normal(0.0, 1.0))
        y = sample("y", dist.Normal(z, 1.0))
        sample("x", dist.Normal(y, 1.0), obs=torch.tensor(0.7))

    def guide():
        a = param("a", 0.3)
        e = sample("e", dist.Normal(a, torch.exp(a)), infer={"is_auxiliary": True})
        z = sample("z", Implicit(torch.sinh(e)))
        sample("y", dist.Normal(a * z, 0.5))

    def latents(params, draws):
        # Standardised, the draws are noise that no parameter moves.
        a = params["a"]
        z = torch.sinh(a + torch.exp(a) * (draws["e"] - 0.3) / math.exp(0.3))
        return z, a * z + draws["y"] - 0.3 * torch.sinh(draws["e"])

    def elbo(params, draws):
        z, y = latents(params, draws)
        log_p = log_normal(z, 0.0, 1.0) + log_normal(y, z, 1.0) + log_normal(0.7, y, 1.0)
        return log_p - log_normal(y, params["a"] * z, 0.5)

    def implicit(params, draws):
        return [(latents(params, draws)[0][None], 1.0)]

    return Case(model, guide, {"a": 0.3}, elbo, implicit)


CASES = [global_sites, local_sites, scaled, annealed, masked, subsampled, explicit_given_implicit]


class Recorder(Messenger):
    """What each particle drew."""

    def __init__(self):
        super().__init__()
        self.values = {}

    def _pyro_post_sample(self, msg):
        if not msg["is_observed"] and msg["name"] != "num_particles_vectorized":
            value = msg["value"] if msg["name"] == "data" else msg["value"].detach()
            self.values.setdefault(msg["name"], []).append(value)

    def draws(self, names, vectorize):
        """By particle, dims of size one dropped that stand for plates the site is not in."""
        by_site = {}
        for name, values in self.values.items():
            if not vectorize:
                by_site[name] = values[:: len(values) // K]  # a latent is met in the model again
            else:
                is_subsample = not values[0].is_floating_point()
                by_site[name] = [values[0]] * K if is_subsample else values[0]
        return [{n: by_site[n][k].reshape(shape) for n, shape in names.items()} for k in range(K)]


@pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vectorized"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_loss_and_gradient_follow_the_definition(case, vectorize):
    case = case()
    elbo = ImplicitELBO(K, score_estimator=known_score, vectorize_particles=vectorize)
    elbo.loss(case.model, case.guide)  # creates the parameters, and finds what depends on what
    with Recorder() as recorder:
        loss = elbo.loss_and_grads(case.model, case.guide)
    store = pyro.get_param_store()
    actual = {name: store[name].unconstrained().grad for name in case.params}
    one = poutine.trace(case.guide).get_trace()
    shapes = {name: one.nodes[name]["value"].shape for name in recorder.values}
    draws = recorder.draws(shapes, vectorize)

    params = {n: torch.as_tensor(v).clone().requires_grad_() for n, v in case.params.items()}
    total = sum(case.elbo(params, each) for each in draws) / K
    elbo_value = total.item()
    for group in zip(*(case.implicit(params, each) for each in draws), strict=True):
        samples = torch.stack([u for u, _ in group], dim=-2)
        weight = torch.as_tensor(group[0][1])
        score = known_score(samples.detach())
        total = total - (weight * (score * samples).sum(-1).mean(-1)).sum()
        entropies = oracle.per_batch_element(oracle.knn_entropy, samples.detach().numpy())
        elbo_value += (weight.numpy() * entropies).sum()
    (-total).backward()
    np.testing.assert_allclose(loss, -elbo_value, rtol=1e-10)
    for name, leaf in params.items():
        torch.testing.assert_close(actual[name], leaf.grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vectorized"])
def test_discrete_sites_beside_implicit_ones(vectorize):
    """The others' mean is the baseline; the implicit entropy is no part of the signal."""

    def model():
        b = sample("b", dist.Bernoulli(0.3))
        z = sample("z", dist.Normal(0.0, 1.0))
        sample("x", dist.Normal(b + z, 1.0), obs=torch.tensor(0.7))

    def guide():
        sample("b", dist.Bernoulli(logits=param("logit", 0.4)))
        sample("z", Implicit(param("a", 0.3) * noise()))

    elbo = ImplicitELBO(K, score_estimator=known_score, vectorize_particles=vectorize)
    elbo.loss(model, guide)
    with Recorder() as recorder:
        elbo.loss_and_grads(model, guide)
    draws = recorder.draws({"b": (), "noise": ()}, vectorize)
    b, e = (torch.stack([each[name] for each in draws]) for name in ("b", "noise"))
    z = 0.3 * e
    f = dist.Bernoulli(0.3).log_prob(b) + log_normal(z, 0.0, 1.0) + log_normal(0.7, b + z, 1.0)
    f -= dist.Bernoulli(logits=torch.tensor(0.4)).log_prob(b)
    baseline = (f.sum() - f) / (K - 1)
    expected = -((f - baseline) * (b - torch.tensor(0.4).sigmoid())).mean()
    torch.testing.assert_close(pyro.param("logit").grad, expected)


@pytest.mark.parametrize("shape", [(9, 1), (2, 12, 3)], ids=str)
def test_the_default_score_estimator_equals_the_oracle(shape):
    """Stein's at 0.7 times the median distance of the whitened samples, calibrated."""

    def desired(samples):
        mean, factor = oracle.whitening(samples)
        whitened = np.linalg.solve(factor, (samples - mean).T).T
        bandwidth = 0.7 * oracle.median_bandwidth(whitened)
        return oracle.calibrate(samples, oracle.stein(samples, bandwidth=bandwidth))

    samples = np.random.default_rng(0).gamma(2.0, size=shape)
    actual = ImplicitELBO(shape[-2]).score_estimator(torch.as_tensor(samples))
    np.testing.assert_allclose(actual, oracle.per_batch_element(desired, samples), rtol=1e-7)


# --- in SVI --------------------------------------------------------------------------------------


def conjugate():
    with plate("data", 4):
        z = sample("z", dist.Normal(0.0, 1.0))
        sample("x", dist.Normal(z, 1.0), obs=X)


def conjugate_guide():
    loc, scale = param("loc", torch.zeros(4)), param("scale", torch.ones(4))
    with plate("data", 4):
        sample("z", Implicit(loc + scale * noise()))


def test_training_finds_the_posterior():
    """Normal(x / 2, 1/2); a guide without the entropy's gradient would shrink to a point."""
    pyro.set_rng_seed(0)
    optimizer = pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.98}
    )
    svi = SVI(
        conjugate, conjugate_guide, optimizer, loss=ImplicitELBO(50, vectorize_particles=True)
    )
    losses = []
    for _ in range(250):
        losses.append(svi.step())
        optimizer.step()
    loc, scale = pyro.param("loc"), pyro.param("scale")
    torch.testing.assert_close(loc.detach(), X / 2, atol=0.1, rtol=0)
    torch.testing.assert_close(scale.detach().abs(), torch.full((4,), 0.5**0.5), atol=0.05, rtol=0)
    evidence = dist.Normal(0.0, math.sqrt(2)).log_prob(X).sum()
    assert abs(np.mean(losses[-50:]) + evidence) < 0.3
    draws = Predictive(conjugate, guide=conjugate_guide, num_samples=1000, return_sites=["z"])()
    torch.testing.assert_close(draws["z"].detach().mean(0).flatten(), X / 2, atol=0.15, rtol=0)


def test_the_module_form_has_the_same_gradient():
    elbo = ImplicitELBO(K, score_estimator=known_score, vectorize_particles=True)
    elbo.loss(conjugate, conjugate_guide)
    gradients = []
    for run in (elbo.loss_and_grads, lambda *programs: elbo(*programs)().backward()):
        pyro.set_rng_seed(3)
        run(conjugate, conjugate_guide)
        scale = pyro.param("scale").unconstrained()
        gradients.append(scale.grad.clone())
        scale.grad = None
    torch.testing.assert_close(*gradients)


def test_loss_is_that_of_a_step_at_the_same_seed():
    elbo = ImplicitELBO(K)
    values = []
    for run in (elbo.loss, elbo.loss_and_grads, elbo.differentiable_loss):
        pyro.set_rng_seed(3)
        values.append(torch.as_tensor(run(conjugate, conjugate_guide)).item())
    assert values[0] == pytest.approx(values[1]) == pytest.approx(values[2])


def test_too_few_particles_give_one_warning():
    pyro.clear_param_store()

    def model():
        sample("z", dist.Normal(0.0, 1.0).expand([4]).to_event(1))

    def guide():
        sample("z", Implicit(param("scale", 1.0) * noise(shape=(4,)), event_dim=1))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=ImplicitELBO(3))
    with pytest.warns(UserWarning, match="3 samples in 4 dimensions") as warned:
        svi.step()
    assert len(warned) == 1


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [Trace_ELBO(), TraceMeanField_ELBO(), IWAE(3)])
def test_other_losses_refuse_implicit_sites(loss):
    svi = SVI(conjugate, conjugate_guide, pyro.optim.Adam({}), loss=loss)
    with pytest.raises(NotImplementedError, match=r"ImplicitELBO\(num_particles"):
        svi.step()


def depends_on_a_latent():
    z = sample("z", Implicit(param("a", 0.3) * noise("e")))
    with plate("data", 4):
        sample("y", Implicit(z + noise("f")))


def depends_on_a_discrete_latent():
    b = sample("z", dist.Bernoulli(0.5))
    with plate("data", 4):
        sample("y", Implicit(param("a", 0.3) * b + noise("f")))


def without_noise():
    sample("z", Implicit(param("a", 0.3)))
    with plate("data", 4):
        sample("y", Implicit(noise("f")))


def discrete_noise():
    e = sample("e", dist.Bernoulli(0.5), infer={"is_auxiliary": True})
    sample("z", Implicit(param("a", 0.3) * e))
    with plate("data", 4):
        sample("y", Implicit(noise("f")))


def shared_noise():
    e = noise("e")
    sample("z", Implicit(param("a", 0.3) * e))
    with plate("data", 4):
        sample("y", Implicit(e + noise("f")))


def observed():
    sample("z", Implicit(param("a", 0.3) * noise("e")))
    with plate("data", 4):
        sample("y", Implicit(noise("f")), obs=X)


def infinite():
    sample("z", Implicit(param("a", 0.3) * noise("e") + math.inf))
    with plate("data", 4):
        sample("y", Implicit(noise("f")))


@pytest.mark.parametrize(
    ("guide", "match"),
    [
        (depends_on_a_latent, "site 'y' depends on the draw of site 'z'"),
        (depends_on_a_discrete_latent, "site 'y' depends on the draw of site 'z'"),
        (without_noise, "site 'z' is computed from no noise.*is_auxiliary"),
        (discrete_noise, "'z' is computed from 'e'.*no gradient passes"),
        (shared_noise, "'y' lies in plate 'data' but its noise 'e' outside"),
        (observed, "site 'y' is observed|Model site 'y'"),
        (infinite, r"implicit sites \['z'\] is not finite"),
    ],
)
def test_guides_that_have_no_entropy_to_estimate_are_refused(guide, match):
    def model():
        z = sample("z", dist.Normal(0.0, 1.0))
        with plate("data", 4):
            sample("y", dist.Normal(1.0 * z, 1.0))

    with pytest.raises(ValueError, match=match):
        ImplicitELBO(3).loss_and_grads(model, guide)
    assert all(value.grad is None for _, value in pyro.get_param_store().named_parameters())


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: ImplicitELBO(1), ValueError, "num_particles >= 2 .*five per dimension.*got 1"),
        (lambda: ImplicitELBO(2.0), TypeError, r"num_particles.*2\.0"),
        (lambda: ImplicitELBO(3, reparam="stl"), ValueError, "reparam="),
        (lambda: ImplicitELBO(3, score_estimator="stein"), TypeError, "score_estimator.*'stein'"),
        (lambda: Implicit(torch.arange(3)), TypeError, "floating tensor.*int"),
        (lambda: Implicit(torch.zeros(3), event_dim=2), ValueError, "event_dim <= 1.*got 2"),
    ],
)
def test_options_are_checked(build, error, match):
    with pytest.raises(error, match=f"(?s){match}"):
        build()


def test_a_score_estimator_that_changes_the_shape_is_refused():
    elbo = ImplicitELBO(3, score_estimator=lambda samples: samples[..., 0])
    with pytest.raises(ValueError, match="score_estimator"):
        elbo.loss_and_grads(conjugate, conjugate_guide)


def test_a_mixture_as_the_models_prior():
    """The host knows no map to the support of mixtures; their components have one."""

    def model():
        normals = dist.Normal(torch.tensor([-1.0, 1.0]), torch.tensor(0.5))
        sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), normals))

    def guide():
        sample("z", Implicit(param("a", 0.3) * noise()))

    assert math.isfinite(ImplicitELBO(5).loss_and_grads(model, guide))
    assert pyro.param("a").grad != 0


def test_draws_outside_of_the_models_support_are_refused():
    def model():
        z = sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("impossible", torch.where(z < 10, -math.inf, 0.0))

    def guide():
        sample("z", Implicit(param("a", 0.3) * noise()))

    with pytest.raises(ValueError, match=r"loss is infinite.*no probability"):
        ImplicitELBO(5).loss_and_grads(model, guide)
    assert pyro.param("a").grad is None
