"""A short training of every objective on real digits must teach the guide.

The model alone learns much of the digits: with the guide held still, these 200 steps raise the
bound from -220 to -184 nats an image. Every objective has to pass a bar that lies about half-way
from there to where it ends itself, some ten times the spread between seeds (0.5 nats) from either.
"""

import pyro
import pytest
import torch
from pyro.infer import ELBO, SVI

from pyro_gradest import IWAE, OVIS, VIMCO, ReweightedWakeSleep
from tutorials.digits import load_digits
from tutorials.sbn_pyro import OPTIONS, SigmoidBeliefNetwork

NUM_STEPS = 200
BATCH_SIZE = 24
NUM_HELD_OUT = 100
GUIDE_LAYERS = ("pixels_to_hidden", "hidden_to_top")

# Nats per image. Without a control variate the guide learns too, but slowly.
BARS = {
    "IWAE": (IWAE(5, **OPTIONS), -178.0),
    "VIMCO": (VIMCO(5, **OPTIONS), -170.0),
    "OVIS": (OVIS(5, **OPTIONS), -170.0),
    "OVIS_Monte_Carlo": (OVIS(5, num_auxiliary=2, **OPTIONS), -170.0),
    "OVIS_gamma_1": (OVIS(5, gamma=1.0, **OPTIONS), -170.0),
    "wake_phi": (ReweightedWakeSleep(5, **OPTIONS), -170.0),
}


def train(objective: ELBO, *, guide_learns: bool = True) -> tuple[float, float]:
    """Bound on held-out digits before and after training, in nats per image."""
    digits = load_digits()
    images = torch.as_tensor(digits.train)
    held_out = torch.as_tensor(digits.held_out[:NUM_HELD_OUT])
    network = SigmoidBeliefNetwork(digits.pixel_logits)

    def settings(name: str) -> dict[str, float]:
        stands_still = not guide_learns and any(layer in name for layer in GUIDE_LAYERS)
        return {"lr": 0.0 if stands_still else 3e-3}

    def bound() -> float:
        loss = IWAE(100, **OPTIONS).loss(network.model, network.guide, held_out)
        return -loss / NUM_HELD_OUT

    svi = SVI(network.model, network.guide, pyro.optim.Adam(settings), loss=objective)
    before = bound()
    for _ in range(NUM_STEPS):
        svi.step(images, batch_size=BATCH_SIZE)
    return before, bound()


@pytest.mark.usefixtures("user_defaults")
@pytest.mark.parametrize("name", BARS)
def test_training_teaches_the_guide(name: str) -> None:
    objective, bar = BARS[name]
    before, after = train(objective)
    assert before < -200
    assert after > bar


@pytest.mark.usefixtures("user_defaults")
def test_without_a_guide_that_learns_no_bar_is_reached() -> None:
    _, after = train(VIMCO(5, **OPTIONS), guide_learns=False)
    assert after < min(bar for _, bar in BARS.values()) - 2
