"""A short training of every objective on real digits must teach the guide.

The model alone learns much of the digits: with the guide held still, these 200 steps raise the
bound from -220 to -184 nats an image. Every objective has to pass a bar that lies about half-way
from there to where it ends itself, some ten times the spread between seeds (0.5 nats) from either.
"""

import jax
import jax.numpy as jnp
import optax
import pytest
from numpyro.infer import ELBO, SVI

from numpyro_gradest import IWAE, OVIS, VIMCO, ReweightedWakeSleep
from tutorials.digits import load_digits
from tutorials.sbn_numpyro import SigmoidBeliefNetwork

NUM_STEPS = 200
BATCH_SIZE = 24
NUM_HELD_OUT = 100
GUIDE_LAYERS = ("pixels_to_hidden", "hidden_to_top")

# Nats per image. Without a control variate the guide learns too, but slowly.
BARS = {
    "IWAE": (IWAE(5), -178.0),
    "VIMCO": (VIMCO(5), -170.0),
    "OVIS": (OVIS(5), -170.0),
    "OVIS_Monte_Carlo": (OVIS(5, num_auxiliary=2), -170.0),
    "OVIS_gamma_1": (OVIS(5, gamma=1.0), -170.0),
    "wake_phi": (ReweightedWakeSleep(5), -170.0),
}


def train(objective: ELBO, *, guide_learns: bool = True) -> tuple[float, float]:
    """Bound on held-out digits before and after training, in nats per image."""
    digits = load_digits()
    images = jnp.asarray(digits.train)
    held_out = jnp.asarray(digits.held_out[:NUM_HELD_OUT])
    network = SigmoidBeliefNetwork(digits.pixel_logits)

    def learns(params: dict) -> dict[str, bool]:
        return {name: guide_learns or not name.startswith(GUIDE_LAYERS) for name in params}

    optimizer = optax.partition({True: optax.adam(3e-3), False: optax.set_to_zero()}, learns)
    svi = SVI(network.model, network.guide, optimizer, loss=objective, batch_size=BATCH_SIZE)
    state = svi.init(jax.random.key(0), images)
    start = svi.get_params(state)

    @jax.jit
    def bound(params: dict) -> jax.Array:
        loss = IWAE(100).loss(jax.random.key(1), params, network.model, network.guide, held_out)
        return -loss / NUM_HELD_OUT

    @jax.jit
    def run(state, images):
        return jax.lax.scan(lambda s, _: svi.update(s, images), state, length=NUM_STEPS)[0]

    end = svi.get_params(run(state, images))
    return float(bound(start)), float(bound(end))


@pytest.mark.usefixtures("user_defaults")
@pytest.mark.parametrize("name", BARS)
def test_training_teaches_the_guide(name: str) -> None:
    objective, bar = BARS[name]
    before, after = train(objective)
    assert before < -200
    assert after > bar


@pytest.mark.usefixtures("user_defaults")
def test_without_a_guide_that_learns_no_bar_is_reached() -> None:
    _, after = train(VIMCO(5), guide_learns=False)
    assert after < min(bar for _, bar in BARS.values()) - 2
