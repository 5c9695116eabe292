"""Semi-implicit guides: the bound as it is defined, draw for draw, and by enumeration."""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import plate, poutine, sample
from pyro.infer import SVI, Predictive
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormalMessenger
from pyro.poutine.messenger import Messenger

from pyro_gradest import Implicit, SemiImplicitELBO

K, J = 3, 2
X = torch.tensor([0.9, -0.4, 0.1, 1.7])


def param(name, value):
    return pyro.param(name, lambda: torch.as_tensor(value).clone())


def log_normal(value, loc, scale):
    return dist.Normal(torch.as_tensor(loc), torch.as_tensor(scale)).log_prob(
        torch.as_tensor(value)
    )


def log_bernoulli(logits, value):
    return dist.Bernoulli(logits=torch.as_tensor(logits)).log_prob(value)


def noise(name="noise", fn=None):
    return sample(name, fn or dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})


class Case(NamedTuple):
    model: Callable[[], Any]
    guide: Callable[[], Any]
    params: dict[str, Any]
    replay: Callable[[dict, dict], dict]
    """(params, draws) -> the same draws as functions of the parameters, where reparameterised."""
    log_p: Callable[[dict, dict], Any]
    """(params, draws) -> ``[*batch]``, with scale."""
    log_q: Callable[[dict, dict, dict], Any]
    """(params, draws of the latents, draws of the noise) -> ``[*plates]``, without scale."""
    scale: Any = 1.0
    sum_mixtures: Callable[[Any], Any] = lambda log_q: log_q
    """``[*plates]`` -> ``[*batch]``"""
    log_latents: Callable[[dict, dict], Any] = lambda params, draws: 0.0
    """Log-density of score-function draws among the latents, ``[*batch]``."""
    log_noise: Callable[[dict, dict], Any] = lambda params, draws: 0.0


def global_sites():
    """Learnable noise under two latents, the second given the first; one is positive."""

    def model():
        y = sample("y", dist.Normal(0.0, 1.0))
        z = sample("z", dist.LogNormal(0.0, 1.0).expand([2]).to_event(1))
        sample("x", dist.Normal(y, z.sum(-1)), obs=torch.tensor(0.7))

    def guide():
        a, b = param("a", 0.3), param("b", 0.5)
        e = noise(fn=dist.Normal(a, torch.exp(b)))
        y = sample("y", dist.Normal(torch.sinh(e), 0.5))
        loc = (b * e + a * y)[..., None]
        sample("z", dist.LogNormal(loc, torch.exp(a).expand(2)).to_event(1))

    def replay(params, draws):
        a, b = params["a"], params["b"]
        e = a + torch.exp(b) * (draws["noise"] - 0.3) / math.exp(0.5)
        y = torch.sinh(e) + draws["y"] - torch.sinh(draws["noise"])
        before = torch.log(draws["z"]) - 0.5 * draws["noise"] - 0.3 * draws["y"]
        z = torch.exp(b * e + a * y + torch.exp(a) * before / math.exp(0.3))
        return {"noise": e, "y": y, "z": z}

    def log_p(params, z):
        log_prior = log_normal(z["y"], 0.0, 1.0) + dist.LogNormal(0.0, 1.0).log_prob(z["z"]).sum()
        return log_prior + log_normal(0.7, z["y"], z["z"].sum())

    def log_q(params, z, e):
        a, b, e = params["a"], params["b"], e["noise"]
        log_q = log_normal(z["y"], torch.sinh(e), 0.5)
        return log_q + dist.LogNormal(b * e + a * z["y"], torch.exp(a)).log_prob(z["z"]).sum()

    return Case(model, guide, {"a": 0.3, "b": 0.5}, replay, log_p, log_q)


A = torch.linspace(-1.0, 1.0, 8, dtype=torch.float64).reshape(2, 4)


