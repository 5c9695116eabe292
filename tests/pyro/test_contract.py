"""What a loss owes to Pyro: its three methods, the module form, autoguides, and clear refusals."""

import math
import warnings
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.testing.rejection_gamma import ShapeAugmentedGamma
from pyro.infer import SVI, Predictive
from pyro.infer.autoguide import (
    AutoDelta,
    AutoNormal,
)
from pyro.nn import PyroModule, PyroParam, PyroSample

from pyro_gradest import IWAE, OVIS, VIMCO, ReweightedWakeSleep, importance_samples

X = torch.tensor([0.9, -0.4, 0.1, 1.7])

OBJECTIVES = {
    "IWAE": lambda **options: IWAE(4, **options),
    "VIMCO": lambda **options: VIMCO(4, **options),
    "OVIS": lambda **options: OVIS(4, **options),
    "OVIS-MC": lambda **options: OVIS(4, num_auxiliary=2, **options),
    "wake-sleep": lambda **options: ReweightedWakeSleep(
        4, insomnia=0.5, dream_inputs=lambda dream: (dream["x"],), **options
    ),
}
each_objective = pytest.mark.parametrize("build", OBJECTIVES.values(), ids=OBJECTIVES)


def model(x=X):
    weight = pyro.param("weight", lambda: torch.randn(()))  # drawn when first met
    with pyro.plate("data", 4, subsample_size=3) as rows:
        z = pyro.sample("z", dist.Bernoulli(0.3))
        y = pyro.sample("y", dist.Normal(weight * z, 1.0))
        pyro.sample("x", dist.Normal(y, 0.7), obs=X[rows])


def guide(x=None):
    logits = pyro.param("logits", lambda: torch.randn(4))
    with pyro.plate("data", 4, subsample_size=3) as rows:
        y = pyro.sample("y", dist.Normal(X[rows], 1.0))
        pyro.sample("z", dist.Bernoulli(logits=logits[rows] + y))


def gradients() -> dict[str, torch.Tensor]:
    store = pyro.get_param_store()
    return {name: store[name].unconstrained().grad.clone() for name in store}


def value_and_gradients(
    elbo, method: str, model: Callable = model, guide: Callable = guide
) -> tuple[float, dict[str, torch.Tensor]]:
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    poutine.block(guide)(), poutine.block(model)()  # creates the parameters
    loss = getattr(elbo, method)(model, guide)
    if method == "differentiable_loss":
        loss.backward()
        loss = loss.item()
    return loss, gradients() if method != "loss" else {}


@each_objective
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"vectorize_particles": True},
        {"vectorize_particles": True, "max_plate_nesting": 1},
        {"chunk_size": 3},
        {"vectorize_particles": True, "chunk_size": 3, "num_replicates": 2},
    ],
    ids=["loop", "guessed-nesting", "given-nesting", "chunks", "vectorized-chunks"],
)
def test_the_three_losses_agree_at_one_seed(build, options):
    value, _ = value_and_gradients(build(**options), "loss")
    loss, actual = value_and_gradients(build(**options), "loss_and_grads")
    differentiable, expected = value_and_gradients(build(**options), "differentiable_loss")
    assert value == loss == differentiable
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=0)


@each_objective
@pytest.mark.parametrize("chunk_size", [1, 3, 4, 100])
def test_chunks_have_the_gradient_of_the_whole(build, chunk_size):
    whole, expected = value_and_gradients(build(), "loss_and_grads")
    loss, actual = value_and_gradients(build(chunk_size=chunk_size), "loss_and_grads")
    assert loss == pytest.approx(whole, rel=1e-12)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}], ids=["whole", "chunks"])
def test_the_first_step_may_create_the_parameters(options):
    # Their initial values are drawn from the same generator as the latents.
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.1}), loss=VIMCO(4, **options))
    assert math.isfinite(svi.step())
    assert set(pyro.get_param_store()) == {"weight", "logits"}


def test_auxiliary_draws_leave_the_bound_alone():
    with_draws, _ = value_and_gradients(OVIS(4, num_auxiliary=3), "loss_and_grads")
    without, _ = value_and_gradients(OVIS(4), "loss_and_grads")
    assert with_draws == without


@pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vectorized"])
def test_all_particles_see_one_subsample(vectorize):
    seen = []

    def model():
        with pyro.plate("data", 100, subsample_size=2) as rows:
            seen.append(rows)
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.ones(2))

    elbo = IWAE(5, vectorize_particles=vectorize, max_plate_nesting=1)
    elbo.loss(model, lambda: None)
    first = list(seen)
    assert all(torch.equal(rows, first[0]) for rows in first)
    elbo.loss(model, lambda: None)
    assert not torch.equal(seen[-1], first[0])


