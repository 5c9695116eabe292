"""What a loss owes to Pyro: its three methods, the module form, autoguides, and clear refusals."""

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import (
    AutoDelta,
    AutoNormal,
)
from pyro.nn import PyroModule, PyroParam, PyroSample

from pyro_gradest import IWAE, OVIS, VIMCO, ReweightedWakeSleep

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