def local_sites(wrap=lambda fn: fn, scale=1.0, mask=1.0):
    """A mixture for each element of two plates."""

    def model():
        with plate("rows", 2, dim=-2), plate("data", 4, dim=-1):
            z = sample("z", dist.Normal(0.0, 1.0))
            sample("x", dist.Normal(param("slope", 0.8) * z, 1.0), obs=X)

    def guide():
        a = param("a", A)
        with plate("rows", 2, dim=-2), plate("data", 4, dim=-1):
            e = noise()
            sample("z", dist.Normal(a * e + e**2, 0.5))

    def replay(params, draws):
        e = draws["noise"]
        return {"noise": e, "z": (params["a"] - A) * e + draws["z"]}

    def log_p(params, z):
        log_p = log_normal(z["z"], 0.0, 1.0) + log_normal(X, params["slope"] * z["z"], 1.0)
        return scale * mask * log_p

    def log_q(params, z, e):
        return mask * log_normal(z["z"], params["a"] * e["noise"] + e["noise"] ** 2, 0.5)

    params = {"slope": 0.8, "a": A}
    return Case(wrap(model), wrap(guide), params, replay, log_p, log_q, scale)


def scaled():
    return local_sites(lambda fn: poutine.scale(fn, 0.3), 0.3)


def scaled_by_element():
    scale = torch.tensor([0.5, 2.0, 1.0, 0.1])
    return local_sites(lambda fn: poutine.scale(fn, scale), scale)


def masked():
    mask = torch.tensor([True, False, True, True])
    return local_sites(lambda fn: poutine.mask(fn, mask=mask), mask=mask.double())


def subsampled():
    def model():
        with plate("data", 4, subsample_size=2) as rows:
            z = sample("z", dist.Normal(0.0, 1.0))
            sample("x", dist.Normal(z, 1.0), obs=X[rows])

    def guide():
        b = param("b", X)
        with plate("data", 4, subsample_size=2) as rows:
            sample("z", dist.Normal(b[rows] * noise(), 0.5))

    def replay(params, draws):
        b = params["b"] - X
        return draws | {"z": b[draws["data"]] * draws["noise"] + draws["z"]}

    def log_p(params, z):
        return 2.0 * (log_normal(z["z"], 0.0, 1.0) + log_normal(X[z["data"]], z["z"], 1.0))

    def log_q(params, z, e):
        return log_normal(z["z"], params["b"][z["data"]] * e["noise"], 0.5)

    return Case(model, guide, {"b": X}, replay, log_p, log_q, 2.0)


def shared_noise():
    """Noise outside of the plate of the latents: one mixture over all of them."""

    def model():
        with plate("data", 4):
            z = sample("z", dist.Normal(0.0, 1.0))
            sample("x", dist.Normal(z, 1.0), obs=X)

    def guide():
        b, e = param("b", X), noise()
        with plate("data", 4):
            sample("z", dist.Normal(b * e, 0.5))

    def replay(params, draws):
        return draws | {"z": (params["b"] - X) * draws["noise"] + draws["z"]}

    def log_p(params, z):
        return (log_normal(z["z"], 0.0, 1.0) + log_normal(X, z["z"], 1.0)).sum()

    def log_q(params, z, e):
        return log_normal(z["z"], params["b"] * e["noise"], 0.5).sum()

    return Case(model, guide, {"b": X}, replay, log_p, log_q)


def discrete_latents():
    """Each element has a learning signal of its own; the noise moves the reparameterised site."""

    def model():
        with plate("data", 4):
            b = sample("b", dist.Bernoulli(0.3))
            z = sample("z", dist.Normal(b, 1.0))
            sample("x", dist.Normal(z, 1.0), obs=X)

    def guide():
        a = param("a", X)
        with plate("data", 4):
            e = noise()
            sample("b", dist.Bernoulli(logits=a * e + 0.2))
            sample("z", dist.Normal(a + e, 0.5))

    def replay(params, draws):
        return draws | {"z": params["a"] - X + draws["z"]}

    def log_p(params, z):
        log_p = log_bernoulli(math.log(0.3 / 0.7), z["b"]) + log_normal(z["z"], z["b"], 1.0)
        return log_p + log_normal(X, z["z"], 1.0)

    def log_b(params, z, e):
        return log_bernoulli(params["a"] * e["noise"] + 0.2, z["b"])

    def log_q(params, z, e):
        return log_b(params, z, e) + log_normal(z["z"], params["a"] + e["noise"], 0.5)

    return Case(
        model,
        guide,
        {"a": X},
        replay,
        log_p,
        log_q,
        log_latents=lambda params, draws: log_b(params, draws, draws),
    )


