"""DisARM inside of Pyro: the two draws of a pair share all noise but that of Bernoulli sites."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI

from pyro_gradest import DisARM
from tests.conformance.backends import backend_for

X = torch.tensor([-0.5, 0.2, 2.9, 3.3])


def model(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(3 * z + y, 1.0), obs=x)


def guide(x):
    # Its initial value is drawn too, at the first call alone.
    slope = pyro.param("slope", lambda: torch.randn(()))
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Normal(0.3 * x, 0.7))
        pyro.sample("z", dist.Bernoulli(logits=slope * (x - y)))


@pytest.fixture
def runs(monkeypatch):
    """What is traced."""
    from pyro_gradest.infer import _antithetic

    traced, trace_particles = [], _antithetic.trace_particles

    def trace(*arguments):
        result = trace_particles(*arguments)
        traced.append(result[1])
        return result

    monkeypatch.setattr(_antithetic, "trace_particles", trace)
    return traced


@pytest.mark.parametrize("vectorize", [True, False])
def test_a_first_step_is_a_pair_too(runs, vectorize):
    pyro.set_rng_seed(0)
    loss = DisARM(2, vectorize_particles=vectorize, max_plate_nesting=1)
    SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=loss).step(X)
    first, partner = runs[-2:]
    assert torch.equal(first.nodes["y"]["value"], partner.nodes["y"]["value"])
    values, partners = (one.nodes["z"]["value"] for one in (first, partner))
    assert torch.equal(first.nodes["z"]["partner"], partners)
    assert torch.equal(partner.nodes["z"]["partner"], values)
    # A value less likely than the other is never drawn at both.
    rare = values == (first.nodes["z"]["fn"].logits < 0)
    assert (partners != values)[rare].all()


def test_losses_agree_at_one_seed():
    loss = DisARM(2)
    values = []
    for evaluate in (loss.loss, loss.loss_and_grads, loss.differentiable_loss):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        values.append(torch.as_tensor(evaluate(model, guide, X)).item())
    assert values[0] == values[1] == values[2]


def test_refuses_a_guide_that_branches():
    def model():
        if pyro.sample("a", dist.Bernoulli(0.5)):
            pyro.sample("b", dist.Bernoulli(0.5))

    def guide():
        if pyro.sample("a", dist.Bernoulli(0.4)):
            pyro.sample("b", dist.Bernoulli(0.4))

    pyro.set_rng_seed(0)
    with pytest.raises(ValueError, match="'b' is drawn at one of the two"):
        for _ in range(20):
            DisARM(1).loss(model, guide)


def test_looks_for_dependence_while_validation_is_enabled():
    """Which waits for the device; a guide that has been looked at can do without."""

    def model():
        with pyro.plate("data", 20):
            a = pyro.sample("a", dist.Bernoulli(0.5))
            pyro.sample("b", dist.Bernoulli(0.2 + 0.5 * a))

    def guide():
        with pyro.plate("data", 20):
            a = pyro.sample("a", dist.Bernoulli(0.4))
            pyro.sample("b", dist.Bernoulli(0.3 + 0.5 * a))

    def evaluate():
        DisARM(1, max_plate_nesting=1).differentiable_loss(model, guide)

    with pytest.raises(ValueError, match="'b' depend on the draw of another"):
        evaluate()
    with pyro.validation_enabled(False):
        names = backend_for("pyro").operations(evaluate)
    assert "allclose.default" not in names
    assert names.count("_local_scalar_dense.default") == 1  # of the loss, as in any objective
