"""NVIL inside of SVI: its baselines are trained, remembered, and saved with the parameters."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI

from pyro_gradest import NVIL

X = torch.tensor([-0.5, 0.2, 2.9, 3.3])


def model(x):
    with pyro.plate("data", len(x), subsample_size=3) as rows:
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(3 * z, 1.0), obs=x[rows])


def guide(x):
    slope = pyro.param("slope", torch.tensor(0.1))
    with pyro.plate("data", len(x), subsample_size=3) as rows:
        pyro.sample("z", dist.Bernoulli(logits=slope * x[rows] + 0.1))


class Level(torch.nn.Module):
    """One number for each row of the same mini-batch."""

    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(1, 1)

    def forward(self, x):
        with pyro.plate("data", len(x), subsample_size=3) as rows:
            self.rows = rows
            return self.line(x[rows, None])[..., 0]


def steps(svi, number):
    return [svi.step(X) for _ in range(number)]


def nvil_svi(baseline=None, **options):
    options = {"vectorize_particles": True, "max_plate_nesting": 1} | options
    loss = NVIL(3, baseline=baseline, **options)
    return SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=loss)


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"vectorize_particles": False}])
def test_moments_and_baseline_move_with_each_step(options):
    baseline = Level()
    before = copy.deepcopy(baseline.state_dict())
    steps(nvil_svi(baseline, **options), 3)

    store = pyro.get_param_store()
    assert store["nvil.num_updates"] == 3
    assert store["nvil.mean"] != 0 and store["nvil.variance"] > 0
    assert all((before[key] != value).all() for key, value in baseline.state_dict().items())
    assert pyro.param("slope") != 0.1


def test_baseline_learns_what_the_bound_is():
    svi = nvil_svi(Level())
    steps(svi, 300)
    store = pyro.get_param_store()
    explained = store["nvil.variance"].item()
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    steps(nvil_svi(), 300)
    assert explained < store["nvil.variance"].item()


def test_baseline_sees_the_mini_batch_of_the_step():
    seen = []

    def model_that_remembers(x):
        with pyro.plate("data", len(x), subsample_size=3) as rows:
            seen.append(rows)
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(3 * z, 1.0), obs=x[rows])

    baseline = Level()
    svi = nvil_svi(baseline)
    svi.model = model_that_remembers
    for _ in range(3):
        svi.step(X)
        assert torch.equal(seen[-1], baseline.rows)


def test_evaluating_the_loss_changes_nothing():
    svi = nvil_svi()
    steps(svi, 2)
    svi.evaluate_loss(X)
    assert pyro.get_param_store()["nvil.num_updates"] == 2


def test_a_checkpoint_goes_on_bit_for_bit():
    baseline = Level()
    svi = nvil_svi(baseline)
    steps(svi, 3)
    saved = copy.deepcopy((pyro.get_param_store().get_state(), svi.optim.get_state()))
    noise = torch.get_rng_state()
    expected = steps(svi, 3), pyro.param("slope").item()

    pyro.clear_param_store()
    baseline = Level()
    svi = nvil_svi(baseline)
    pyro.get_param_store().set_state(saved[0])
    svi.optim.set_state(saved[1])
    pyro.module("nvil.baseline", baseline, update_module_params=True)
    torch.set_rng_state(noise)
    assert (steps(svi, 3), pyro.param("slope").item()) == expected