def discrete_noise():
    """The model couples what the guide draws apart: mixtures by element, one learning signal."""

    def model():
        with plate("data", 4):
            z = sample("z", dist.Normal(0.0, 1.0))
        sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0), obs=torch.tensor([0.7]))

    def guide():
        a, b = param("a", X), param("b", 0.5)
        with plate("data", 4):
            e = noise(fn=dist.Bernoulli(logits=a))
            sample("z", dist.Normal(b * e, 0.5))

    def replay(params, draws):
        return draws | {"z": (params["b"] - 0.5) * draws["noise"] + draws["z"]}

    def log_p(params, z):
        return log_normal(z["z"], 0.0, 1.0).sum() + log_normal(0.7, z["z"].sum(), 1.0)

    def log_q(params, z, e):
        return log_normal(z["z"], params["b"] * e["noise"], 0.5)

    return Case(
        model,
        guide,
        {"a": X, "b": 0.5},
        replay,
        log_p,
        log_q,
        sum_mixtures=torch.sum,
        log_noise=lambda params, draws: log_bernoulli(params["a"], draws["noise"]).sum(),
    )


CASES = [
    global_sites,
    local_sites,
    scaled,
    scaled_by_element,
    masked,
    subsampled,
    shared_noise,
    discrete_latents,
    discrete_noise,
]


class Recorder(Messenger):
    """What each run of the guide drew; a latent is met in the model again."""

    def __init__(self):
        super().__init__()
        self.values = {}

    def _pyro_post_sample(self, msg):
        if not msg["is_observed"] and msg["name"] != "num_particles_vectorized":
            self.values.setdefault(msg["name"], []).append(msg["value"].detach())

    def runs(self, shapes, vectorize):
        """For each particle its own draws, and those of the J runs at its latents."""
        own = [{} for _ in range(K)]
        others = [[{} for _ in range(J)] for _ in range(K)]
        for name, shape in shapes.items():
            values = self.values[name]
            is_noise = name == "noise"
            for k in range(K):
                if name in ("rows", "data"):
                    own[k][name] = values[0]
                elif vectorize:
                    own[k][name] = values[0][k].reshape(shape)
                else:
                    own[k][name] = values[k * (1 + J) if is_noise else 2 * k]
                for j in range(J if is_noise else 0):
                    value = values[1][j * K + k] if vectorize else values[k * (1 + J) + 1 + j]
                    others[k][j][name] = value.reshape(shape)
        # The runs at a particle's latents and subsample draw nothing but noise.
        return own, [
            [one | redrawn for redrawn in row] for one, row in zip(own, others, strict=True)
        ]


def gradients():
    return {name: value.grad for name, value in pyro.get_param_store().named_parameters()}


@pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vectorized"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_loss_and_gradient_follow_the_definition(case, vectorize):
    case = case()
    elbo = SemiImplicitELBO(K, num_mixing=J, vectorize_particles=vectorize)
    elbo.loss(case.model, case.guide)  # creates the parameters
    with Recorder() as recorder:
        loss = elbo.loss_and_grads(case.model, case.guide)
    one = poutine.trace(case.guide).get_trace()
    shapes = {name: one.nodes[name]["value"].shape for name in recorder.values}
    own, others = recorder.runs(shapes, vectorize)

    params = {n: torch.as_tensor(v).clone().requires_grad_() for n, v in case.params.items()}
    elbos, log_drawn = [], []
    for draws, redraws in zip(own, others, strict=True):
        z, *redrawn = (case.replay(params, each) for each in (draws, *redraws))
        log_q = torch.stack([case.log_q(params, z, e) for e in (z, *redrawn)])
        mixture = case.sum_mixtures(case.scale * (log_q.logsumexp(0) - math.log(1 + J)))
        elbos.append(case.log_p(params, z) - mixture)
        log_drawn.append(case.log_latents(params, draws) + 0.0 * elbos[-1])
        log_drawn[-1] = log_drawn[-1] + sum(case.log_noise(params, e) for e in (draws, *redraws))
    expected = torch.stack(elbos)
    signal = (expected - (expected.sum(0) - expected) / (K - 1)).detach()
    (-(expected + signal * torch.stack(log_drawn)).sum() / K).backward()
    np.testing.assert_allclose(loss, -expected.detach().mean(0).sum(), rtol=1e-10)
    actual = gradients()
    for name, leaf in params.items():
        torch.testing.assert_close(actual[name], leaf.grad, rtol=1e-9, atol=1e-12, msg=name)


