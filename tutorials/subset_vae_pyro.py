"""A variational autoencoder whose code is a few subsets of fixed size, for Pyro.

The model draws a subset of each group's items, uniformly, and the pixels given the subsets; the
guide reads the subsets' scores off the pixels.
"""

from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO, SVI, TraceMeanField_ELBO
from sbn_pyro import affine
from torch import nn

from pyro_gradest import KSubset, imle


class SubsetVAE(nn.Module):
    """Model and guide; inputs of both are centred.

    Args:
        pixel_logits: Logits of the mean image, where the visible bias starts and the guide's
            input is centred.
        num_groups: Number of subsets.
        num_items: Items that each is chosen from.
        num_chosen: Size of each.
        num_hidden: Units of the hidden layers of model and guide.
    """

    def __init__(
        self,
        pixel_logits: np.ndarray,
        num_groups: int = 8,
        num_items: int = 8,
        num_chosen: int = 3,
        num_hidden: int = 200,
    ) -> None:
        super().__init__()
        pixel_logits = torch.as_tensor(pixel_logits)
        self.shape, self.num_chosen = (num_groups, num_items), num_chosen
        num_pixels, num_bits = len(pixel_logits), num_groups * num_items
        self.register_buffer("pixel_mean", pixel_logits.sigmoid())
        self.code_to_hidden = affine(num_bits, num_hidden)
        self.hidden_to_pixels = affine(num_hidden, num_pixels)
        self.hidden_to_pixels.bias.data.copy_(pixel_logits)
        self.pixels_to_hidden = affine(num_pixels, num_hidden)
        self.hidden_to_scores = affine(num_hidden, num_bits)

    def model(self, images: torch.Tensor) -> None:
        pyro.module("vae", self)
        prior = KSubset(torch.zeros(self.shape), self.num_chosen).to_event(1)
        with pyro.plate("images", len(images)):
            subsets = pyro.sample("subsets", prior)
            code = subsets.flatten(-2) - self.num_chosen / self.shape[1]
            logits = self.hidden_to_pixels(self.code_to_hidden(code).tanh())
            pyro.sample("pixels", dist.Bernoulli(logits=logits).to_event(1), obs=images)

    def guide(self, images: torch.Tensor) -> None:
        pyro.module("vae", self)
        hidden = self.pixels_to_hidden(images - self.pixel_mean).tanh()
        scores = self.hidden_to_scores(hidden).unflatten(-1, self.shape)
        with pyro.plate("images", len(images)):
            pyro.sample("subsets", KSubset(scores, self.num_chosen).to_event(1))


class Fit(NamedTuple):
    """A trained network, and the mean bound of each epoch in nats per image."""

    network: SubsetVAE
    bounds: list[float]


def fit(
    network: SubsetVAE,
    config: Any,
    images: np.ndarray,
    *,
    loss: ELBO | None = None,
    num_epochs: int,
    batch_size: int = 50,
    learning_rate: float = 3e-3,
) -> Fit:
    """Train on minibatches with Adam.

    ``config`` is what ``imle`` takes. ``loss`` is the ELBO with its exact KL divergence if left
    out.
    """
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    images, bounds = torch.as_tensor(images), []
    optimizer = pyro.optim.Adam({"lr": learning_rate})
    guide = imle(network.guide, config)
    svi = SVI(network.model, guide, optimizer, loss=loss or TraceMeanField_ELBO())
    for _ in range(num_epochs):
        rows = torch.randperm(len(images)).split(batch_size)
        losses = [svi.step(images[batch]) for batch in rows]
        bounds.append(-sum(losses) / len(images))
    return Fit(network, bounds)
