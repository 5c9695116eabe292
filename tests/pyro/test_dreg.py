"""Doubly reparameterised gradients of Pyro's own guides, and what a step leaves behind."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import ExpTransform
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.infer.autoguide.initialization import init_to_value

from pyro_gradest import IWAE, ReweightedWakeSleep


def model():
    z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z.log(), 1.0), obs=torch.tensor(1.0))


MEAN, DEVIATION = 0.5, math.sqrt(0.5)
"""Of the exact posterior of log z."""


def transformed_guide():
    loc, scale = (
        pyro.param(name, torch.tensor(value)) for name, value in (("loc", MEAN), ("s", DEVIATION))
    )
    # The transform remembers the draw that it made a value of, parameters included.
    pyro.sample("z", dist.TransformedDistribution(dist.Normal(loc, scale), [ExpTransform(1)]))


GUIDES = {
    "AutoNormal": lambda start: AutoNormal(model, init_loc_fn=start, init_scale=DEVIATION),
    "AutoMultivariateNormal": lambda start: AutoMultivariateNormal(model, start, DEVIATION),
    "transformed": lambda start: transformed_guide,
}


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorised", "one-by-one"])
@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("objective", [IWAE, ReweightedWakeSleep])
def test_no_noise_where_the_guide_is_the_posterior(objective, guide, vectorize):
    guide = GUIDES[guide](init_to_value(values={"z": torch.tensor(math.exp(MEAN))}))
    loss = objective(4, reparam="dreg", vectorize_particles=vectorize, max_plate_nesting=0)

    loss.loss_and_grads(model, guide)

    gradients = [leaf.grad for _, leaf in pyro.get_param_store().named_parameters()]
    assert len(gradients) >= 2
    assert all(gradient.abs().max() < 1e-10 for gradient in gradients)


def test_point_masses_are_parameters_and_not_draws():
    with pytest.raises(ValueError, match=r'reparam="dreg".*has none'):
        IWAE(2, reparam="dreg").loss_and_grads(model, AutoDelta(model))


def test_loss_is_the_same_with_and_without_gradient():
    loss = IWAE(3, reparam="dreg", chunk_size=2)
    values = []
    for evaluate in (loss.loss, loss.loss_and_grads, lambda *args: loss(*args)().item()):
        pyro.set_rng_seed(0)
        values.append(evaluate(model, transformed_guide))
    assert values == pytest.approx([values[0]] * 3, abs=1e-12)


def test_memory_of_chunks_does_not_hold_their_draws():
    """What is left of a chunk is its gradient in the parameters, not one in each draw."""
    from pyro_gradest.infer._graph import graph_leaves

    loss = IWAE(6, reparam="dreg", chunk_size=2).differentiable_loss(model, transformed_guide)
    assert len(graph_leaves(loss)) == 2