# --- by enumeration ------------------------------------------------------------------------------

LOG_JOINT = torch.log(torch.tensor([0.3, 0.1]))


def two_values():
    z = sample("z", dist.Bernoulli(0.25))
    sample("x", dist.Bernoulli(0.4 + 0.0 * z), obs=torch.tensor(1.0))


def two_components():
    e = noise(fn=dist.Bernoulli(logits=param("mix", 0.4)))
    logits = param("logits", torch.tensor([-0.7, 1.1]))
    sample("z", dist.Bernoulli(logits=logits[e.long()]))


class Force(Messenger):
    """Gives the guide's sites the values it holds, in the order in which they are drawn."""

    def __init__(self, values):
        super().__init__()
        self.values = {name: list(value) for name, value in values.items()}

    def _pyro_sample(self, msg):
        if msg["value"] is None:
            msg["value"] = self.values[msg["name"]].pop(0)


@pytest.mark.parametrize(("num_particles", "num_mixing"), [(1, 1), (1, 2), (2, 1)])
def test_gradient_is_that_of_the_exact_bound(num_particles, num_mixing):
    """All that is drawn is discrete: the expectation of the estimator is a sum."""
    elbo = SemiImplicitELBO(num_particles, num_mixing=num_mixing)
    elbo.loss(two_values, two_components)  # creates the parameters
    params = {name: param(name, 0.0) for name in ("mix", "logits")}
    size = num_particles * (1 + num_mixing)

    value, exact, estimate = 0.0, 0.0, dict.fromkeys(params, 0.0)
    total = 0.0
    for draws in itertools.product([0.0, 1.0], repeat=size + num_particles):
        e, z = torch.tensor(draws[:size]), torch.tensor(draws[size:])
        components = e.reshape(num_particles, 1 + num_mixing).long()
        log_q = log_bernoulli(params["logits"][components], z[:, None])
        probability = (log_bernoulli(params["mix"], e).sum() + log_q[:, 0].sum()).exp()
        mixture = log_q.logsumexp(1) - math.log(1 + num_mixing)
        exact = exact - probability * (LOG_JOINT[z.long()] - mixture).mean()
        total += probability.item()
        with Force({"noise": e, "z": z}):
            value += probability.item() * elbo.loss_and_grads(two_values, two_components)
        for name, leaf in params.items():
            estimate[name] = estimate[name] + probability.item() * leaf.grad
            leaf.grad = None
    exact.backward()
    assert total == pytest.approx(1.0)
    assert value == pytest.approx(exact.item(), rel=1e-10)
    assert value > -math.log(0.4)
    for name, leaf in params.items():
        torch.testing.assert_close(estimate[name], leaf.grad, rtol=0, atol=1e-10)


# --- in SVI --------------------------------------------------------------------------------------


def conjugate():
    with plate("data", 4):
        z = sample("z", dist.Normal(0.0, 1.0))
        sample("x", dist.Normal(z, 1.0), obs=X)


def conjugate_guide():
    """With these initial values the mixture is the posterior, Normal(x / 2, 1/2)."""
    loc, width = param("loc", X / 2), param("width", torch.full((4,), 0.6))
    with plate("data", 4):
        sample("z", dist.Normal(loc + width * noise(), math.sqrt(0.5 - 0.36)))


