"""A Bayesian neural network for regression, and guides for it, for Pyro.

One hidden layer of tanh units. The weights of a unit, those that enter it and the one that leaves
it, are the unit's own draw: the guide that can only be sampled draws them jointly, unit by unit.
"""

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO, MCMC, NUTS, SVI, Predictive
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.initialization import init_to_sample
from torch.distributions import constraints

from pyro_gradest import AutoImplicit, Implicit

# What Pyro's objectives are told: run all particles at once, left of the plates.
OPTIONS = {"vectorize_particles": True, "max_plate_nesting": 1}
NUM_UNITS = 20
NUM_HIDDEN = 16
"""Width of the network inside the guide."""
LATENTS = ("weights", "shift", "outgoing", "bias", "noise")


def network(features, weights, shift, outgoing, bias):
    """The output for each datum, ``[*draws, N]``."""
    hidden = torch.tanh(features @ weights.mT + shift.unsqueeze(-2))
    return (hidden @ outgoing.unsqueeze(-1)).squeeze(-1) + bias


def model(features, targets=None, batch_size=None):
    num_inputs = features.shape[-1]
    with pyro.plate("units", NUM_UNITS):
        weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([num_inputs]).to_event(1))
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        outgoing = pyro.sample("outgoing", dist.Normal(0.0, 1 / math.sqrt(NUM_UNITS)))
    bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("data", len(features), subsample_size=batch_size):
        features = pyro.subsample(features, event_dim=1)
        targets = None if targets is None else pyro.subsample(targets, event_dim=0)
        mean = network(features, weights, shift, outgoing, bias)
        pyro.sample("targets", dist.Normal(mean, noise), obs=targets)


def unit_guide(features, targets=None, batch_size=None):
    """Each unit's weights are pushed jointly out of noise; the two other latents have densities."""
    num_inputs = features.shape[-1]
    dim = num_inputs + 2
    loc = pyro.param("loc", lambda: 0.5 * torch.randn(NUM_UNITS, dim))
    skip = pyro.param("skip", lambda: 0.1 * torch.eye(dim).repeat(NUM_UNITS, 1, 1))
    first = pyro.param("first", lambda: torch.randn(NUM_UNITS, dim, NUM_HIDDEN) / math.sqrt(dim))
    last = pyro.param("last", lambda: torch.zeros(NUM_UNITS, NUM_HIDDEN, dim))
    with pyro.plate("units", NUM_UNITS):
        normal = dist.Normal(0.0, 1.0).expand([dim]).to_event(1)
        e = pyro.sample("noise_of_unit", normal, infer={"is_auxiliary": True}).unsqueeze(-2)
        drawn = loc + (e @ skip + torch.tanh(e @ first) @ last).squeeze(-2)
        pyro.sample("weights", Implicit(drawn[..., :num_inputs], event_dim=1))
        pyro.sample("shift", Implicit(drawn[..., -2]))
        pyro.sample("outgoing", Implicit(drawn[..., -1]))
    bias_loc = pyro.param("bias_loc", torch.tensor(0.0))
    pyro.sample("bias", dist.Normal(bias_loc, _width("bias_scale")))
    log_noise = pyro.param("log_noise", torch.tensor(-1.0))
    pyro.sample("noise", dist.LogNormal(log_noise, _width("log_noise_scale")))


def _width(name):
    return pyro.param(name, torch.tensor(0.1), constraint=constraints.positive)


def mean_field_guide() -> AutoNormal:
    return AutoNormal(model, init_loc_fn=init_to_sample)


def joint_guide() -> AutoImplicit:
    return AutoImplicit(model, init_loc_fn=init_to_sample)


def fitter(
    guide: Callable, objective: ELBO, *, num_steps: int, learning_rate: float, batch_size: int
) -> Callable:
    """A function from seed, features and targets to draws."""

    def fit(seed: int, features: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        pyro.set_rng_seed(seed)
        pyro.clear_param_store()
        cosine = {"optimizer": torch.optim.Adam, "optim_args": {"lr": learning_rate}}
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR
        optimizer = pyro.optim.PyroLRScheduler(scheduler, cosine | {"T_max": num_steps})
        svi = SVI(model, guide, optimizer, loss=objective)
        for _ in range(num_steps):
            svi.step(features, targets, batch_size=batch_size)
            optimizer.step()
        return Predictive(guide, num_samples=1000, parallel=True)(features)

    return fit


def nuts_draws(
    seed: int,
    features: torch.Tensor,
    targets: torch.Tensor,
    *,
    num_warmup: int,
    num_samples: int,
    max_tree_depth: int = 10,
) -> dict[str, torch.Tensor]:
    """Draws by the host's NUTS."""
    pyro.set_rng_seed(seed)
    kernel = NUTS(model, max_tree_depth=max_tree_depth)
    mcmc = MCMC(kernel, num_samples, warmup_steps=num_warmup, disable_progbar=True)
    mcmc.run(features, targets)
    return mcmc.get_samples()


@torch.no_grad()
def predict(features, draws):
    """For each posterior draw the output for each datum ``[S, N]``, and the noise ``[S]``."""
    *weights, bias, noise = (draws[name] for name in LATENTS)
    return network(features, *weights, bias.reshape(-1, 1)), noise.reshape(-1)