def test_a_subsampled_plate_that_is_not_common_is_refused():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4, subsample_size=2) as rows:
            pyro.sample("x", dist.Normal(z, 1.0), obs=X[rows])

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.2)), 1.0))

    with pytest.raises(ValueError, match=r"'data' is subsampled \(2 of 4\) but .* 'z'"):
        IWAE(2).loss(model, guide)
    assert math.isfinite(IWAE(1, num_replicates=2).loss(model, guide))


# --- the module form and autoguides --------------------------------------------------------------


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = PyroParam(torch.tensor(0.1))
        self.shift = PyroSample(dist.Normal(0.0, 1.0))

    def forward(self, x):
        shift = self.shift
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.loc + shift, 1.0), obs=x)


@pytest.mark.parametrize("objective", [IWAE, VIMCO, OVIS, ReweightedWakeSleep])
def test_module_form_with_a_torch_optimiser(objective):
    pyro.settings.set(module_local_params=True)
    model = Regression()
    elbo = objective(4, vectorize_particles=True)(model, AutoNormal(model))
    elbo(X)
    optimizer = torch.optim.Adam(elbo.parameters(), lr=0.05)
    before = [parameter.detach().clone() for parameter in elbo.parameters()]
    for _ in range(5):
        optimizer.zero_grad()
        elbo(X).backward()
        optimizer.step()
    assert len(before) == 3
    assert all(not torch.equal(a, b) for a, b in zip(before, elbo.parameters(), strict=True))


def plated_normal():
    with pyro.plate("data", 4):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=X)


def test_point_estimates_follow_the_log_joint():
    guide = AutoDelta(plated_normal)
    IWAE(3, reparam="score").loss_and_grads(plated_normal, guide)
    at = guide.median()["z"]
    (parameter,) = guide.parameters()
    torch.testing.assert_close(parameter.grad, at - (X - at))


# --- posterior draws -----------------------------------------------------------------------------


@pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vectorized"])
def test_importance_samples_have_the_posterior_and_fit_predictive(vectorize):
    def model(x=None):
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 2, dim=-2), pyro.plate("data", 4, dim=-1):
            pyro.sample("x", dist.Normal(g, 1.0), obs=x)

    def guide(x):
        pyro.sample("g", dist.Normal(0.0, 1.0))

    x = X.expand(2, 4)
    draws = importance_samples(
        model, guide, x, num_samples=700, num_particles=500, vectorize_particles=vectorize
    )
    assert draws.samples["g"].shape == (700,)
    assert 1 <= draws.effective_sample_size <= 500
    standard_error = 1 / (3 * draws.effective_sample_size.sqrt())
    assert abs(draws.samples["g"].mean() - x.sum() / 9) < 4.5 * standard_error
    for parallel in (True, False):
        predictive = Predictive(model, draws.samples, parallel=parallel)
        assert predictive()["x"].shape == (700, 2, 4)


@pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vectorized"])
def test_data_are_resampled_by_weights_of_their_own(vectorize):
    def model():
        with pyro.plate("data", 4, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([1, 1, 2]).to_event(2))
            pyro.sample("x", dist.Normal(z.sum((-1, -2)), 0.5), obs=X[:, None])

    def guide():
        with pyro.plate("data", 4, dim=-2):
            pyro.sample("z", dist.Normal(0.0, 1.0).expand([1, 1, 2]).to_event(2))

    draws = importance_samples(
        model, guide, num_samples=2000, num_particles=1000, vectorize_particles=vectorize
    )
    assert draws.samples["z"].shape == (2000, 4, 1, 1, 2)
    assert draws.effective_sample_size.shape == draws.log_evidence.shape == (4,)
    mean = draws.samples["z"].sum((-1, -2)).mean(0).squeeze(-1)
    # z1 + z2 given x is Normal(x 2 / 2.25, 0.5 / 2.25 * ...): a standard deviation below 0.5.
    torch.testing.assert_close(mean, X * 2 / 2.25, rtol=0, atol=0.2)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: VIMCO(1), ValueError, r"num_particles >= 2, got 1.*IWAE\(1\)"),
        (lambda: OVIS(1), ValueError, r"num_particles >= 2, got 1.*IWAE\(1\)"),
        (lambda: IWAE(0), ValueError, "num_particles >= 1, got 0"),
        (lambda: IWAE(2.0), TypeError, r"(?s)num_particles.*2\.0"),
        (lambda: IWAE(2, chunk_size=-1), ValueError, "chunk_size >= 1, got -1"),
        (lambda: IWAE(2, num_replicates=True), TypeError, "num_replicates"),
        (lambda: IWAE(2, reparam="dreg"), ValueError, 'reparam="pathwise" or "score"'),
        (lambda: IWAE(2, nonsense=1), TypeError, "nonsense"),
        (lambda: VIMCO(2, leave_one_out="harmonic"), ValueError, "harmonic"),
        (lambda: OVIS(2, gamma=1.5), ValueError, "0 <= gamma <= 1, got 1.5"),
        (lambda: OVIS(2, gamma=0.5, num_auxiliary=1), ValueError, "Set one of them to 0"),
        (lambda: ReweightedWakeSleep(2, insomnia=-1), ValueError, "insomnia"),
    ],
)
def test_options_are_checked_when_the_objective_is_made(build, error, match):
    with pytest.raises(error, match=match):
        build()