PROGRAMS = conjugate, conjugate_guide
EVIDENCE = dist.Normal(0.0, math.sqrt(2)).log_prob(X).sum().item()


def test_bound_tightens_up_to_the_evidence():
    bounds, errors = [], []
    for num_mixing in (1, 4, 16, 64):
        elbo = SemiImplicitELBO(200, num_mixing=num_mixing, vectorize_particles=True)
        values = [-elbo.loss(*PROGRAMS) for _ in range(64)]
        bounds.append(np.mean(values))
        errors.append(np.std(values) / 8)
    assert max(errors) < 0.02, "uninformative"
    for (low, low_error), (high, high_error) in itertools.pairwise(
        zip([*bounds, EVIDENCE], [*errors, 0.0], strict=True)
    ):
        assert high - low > -4 * math.hypot(low_error, high_error)
    assert bounds[1] - bounds[0] > 4 * math.hypot(*errors[:2])
    assert EVIDENCE - bounds[-1] < 0.1


def test_training_finds_the_posterior():
    param("loc", torch.zeros(4))
    param("width", torch.full((4,), 0.2))
    loss = SemiImplicitELBO(20, num_mixing=30, vectorize_particles=True)
    svi = SVI(*PROGRAMS, pyro.optim.Adam({"lr": 0.03}), loss=loss)
    losses = [svi.step() for _ in range(300)]
    loc, width = (pyro.param(name).detach() for name in ("loc", "width"))
    torch.testing.assert_close(loc, X / 2, atol=0.1, rtol=0)
    torch.testing.assert_close(width.abs(), torch.full((4,), 0.6), atol=0.1, rtol=0)
    assert abs(np.mean(losses[-50:]) + EVIDENCE) < 0.2
    draws = Predictive(conjugate, guide=conjugate_guide, num_samples=1000, return_sites=["z"])()
    torch.testing.assert_close(draws["z"].detach().mean(0).flatten(), X / 2, atol=0.15, rtol=0)


def test_the_module_form_has_the_same_gradient():
    elbo = SemiImplicitELBO(K, num_mixing=J)
    elbo.loss(*PROGRAMS)
    found = []
    for run in (elbo.loss_and_grads, lambda *programs: elbo(*programs)().backward()):
        pyro.set_rng_seed(3)
        run(*PROGRAMS)
        width = pyro.param("width").unconstrained()
        found.append(width.grad.clone())
        width.grad = None
    torch.testing.assert_close(*found)


def test_loss_is_that_of_a_step_at_the_same_seed():
    elbo = SemiImplicitELBO(1, num_mixing=J, vectorize_particles=True)
    values = []
    for run in (elbo.loss, elbo.loss_and_grads, elbo.differentiable_loss):
        pyro.set_rng_seed(3)
        values.append(torch.as_tensor(run(*PROGRAMS)).item())
    assert values[0] == pytest.approx(values[1]) == pytest.approx(values[2])


def test_score_gradient_has_the_pathwise_mean():
    """The same expectation by the other estimator, in units of its standard error."""
    param("loc", torch.zeros(4))
    found = {}
    for reparam in ("pathwise", "score"):
        elbo = SemiImplicitELBO(100, num_mixing=2, reparam=reparam, vectorize_particles=True)
        steps = []
        for _ in range(100):
            elbo.loss_and_grads(*PROGRAMS)
            steps.append(torch.cat([grad for _, grad in sorted(gradients().items())]))
            for _, value in pyro.get_param_store().named_parameters():
                value.grad = None
        found[reparam] = torch.stack(steps).mean(0), torch.stack(steps).std(0) / 10
    (mean, error), (other, other_error) = found.values()
    total = torch.hypot(error, other_error)
    assert (total < 0.1).all(), "uninformative"
    assert ((mean - other).abs() < 5 * total).all()


# --- bad input -----------------------------------------------------------------------------------


def without_noise():
    with plate("data", 4):
        sample("z", dist.Normal(0.0, 1.0))


def point_masses():
    with plate("data", 4):
        sample("z", dist.Delta(noise()))


def implicit():
    with plate("data", 4):
        sample("z", Implicit(noise()))


