"""``RLOO(credit="downstream")`` in Pyro: training, branches, and what it refuses."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI

from pyro_gradest import RLOO, VIMCO
from pyro_gradest.estimators import reinforce_leave_one_out_learning_signal
from pyro_gradest.infer._credit import TrackDraws

X = torch.tensor([-0.5, 0.2, 2.9, 3.3])


def model(x=X):
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4, subsample_size=2) as index:
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(3 * z + shift, 1.0), obs=x[index])


def guide(x=X):
    loc = pyro.param("loc", torch.tensor(0.1))
    slope = pyro.param("slope", torch.tensor(0.1))
    shift = pyro.sample("shift", dist.Normal(loc, 0.5))
    with pyro.plate("data", 4, subsample_size=2) as index:
        pyro.sample("z", dist.Bernoulli(logits=slope * (x[index] - shift)))


@pytest.mark.parametrize("vectorize_particles", [True, False])
def test_svi(vectorize_particles):
    """It trains; the loss is that of the whole; and no tensor of the host's tracking is left."""
    loss = RLOO(4, credit="downstream", vectorize_particles=vectorize_particles)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=loss)
    for _ in range(20):
        svi.step()
    assert pyro.param("slope") > 0.3
    assert all(type(value.grad) is torch.Tensor for value in map(pyro.param, ("loc", "slope")))

    values = []
    for objective in (loss, RLOO(4, vectorize_particles=vectorize_particles)):
        pyro.set_rng_seed(0)
        values.append(objective.differentiable_loss(model, guide))
    pyro.set_rng_seed(0)
    values.append(torch.tensor(loss.loss(model, guide)))
    assert type(values[0]) is torch.Tensor
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[0], values[2])


def test_site_with_a_signal_of_its_own():
    """It keeps that, of the whole log-weight; here all is downstream of it."""

    def own_guide(estimator):
        logit = pyro.param("logit", torch.tensor(0.4))
        pyro.sample("z", dist.Bernoulli(logits=logit), infer={"estimator": estimator})

    def own_model(estimator):
        pyro.sample("z", dist.Bernoulli(0.3))

    gradients = []
    for estimator in ("score", reinforce_leave_one_out_learning_signal):
        pyro.set_rng_seed(0)
        loss = RLOO(5, credit="downstream").differentiable_loss(own_model, own_guide, estimator)
        logit = pyro.param("logit").unconstrained()
        gradients.append(torch.autograd.grad(loss, logit)[0])
    assert gradients[0] != 0
    torch.testing.assert_close(*gradients)


def by_copy(z):
    value = torch.zeros(2)
    value.copy_(z)


def by_data(z):
    torch.zeros(2).data = z


HIDING = {
    "if": lambda z: 1 if z[0] == 1 else 0,
    "item": lambda z: z[0].item(),
    "float": lambda z: float(z[0]),
    "index": lambda z: ["no", "yes"][z[0].long()],
    "range": lambda z: range(z[0].long()),
    "slice": lambda z: torch.ones(2)[: z[0].long()],
    "tolist": lambda z: z.tolist(),
    "numpy": lambda z: z.numpy(),
    "array": lambda z: np.asarray(z),
    "in": lambda z: 1.0 in z,
    "equal": lambda z: torch.equal(z, z),
    "tensor": lambda z: torch.as_tensor([z[0], z[1]]),
    "full": lambda z: torch.full((2,), z[0]),
    "setitem": lambda z: torch.zeros(3).__setitem__(slice(0, 2), z),
    "copy": by_copy,
    "data": by_data,
    "out": lambda z: torch.mul(z, 1.0, out=torch.zeros(2)),
    "iadd": lambda z: torch.zeros(2).add_(z),
    "mask": lambda z: z[z > 0],
    "nonzero": lambda z: z.nonzero(),
    "where": lambda z: torch.where(z > 0),
    "unique": lambda z: torch.unique(z),
    "unique method": lambda z: z.unique(),
    "unique consecutive": lambda z: torch.unique_consecutive(z),
    "vmap": torch.func.vmap(lambda one: 2 * one),
    "grad": torch.func.grad(lambda z: (z * z).sum()),
}


def hidden_by(function):
    tracker = TrackDraws()
    with tracker:
        function(pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1)))
        node = poutine.trace(lambda: pyro.sample("w", dist.Normal(0.0, 1.0))).get_trace().nodes["w"]
    return node["follows"]


@pytest.mark.parametrize("name", HIDING)
def test_sees_where_provenance_ends(name):
    assert hidden_by(HIDING[name]) == {"z"}


SEEN = {
    "unpacked": lambda z: [2 * one for one in z],
    "shape": lambda z: z.new_zeros(len(z), z.shape[0], z.dim(), z.numel(), z.size(0)),
    "in place": lambda z: (2 * z).add_(z),
    "indexed": lambda z: z[z.long()[:1].clamp(0, 1)] + z[..., None].expand(2, 3).sum(),
    "maximum": lambda z: torch.max(z, dim=0).values + torch.where(z > 0, z, 0.0).softmax(0),
    "network": lambda z: torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())(z),
    "checked": lambda z: dist.Normal(z, z.exp(), validate_args=True).log_prob(z),
    "transformed": lambda z: dist.LogNormal(z, 1.0, validate_args=True).rsample(),
}


@pytest.mark.parametrize("name", SEEN)
def test_what_provenance_follows_hides_nothing(name):
    """What the host checks is its own affair: no value of it depends on that."""
    assert hidden_by(SEEN[name]) == set()


def test_refuses_branches():
    def branching_guide():
        z = pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.4))))
        if z == 1:
            pyro.sample("w", dist.Normal(0.0, 1.0))

    def branching_model():
        if pyro.sample("z", dist.Bernoulli(0.5)) == 1:
            pyro.sample("w", dist.Normal(0.0, 1.0))

    pyro.set_rng_seed(0)
    with pytest.raises(ValueError, match=r"'w' is there at some particles only.*credit=\"whole\""):
        RLOO(20, credit="downstream").loss_and_grads(branching_model, branching_guide)
    RLOO(20).loss_and_grads(branching_model, branching_guide)


def test_refuses_a_factor_in_the_guide():
    def guide_with_factor():
        pyro.factor("f", pyro.param("f0", torch.tensor(0.4)), has_rsample=False)

    with pytest.raises(ValueError, match=r"'f' is a factor.*credit=\"whole\""):
        RLOO(2, credit="downstream").loss_and_grads(lambda: None, guide_with_factor)


def test_only_rloo_has_it():
    with pytest.raises(TypeError, match="credit"):
        VIMCO(2, credit="downstream")
