"""Distributions over subsets and trees at the sites of Pyro's models and guides."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import plate, sample
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.optim import Adam
from torch.distributions import kl_divergence

from pyro_gradest import VIMCO, KSubset, PlackettLuce, PlackettLuceSubset, SpanningTree
from tests.oracles import combinatorial as oracle

WEIGHTS = torch.tensor([1.0, -2.0, 0.5, 3.0])
X = torch.tensor([3.7, -0.9, 1.2])
PRIOR = torch.tensor([0.3, -0.2, 0.0, 0.5])


def model(site=KSubset):
    with plate("data", 3):
        z = sample("z", site(PRIOR, 2))
        sample("x", dist.Normal((z * WEIGHTS).sum(-1), 1.0), obs=X)


def guide(site=KSubset):
    logits = pyro.param("logits", lambda: torch.zeros(3, 4))
    with plate("data", 3):
        sample("z", site(logits, 2))


def log_evidence(table):
    """By summing over all values, of each datum."""
    return sum(
        math.log(
            sum(
                p * math.exp(-0.5 * (x - z @ WEIGHTS.numpy()) ** 2) / math.sqrt(2 * math.pi)
                for z, p in table
            )
        )
        for x in X.tolist()
    )


@pytest.mark.parametrize(
    ("site", "table"),
    [(KSubset, oracle.k_subset), (PlackettLuceSubset, oracle.plackett_luce_subset)],
)
def test_enumeration_is_the_evidence(site, table):
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(
        config_enumerate(lambda: model(site)), lambda: None
    )

    np.testing.assert_allclose(-loss, log_evidence(table(PRIOR.numpy(), 2)), rtol=1e-12)


def test_divergence_is_the_enumerated_bound_of_a_prior():
    def prior():
        with plate("data", 3):
            sample("z", KSubset(PRIOR, 2))

    exact = TraceEnum_ELBO(max_plate_nesting=1).loss(prior, config_enumerate(guide))
    divergence = kl_divergence(KSubset(torch.zeros(3, 4), 2), KSubset(PRIOR, 2).expand([3]))

    np.testing.assert_allclose(divergence.sum(), exact, rtol=1e-12)


@pytest.mark.parametrize("site", [KSubset, PlackettLuceSubset])
def test_training(site):
    """The exact bound comes most of the way to the evidence."""

    def bound():
        loss = TraceEnum_ELBO(max_plate_nesting=1).loss
        return -loss(lambda: model(site), config_enumerate(lambda: guide(site)))

    oracle_of = {KSubset: oracle.k_subset, PlackettLuceSubset: oracle.plackett_luce_subset}
    evidence, first = log_evidence(oracle_of[site](PRIOR.numpy(), 2)), bound()
    objective = VIMCO(num_particles=4, max_plate_nesting=1, vectorize_particles=True)
    svi = SVI(lambda: model(site), lambda: guide(site), Adam({"lr": 0.1}), objective)
    for _ in range(100):
        svi.step()

    assert first + 0.6 * (evidence - first) < bound() <= evidence + 1e-9


@pytest.mark.parametrize(
    "site",
    [
        PlackettLuce(torch.zeros(3, 4)),
        SpanningTree(torch.zeros(3, 4, 4)),
        PlackettLuceSubset(torch.zeros(3, 4), 2),
    ],
    ids=["ranking", "tree", "subset"],
)
def test_sites_in_plates(site):
    """Log-probabilities and values have the shapes that the host checks."""

    def program():
        with plate("rows", 2, dim=-2), plate("data", 3, dim=-1):
            return sample("z", site)

    assert program().shape == (2, 3, *site.event_shape)
    assert abs(Trace_ELBO().loss(program, program)) < 1e-9


def test_values_outside_of_the_support_are_refused():
    with pytest.raises(ValueError, match=r"within the support \(KHot\(k=2\)\)"):
        KSubset(PRIOR, 2).log_prob(torch.ones(4))
    with pytest.raises(ValueError, match=r"within the support \(SpanningTreeAdjacency\(\)\)"):
        SpanningTree(torch.zeros(3, 3)).log_prob(torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"within the support \(Permutation\(\)\)"):
        PlackettLuce(PRIOR).log_prob(torch.tensor([0, 1, 2, 2]))


def test_normaliser_of_an_expanded_prior_is_shared():
    site = KSubset(PRIOR.requires_grad_(), 2)
    expanded = site.expand([1000])

    assert expanded._log_partition.stride() == (0,)
    (gradient,) = torch.autograd.grad(expanded.log_prob(expanded.sample()).sum(), PRIOR)
    PRIOR.requires_grad_(False)
    assert gradient.abs().max() > 0
