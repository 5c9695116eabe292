"""Discrete estimators under torch.func, and compiled."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from pyro_gradest.estimators import (
    IMLE,
    SIMPLE,
    AdaptiveIMLE,
    Noise,
    StraightThrough,
    assignment,
    spanning_tree,
    top_k,
)
from tests.conftest import ROOT

THETA = torch.tensor(np.random.default_rng(0).normal(size=(4, 3, 3)))
COSTS = torch.tensor([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0], [2.0, 3.0, 1.0]], dtype=torch.float64)
WEIGHTS = torch.tensor(np.random.default_rng(1).normal(size=(3, 3)))
ESTIMATORS = [
    (IMLE, assignment()),
    (IMLE, top_k(2)),
    (StraightThrough, assignment()),
    (StraightThrough, spanning_tree()),
]
IDS = ["imle-host", "imle", "straight-through-host", "straight-through-trees"]


class Given(Noise):
    """Noise that depends on the values of theta alone, so that mapped and looped draws agree."""

    def sample_like(self, theta, *, generator=None):
        return 3 * torch.sin(1000 * theta)


@pytest.mark.parametrize(("estimator", "solver"), ESTIMATORS, ids=IDS)
def test_vmap_of_grad_is_the_loop(estimator, solver):
    estimator = estimator(noise=Given())

    def loss(theta):
        return ((estimator.sample(theta, solver) @ WEIGHTS) ** 2).sum()

    looped = torch.stack([torch.func.grad(loss)(theta) for theta in THETA])
    mapped = torch.func.vmap(torch.func.grad(loss))(THETA)

    leaf = THETA.clone().requires_grad_()
    (backward,) = torch.autograd.grad(sum(loss(theta) for theta in leaf), leaf)
    assert looped.abs().max() > 0
    torch.testing.assert_close(mapped, looped)
    torch.testing.assert_close(backward, looped)


def test_counts_add_up_under_vmap():
    estimator = AdaptiveIMLE(initial_step=1.0, noise=Given())
    state, solver = estimator.init(THETA), top_k(1)

    def loss(theta, counts):
        z = estimator.sample(theta, solver, state=state, counts=counts)
        return (z * WEIGHTS).sum()

    def counts_of(theta):
        return torch.func.grad(loss, argnums=1)(theta, torch.zeros(2))

    whole = counts_of(THETA)
    assert whole[0] > 0
    assert whole[1] == 12
    torch.testing.assert_close(torch.func.vmap(counts_of)(THETA).sum(dim=0), whole)


# In a process of its own: the run-time type check of the tests is not for torch to trace.
COMPILED = """
import torch
from pyro_gradest.estimators import *

theta = torch.randn(4, 3, 3)

def compare(estimator, solver, fullgraph):
    def loss(theta):
        return (estimator.sample(theta, solver) @ torch.eye(3).cumsum(0)).square().sum()

    gradients = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=fullgraph)):
        torch.manual_seed(0)
        leaf = theta.clone().requires_grad_()
        gradients += torch.autograd.grad(function(leaf), leaf)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0])

compare(IMLE(), top_k(2), fullgraph=True)
compare(SIMPLE(), top_k(2), fullgraph=True)
compare(ReinMax(), one_hot_argmax(), fullgraph=True)
compare(SIMPLE(), spanning_tree(), fullgraph=True)
compare(IMLE(), assignment(), fullgraph=False)  # breaks the graph to go to the host
"""


def test_compiled_gradients_are_the_eager_ones():
    run = subprocess.run([sys.executable, "-c", COMPILED], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("estimator", "solver"),
    [(IMLE(), top_k(1)), (SIMPLE(), spanning_tree())],
    ids=["imle", "trees"],
)
def test_generator_is_the_only_source_of_noise(estimator, solver):
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return estimator.sample(THETA, solver, num_samples=20, generator=generator)

    before = torch.get_rng_state()
    torch.testing.assert_close(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_adaptive_training():
    """Counts add up over draws in one backward pass."""
    torch.manual_seed(0)
    estimator, solver = AdaptiveIMLE(initial_step=0.01, target=0.3), top_k(1)
    theta = torch.zeros(3, 3, requires_grad=True)
    state, history = estimator.init(theta), []
    for _ in range(500):
        counts = torch.zeros(2, requires_grad=True)
        z = estimator.sample(theta, solver, state=state, counts=counts, num_samples=5)
        gradient, counts = torch.autograd.grad((z * COSTS).sum() / 5, (theta, counts))
        assert counts[1] == 15  # 5 draws of 3 data
        state = estimator.update(state, counts)
        history.append(float(counts[0]) / 15)
        theta.data -= 0.1 * gradient

    assert abs(np.mean(history[-200:]) - estimator.target) < 0.1
    assert state.relative_step > 0.02
    assert torch.equal(theta.argmax(dim=-1), COSTS.argmin(dim=-1))
