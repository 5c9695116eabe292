"""A Gaussian variational autoencoder, which doubly reparameterised gradients need, for Pyro."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from tutorials.sbn_pyro import affine

NUM_UNITS = 200
NUM_LATENTS = 50


class VariationalAutoencoder(nn.Module):
    """Model and guide."""

    def __init__(self, num_pixels: int) -> None:
        super().__init__()
        self.decoder = affine(NUM_LATENTS, NUM_UNITS)
        self.pixels = affine(NUM_UNITS, num_pixels)
        self.encoder = affine(num_pixels, NUM_UNITS)
        self.loc = affine(NUM_UNITS, NUM_LATENTS)
        self.log_scale = affine(NUM_UNITS, NUM_LATENTS)

    def model(self, images: torch.Tensor) -> None:
        pyro.module("vae", self)
        with pyro.plate("images", len(images)):
            normal = dist.Normal(torch.zeros(NUM_LATENTS), 1.0).to_event(1)
            hidden = torch.tanh(self.decoder(pyro.sample("z", normal)))
            logits = self.pixels(hidden)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=images)

    def guide(self, images: torch.Tensor) -> None:
        pyro.module("vae", self)
        with pyro.plate("images", len(images)):
            hidden = torch.tanh(self.encoder(images))
            scale = self.log_scale(hidden).exp()
            pyro.sample("z", dist.Normal(self.loc(hidden), scale).to_event(1))
