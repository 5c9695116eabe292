"""A sigmoid belief network with two layers of binary units, for Pyro.

The model draws ``top``, then ``hidden`` given ``top``, then the pixels given ``hidden``; the guide
goes the other way, from the pixels up. Every latent is a Bernoulli: nothing can be reparameterised.
"""

from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO, SVI
from pyro.poutine import condition, trace, uncondition
from torch import nn
from torch.nn.utils import parameters_to_vector
from tqdm import trange

from pyro_gradest import IWAE, importance_samples

# What Pyro's objectives are told: run all particles at once, left of the one plate.
OPTIONS = {"vectorize_particles": True, "max_plate_nesting": 1}


def affine(num_inputs: int, num_outputs: int) -> nn.Linear:
    """A learnable affine map; its bias starts at zero."""
    layer = nn.Linear(num_inputs, num_outputs)
    nn.init.normal_(layer.weight, std=num_inputs**-0.5)
    nn.init.zeros_(layer.bias)
    return layer


class SigmoidBeliefNetwork(nn.Module):
    """Model and guide. Inputs of both are centred, which is worth about 4 nats after 20 epochs.

    Args:
        pixel_logits: Logits of the mean image, where the visible bias starts and the guide's
            input is centred.
        num_units: Binary units in each of the two layers.
    """

    def __init__(self, pixel_logits: np.ndarray, num_units: int = 200) -> None:
        super().__init__()
        pixel_logits = torch.as_tensor(pixel_logits)
        num_pixels = len(pixel_logits)
        self.register_buffer("pixel_mean", pixel_logits.sigmoid())
        self.prior = nn.Parameter(torch.zeros(num_units))
        self.top_to_hidden = affine(num_units, num_units)
        self.hidden_to_pixels = affine(num_units, num_pixels)
        self.hidden_to_pixels.bias.data.copy_(pixel_logits)
        self.pixels_to_hidden = affine(num_pixels, num_units)
        self.hidden_to_top = affine(num_units, num_units)

    def model(self, images: torch.Tensor, batch_size: int | None = None) -> None:
        pyro.module("sbn", self)
        with pyro.plate("images", len(images), subsample_size=batch_size):
            batch = pyro.subsample(images, event_dim=1)
            top = pyro.sample("top", dist.Bernoulli(logits=self.prior).to_event(1))
            logits = self.top_to_hidden(top - 0.5)
            hidden = pyro.sample("hidden", dist.Bernoulli(logits=logits).to_event(1))
            logits = self.hidden_to_pixels(hidden - 0.5)
            pyro.sample("pixels", dist.Bernoulli(logits=logits).to_event(1), obs=batch)

    def guide(self, images: torch.Tensor, batch_size: int | None = None) -> None:
        pyro.module("sbn", self)
        with pyro.plate("images", len(images), subsample_size=batch_size):
            batch = pyro.subsample(images, event_dim=1)
            logits = self.pixels_to_hidden(batch - self.pixel_mean)
            hidden = pyro.sample("hidden", dist.Bernoulli(logits=logits).to_event(1))
            logits = self.hidden_to_top(hidden - 0.5)
            pyro.sample("top", dist.Bernoulli(logits=logits).to_event(1))


class Fit(NamedTuple):
    """A trained network, and the mean bound of each epoch in nats per image."""

    network: SigmoidBeliefNetwork
    bounds: list[float]


def fit(
    network: SigmoidBeliefNetwork,
    objective: ELBO,
    images: np.ndarray,
    *,
    num_epochs: int,
    batch_size: int = 50,
    learning_rate: float = 3e-3,
    label: str = "",
) -> Fit:
    """Train on minibatches with Adam."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    images = torch.as_tensor(images)
    optimizer = pyro.optim.Adam({"lr": learning_rate})
    svi = SVI(network.model, network.guide, optimizer, loss=objective)
    num_steps = len(images) // batch_size
    bounds = []
    with trange(num_epochs, desc=label, unit="epoch") as progress:
        for _ in progress:
            losses = [svi.step(images, batch_size=batch_size) for _ in range(num_steps)]
            bounds.append(-sum(losses) / num_steps / len(images))
            progress.set_postfix_str(f"bound {bounds[-1]:.2f} nats per image")
    return Fit(network, bounds)


def held_out_bound(fit: Fit, images: np.ndarray, *, num_particles: int = 1000) -> float:
    """The K-particle bound on log p(image), in nats per image; memory does not grow with K."""
    pyro.set_rng_seed(1)
    objective = IWAE(num_particles, chunk_size=20, **OPTIONS)
    loss = objective.loss(fit.network.model, fit.network.guide, torch.as_tensor(images))
    return -loss / len(images)


def gradient_moments(
    fit: Fit, objective: ELBO, images: np.ndarray, *, num_draws: int
) -> tuple[float, float]:
    """Squared norm of the mean of the guide's gradient, and its total variance."""
    pyro.set_rng_seed(2)
    network, images = fit.network, torch.as_tensor(images)
    guide_params = [*network.pixels_to_hidden.parameters(), *network.hidden_to_top.parameters()]
    total, total_square = 0.0, 0.0
    for _ in range(num_draws):
        network.zero_grad()
        objective.loss_and_grads(network.model, network.guide, images)
        gradient = parameters_to_vector([param.grad for param in guide_params]).double()
        total, total_square = total + gradient, total_square + gradient @ gradient
    mean_square = float(total @ total) / num_draws**2
    variance = (float(total_square) / num_draws - mean_square) * num_draws / (num_draws - 1)
    # The mean of a finite number of draws has noise of its own, which would pass for signal.
    return mean_square - variance / num_draws, variance


def draw_images(fit: Fit, num_images: int) -> np.ndarray:
    """Pixel probabilities of images drawn from the model."""
    pyro.set_rng_seed(3)
    return _pixel_probs(fit, {}, torch.empty(num_images, len(fit.network.pixel_mean))).numpy()


def reconstruct(fit: Fit, images: np.ndarray) -> np.ndarray:
    """Pixel probabilities of images, averaged over draws from their posterior."""
    pyro.set_rng_seed(4)
    images, model, guide = torch.as_tensor(images), fit.network.model, fit.network.guide
    draws = importance_samples(model, guide, images, num_samples=50, **OPTIONS)
    return _pixel_probs(fit, draws.samples, images).mean(0).numpy()


@torch.no_grad()
def _pixel_probs(fit: Fit, latents: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    model = condition(uncondition(fit.network.model), data=latents)
    return trace(model).get_trace(images).nodes["pixels"]["fn"].mean
