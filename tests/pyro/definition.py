"""What an objective should return, from its definition and the host's log-probabilities.

A ``Case`` states which plates it takes to be common. The definition then runs model and guide by
hand, from the same seed as the objective, so that the draws are the same; the bound, the weights
and the learning signal are NumPy loops (the oracle).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.guide import GuideMessenger
from torch import Tensor

from pyro_gradest import VIMCO
from tests.oracles import multisample as oracle


class Case(NamedTuple):
    """A model and a guide without arguments, and what is known about them."""

    model: Callable[[], Any]
    guide: Callable[[], Any]
    common_dims: tuple[int, ...] = ()
    """The dims of the common plates."""
    nesting: int = 1
    """Plate dims of model and guide."""
    bound_scale: Any = 1.0
    """What multiplies the bound instead of the log-probability of every site."""
    active: Any = 1.0
    """0 for elements of the common plates where a mask hides every site."""
    turn: Callable[[str], int] = lambda name: 0
    """Which turn of a common sequential plate a site belongs to, by its name."""
    latents: tuple[str, ...] = ("z",)
    """Sites whose score function is taken: gradients stop at their values."""


def traces(case: Case, num_particles: int, vectorize: bool) -> list[tuple[Any, Any]]:
    """Pairs of model and guide traces: one of all particles, or one for each."""
    model, guide = case.model, case.guide
    if vectorize:
        dim = -case.nesting - 1
        model, guide = (pyro.plate("particles", num_particles, dim=dim)(f) for f in (model, guide))
    subsample = {}
    pairs = []
    for _ in range(1 if vectorize else num_particles):
        messenger = poutine.unwrap(guide)
        with _Subsample(subsample):
            with _Detach(case.latents):
                if isinstance(messenger, GuideMessenger):
                    guide()
                    pairs.append(messenger.get_traces())
                    continue
                guide_trace = poutine.trace(guide).get_trace()
            model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace()
            pairs.append((model_trace, guide_trace))
    return pairs


class _Detach(poutine.messenger.Messenger):
    """Draws are constants: also those that remember the parameters they were made with."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.names:
            msg["value"] = msg["value"].detach().clone()


class _Subsample(poutine.messenger.Messenger):
    """Plates draw their subsample once."""

    def __init__(self, drawn: dict[str, Tensor]) -> None:
        super().__init__()
        self.drawn = drawn

    def _pyro_sample(self, msg: Any) -> None:
        if type(msg["fn"]).__name__ == "_Subsample" and msg["name"] in self.drawn:
            msg["value"], msg["done"] = self.drawn[msg["name"]], True

    def _pyro_post_sample(self, msg: Any) -> None:
        if type(msg["fn"]).__name__ == "_Subsample":
            self.drawn[msg["name"]] = msg["value"]


def log_probs(case: Case, num_particles: int, vectorize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """log p, log q, and the log-density of the draws at score sites, ``[K, *common, turns]``."""
    parts: list[list[Tensor]] = [[], [], []]
    for pair in traces(case, num_particles, vectorize):
        turns: list[dict[int, Any]] = [{}, {}, {}]
        for side, trace in enumerate(pair):
            trace.compute_log_prob()
            for name, site in trace.nodes.items():
                if site["type"] != "sample" or type(site["fn"]).__name__ == "_Subsample":
                    continue
                values = {side: site["log_prob"] / case.bound_scale}
                if side == 1 and name in case.latents:
                    values[2] = _unmasked(site["fn"]).log_prob(site["value"])
                for part, value in values.items():
                    total = _sum(value, case, num_particles if vectorize else 1)
                    turn = case.turn(name)
                    turns[part][turn] = turns[part].get(turn, 0.0) + total
        for part, by_turn in enumerate(turns):
            zero = torch.zeros_like(next(iter(turns[0].values()), torch.zeros(())))
            every_turn = sorted(turns[0]) or [0]
            parts[part].append(
                torch.stack([by_turn.get(turn, zero) for turn in every_turn], dim=-1)
            )
    log_p, log_q, density = (torch.cat(part) for part in parts)
    return torch.broadcast_tensors(log_p, log_q, density)


def _unmasked(fn: Any) -> Any:
    """A draw happens whatever the mask of its distribution."""
    if isinstance(fn, dist.Independent):
        return _unmasked(fn.base_dist).to_event(fn.reinterpreted_batch_ndims)
    return _unmasked(fn.base_dist) if isinstance(fn, dist.MaskedDistribution) else fn


def _sum(log_prob: Tensor, case: Case, num_particles: int) -> Tensor:
    """``[K, *common]`` from a log-probability as a site has it."""
    rank = case.nesting + 1
    log_prob = log_prob.reshape((1,) * (rank - log_prob.dim()) + log_prob.shape)
    summed = [dim for dim in range(-case.nesting, 0) if dim not in case.common_dims]
    log_prob = log_prob.sum(summed) if summed else log_prob
    return log_prob.expand(num_particles, *log_prob.shape[1:])


def gradients() -> dict[str, Tensor]:
    """Gradient of every parameter that has one, which is then cleared."""
    found = {}
    for name, param in pyro.get_param_store().named_parameters():
        if param.grad is not None:
            found[name], param.grad = param.grad, None
    return found


def assert_follows_definition(
    case: Case,
    *,
    build: Callable[..., ELBO] = VIMCO,
    signal: Callable[[np.ndarray], np.ndarray] = oracle.vimco_learning_signal,
    vectorize: bool = False,
    guess: bool = False,
    num_particles: int = 3,
) -> dict[str, Tensor]:
    """Loss and gradient of an objective are those of its definition at the same draws."""
    with torch.no_grad():  # creates the parameters
        traces(case, num_particles, vectorize)

    pyro.set_rng_seed(7)
    log_p, log_q, density = log_probs(case, num_particles, vectorize)
    log_weights = (log_p - log_q).detach().numpy()
    scale, active = (
        torch.as_tensor(factor).expand(log_p.shape[1:-1])[..., None]
        for factor in (case.bound_scale, case.active)
    )
    expected_loss = -torch.sum(scale * torch.as_tensor(oracle.iwae_bound(log_weights)))
    weights = torch.as_tensor(oracle.normalized_weights(log_weights))
    # The host's scales and masks weigh log-probabilities; the draw happens whatever they are.
    credit = active * (weights + torch.as_tensor(signal(log_weights)))
    surrogate = (scale * (weights * (log_p - log_q) + credit * density)).sum()
    if surrogate.requires_grad:
        (-surrogate).backward()
    expected = gradients()

    pyro.set_rng_seed(7)
    nesting = {} if guess else {"max_plate_nesting": case.nesting}
    elbo = build(num_particles, vectorize_particles=vectorize, **nesting)
    loss = elbo.loss_and_grads(case.model, case.guide)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-10)
    actual = gradients()
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-8, atol=1e-10, msg=name)
    return actual
