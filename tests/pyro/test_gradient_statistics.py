"""Measuring gradients leaves nothing behind, and can be repeated."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO

from pyro_gradest import IMLE, IWAE, NVIL, VIMCO, compare_estimators, gradient_statistics, imle


def model():
    z = pyro.sample("z", dist.Bernoulli(0.3))
    pyro.sample("x", dist.Normal(3.0 * z, 1.0), obs=torch.tensor(2.0))


def guide():
    pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.1))))


def test_nothing_is_left_behind():
    loss = NVIL(2)
    for _ in range(3):
        loss.loss_and_grads(model, guide)
    store = pyro.get_param_store()
    leaf = dict(store.named_parameters())["logit"]
    before = {name: value.detach().clone() for name, value in store.items()}
    gradient, noise = leaf.grad.clone(), torch.get_rng_state()

    first, second = (
        gradient_statistics(loss, model, guide, num_draws=20, reference=None) for _ in range(2)
    )

    np.testing.assert_array_equal(first.mean["logit"], second.mean["logit"])
    assert torch.equal(noise, torch.get_rng_state())
    assert torch.equal(leaf.grad, gradient)
    assert {name: value.item() for name, value in store.items()} == {
        name: value.item() for name, value in before.items()
    }


def test_the_exact_gradient_is_that_without_imle():
    options = {"num_draws": 2, "reference": "enumeration"}
    plain, carried = (
        gradient_statistics(IWAE(2), model, program, **options)
        for program in (guide, imle(guide, {"z": IMLE()}))
    )
    exact = [figures.mean["logit"] - figures.bias["logit"] for figures in (plain, carried)]
    np.testing.assert_allclose(*exact, rtol=1e-5)


def test_the_parameters_that_are_not_looked_at_stay_the_same_tensors():
    """An optimizer knows them by that."""

    def two_parameters():
        logit = pyro.param("logit", torch.tensor(0.1)) + pyro.param("shift", torch.tensor(0.2))
        pyro.sample("z", dist.Bernoulli(logits=logit))

    two_parameters()
    before = dict(pyro.get_param_store().named_parameters())
    measured = gradient_statistics(
        VIMCO(2), model, two_parameters, num_draws=5, only=lambda name: name == "shift"
    )
    assert list(measured.mean) == ["shift"]
    after = dict(pyro.get_param_store().named_parameters())
    assert all(after[name] is leaf for name, leaf in before.items())


def test_a_loss_that_keeps_its_state_starts_and_ends_without():
    gradient_statistics(NVIL(2), model, guide, num_draws=5)
    assert set(pyro.get_param_store().keys()) == {"logit"}


def test_a_guide_without_parameters_is_refused():
    with pytest.raises(ValueError, match="No parameter"):
        gradient_statistics(
            VIMCO(2), model, lambda: pyro.sample("z", dist.Bernoulli(0.4)), num_draws=5
        )


def test_functions_of_the_number_of_particles():
    comparison = compare_estimators(
        {"VIMCO": VIMCO}, model, guide, num_particles=(2, 3), num_draws=5
    )
    assert [one.name for one in comparison.statistics] == ["VIMCO, K=2", "VIMCO, K=3"]
    assert [one.family for one in comparison.statistics] == ["VIMCO"] * 2
    with pytest.raises(ValueError, match="at least one loss"):
        compare_estimators({}, model, guide)


def test_a_model_that_only_the_host_can_sum_over():
    def summed_model():
        z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(2.0 * z, 1.0))

    def guide_of_y():
        pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 1.0))

    loss = TraceEnum_ELBO(max_plate_nesting=0)
    measured = gradient_statistics(loss, summed_model, guide_of_y, num_draws=5)
    assert measured.target.words == "ELBO" and measured.reference is None
    assert measured.variance["loc"] > 0