def programs(
    latent: Callable = lambda: dist.Normal(pyro.param("loc", torch.tensor(0.3)), 1.0),
    likelihood: Callable = lambda z: dist.Normal(z, 1.0),
    guide_name: str = "z",
    infer: dict | None = None,
) -> tuple[Callable, Callable]:
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0), infer=infer)
        with pyro.plate("data", 4):
            pyro.sample("x", likelihood(z), obs=X)

    def guide():
        pyro.sample(guide_name, latent(), infer=infer)

    return model, guide


BAD_PROGRAMS = {
    "guide-site-not-in-the-model": (programs(guide_name="w"), ValueError, "Model site 'z'"),
    "enumerated": (programs(infer={"enumerate": "parallel"}), ValueError, "'z'.*enumeration"),
    "rejection": (
        programs(
            lambda: ShapeAugmentedGamma(pyro.param("loc", torch.tensor(0.3)), torch.tensor(1.0))
        ),
        NotImplementedError,
        "'z'.*rejection",
    ),
    "nan": (
        programs(likelihood=lambda z: dist.Normal(z, 1.0).mask(torch.tensor(True)).expand([4])),
        ValueError,
        "site 'x' is NaN",
    ),
    "shape": (
        programs(likelihood=lambda z: dist.Normal(z, 1.0).expand([3, 4])),
        ValueError,
        "'?\"?x'?\"?.*shape",
    ),
}


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}], ids=["whole", "chunks"])
@pytest.mark.parametrize("name", BAD_PROGRAMS)
def test_bad_programs_are_refused_and_nothing_is_lost(name, options, monkeypatch):
    (model, guide), error, match = BAD_PROGRAMS[name]
    good = programs()
    optimizer = pyro.optim.Adam({"lr": 0.1})
    svi = SVI(*good, optimizer, loss=VIMCO(3, **options))
    svi.step()
    loc = pyro.param("loc").detach().clone()
    gradient = pyro.get_param_store()["loc"].unconstrained().grad
    state = {str(k): str(v) for k, v in optimizer.get_state().items()}

    if name == "nan":
        monkeypatch.setattr("tests.pyro.test_contract.X", X * math.nan)
    svi.model, svi.guide = model, guide
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the host's own warnings of the same
        with pytest.raises(error, match=match), pyro.validation_enabled(name == "shape"):
            svi.step()
    torch.testing.assert_close(pyro.param("loc"), loc, rtol=0, atol=0)
    assert {str(k): str(v) for k, v in optimizer.get_state().items()} == state
    now = pyro.get_param_store()["loc"].unconstrained().grad
    assert now is gradient or torch.equal(now, gradient)


def test_data_without_weight_give_no_gradient_and_a_warning():
    def model():
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.factor("impossible", torch.tensor([0.0, 0.0, -math.inf, 0.0]) + 0.1 * z)

    def guide():
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("logits", torch.full((4,), 0.4))))

    with pytest.warns(UserWarning, match="zero weight"):
        assert OVIS(3).loss_and_grads(model, guide) == math.inf
    gradient = pyro.param("logits").grad
    assert gradient.isfinite().all()
    assert gradient[2] == 0


def test_a_common_scale_multiplies_loss_and_gradient():
    loss, expected = value_and_gradients(VIMCO(3), "loss_and_grads")
    scaled = [poutine.scale(fn, scale=0.1) for fn in (model, guide)]
    actual_loss, actual = value_and_gradients(VIMCO(3), "loss_and_grads", *scaled)
    assert actual_loss == pytest.approx(0.1 * loss, rel=1e-12)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], 0.1 * gradient, rtol=1e-10, atol=1e-12)


def test_more_random_numbers_at_each_run_are_refused_with_chunks():
    runs = []

    def guide_that_changes():
        runs.append(torch.rand(len(runs)))
        guide()

    with pytest.raises(RuntimeError, match="drew a different number"):
        IWAE(4, chunk_size=2).loss_and_grads(model, guide_that_changes)