def marked_latents():
    with plate("data", 4):
        sample("z", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})


def two_scales():
    with plate("data", 4):
        e = noise()
        with poutine.scale(scale=0.5):
            sample("z", dist.Normal(e, 1.0))
        sample("factor", dist.Normal(e, 1.0), obs=torch.zeros(4), infer={"is_auxiliary": True})


def scale_within_a_mixture():
    e = noise()
    with plate("data", 4), poutine.scale(scale=torch.arange(1.0, 5.0)):
        sample("z", dist.Normal(e, 1.0))


class OwnMessenger(AutoNormalMessenger):
    """It draws its noise while it runs the model, which so becomes a site of that."""

    def get_posterior(self, name, prior):
        return prior if name == "noise" else dist.Normal(noise(), 1.0)


@pytest.mark.parametrize(
    ("guide", "error", "match"),
    [
        (without_noise, ValueError, "needs a guide with noise.*is_auxiliary.*Trace_ELBO"),
        (AutoDiagonalNormal(conjugate), ValueError, "'z' is a point mass.*some width"),
        (point_masses, ValueError, "'z' is a point mass.*ImplicitELBO"),
        (implicit, NotImplementedError, "no density"),
        (marked_latents, ValueError, "'z' is marked auxiliary, but the model has it"),
        (two_scales, ValueError, "'z' and 'factor' differ in scale"),
        (scale_within_a_mixture, ValueError, r"'z' has shape \(4,\).*within one mixture"),
        (OwnMessenger(conjugate), ValueError, "'noise' is marked auxiliary, but the model"),
    ],
)
@pytest.mark.filterwarnings("ignore:Found auxiliary vars in the model")
def test_guides_that_are_no_mixtures_are_refused(guide, error, match):
    with pytest.raises(error, match=f"(?s){match}"):
        SemiImplicitELBO(2, num_mixing=2).loss_and_grads(conjugate, guide)
    assert all(value.grad is None for _, value in pyro.get_param_store().named_parameters())


def test_subsampling_within_a_mixture_is_refused():
    def model():
        with plate("data", 4, subsample_size=2) as rows:
            z = sample("z", dist.Normal(0.0, 1.0))
            sample("x", dist.Normal(z, 1.0), obs=X[rows])

    def guide():
        e = noise()
        with plate("data", 4, subsample_size=2):
            sample("z", dist.Normal(e, 1.0))

    elbo = SemiImplicitELBO(2, num_mixing=2)
    with pytest.raises(ValueError, match=r"'data' is subsampled \(2 of 4\).*'noise' lies outside"):
        elbo.loss(model, guide)


def test_sequential_plates_are_refused():
    def model():
        for i in plate("data", 2):
            sample(f"z_{i}", dist.Normal(0.0, 1.0))

    def guide():
        for i in plate("data", 2):
            sample(f"z_{i}", dist.Normal(noise(f"noise_{i}"), 1.0))

    with pytest.raises(NotImplementedError, match=r"sequential plates.*data.*vectorised"):
        SemiImplicitELBO(2, num_mixing=2).loss(model, guide)


def test_a_nan_names_its_site():
    def model():
        with plate("data", 4):
            z = sample("z", dist.Normal(0.0, 1.0))
            sample("x", dist.Normal(z, 1.0), obs=X * math.nan)

    elbo = SemiImplicitELBO(2, num_mixing=2)
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="site 'x' is NaN"):
        elbo.loss_and_grads(model, conjugate_guide)


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: SemiImplicitELBO(0, num_mixing=3), ValueError, "num_particles >= 1, got 0"),
        (lambda: SemiImplicitELBO(3, num_mixing=0), ValueError, "num_mixing >= 1, got 0"),
        (lambda: SemiImplicitELBO(3, num_mixing=2.0), TypeError, r"num_mixing.*2\.0"),
        (lambda: SemiImplicitELBO(3, num_mixing=2, reparam="stl"), ValueError, "reparam="),
    ],
)
def test_options_are_checked(build, error, match):
    with pytest.raises(error, match=match):
        build()
