"""One OVIS step for the two-layer sigmoid belief network, in torch alone.

What somebody would write who needs this one model and estimator only: the same maths as
``SVI(network.model, network.guide, Adam, loss=OVIS(num_particles))`` without Pyro.
"""

import math

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from tutorials.sbn_pyro import SigmoidBeliefNetwork


def bernoulli_log_prob(logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    logits, value = torch.broadcast_tensors(logits, value)
    return -binary_cross_entropy_with_logits(logits, value, reduction="none").sum(-1)


def log_joint_and_guide(
    network: SigmoidBeliefNetwork, batch: torch.Tensor, num_particles: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(x, z) and log q(z | x), each ``[num_particles, len(batch)]``."""
    hidden_logits = network.pixels_to_hidden(batch - network.pixel_mean)
    with torch.no_grad():
        hidden = hidden_logits.sigmoid().expand(num_particles, -1, -1).bernoulli()
    top_logits = network.hidden_to_top(hidden - 0.5)
    with torch.no_grad():
        top = top_logits.sigmoid().bernoulli()
    log_q = bernoulli_log_prob(hidden_logits, hidden) + bernoulli_log_prob(top_logits, top)

    log_p = bernoulli_log_prob(network.prior, top)
    log_p = log_p + bernoulli_log_prob(network.top_to_hidden(top - 0.5), hidden)
    log_p = log_p + bernoulli_log_prob(network.hidden_to_pixels(hidden - 0.5), batch)
    return log_p, log_q


@torch.no_grad()
def ovis_coefficients(
    log_weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bound, weights v and learning signal -log(1 - v) - v."""
    log_sum = log_weights.logsumexp(0)
    weights = (log_weights - log_sum).exp()
    largest = log_weights.argmax(0, keepdim=True)
    log_rest = log_weights.scatter(0, largest, -math.inf).logsumexp(0)
    # 1 - v of the largest weight is a difference of nearly equal numbers: use the others' sum.
    log_one_minus = torch.log1p(-weights.scatter(0, largest, 0.0))
    log_one_minus.scatter_(0, largest, (log_rest - log_sum)[None])
    return log_sum - math.log(len(log_weights)), weights, -log_one_minus - weights


def step(
    network: SigmoidBeliefNetwork,
    optimizer: torch.optim.Optimizer,
    batch: torch.Tensor,
    num_particles: int,
) -> float:
    """Update the network's parameters once and return the loss."""
    log_p, log_q = log_joint_and_guide(network, batch, num_particles)
    bound, weights, learning_signal = ovis_coefficients((log_p - log_q).detach())
    optimizer.zero_grad()
    (-(weights * log_p + learning_signal * log_q).sum()).backward()
    optimizer.step()
    return -bound.sum().item()
