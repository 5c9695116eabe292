"""Runs the model forwards, and the guide at what it drew: the sleep phase."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_gradest.infer._sites import is_deterministic, samples
from pyro_gradest.infer._trace import Program, ShareSubsamples, in_particle_plate


def dream_log_q(
    program: Program, num_particles: int, dream_inputs: Callable[..., tuple] | None
) -> Float[Tensor, ""]:
    """log q(z | x) at latents and data drawn from the model, summed with its scales."""
    if program.vectorize_particles and num_particles > 1:
        return _dream(program, num_particles, dream_inputs)
    dreams = [_dream(program, 1, dream_inputs) for _ in range(num_particles)]
    return torch.stack(dreams).sum()


def _dream(
    program: Program, num_particles: int, dream_inputs: Callable[..., tuple] | None
) -> Float[Tensor, ""]:
    model, guide = program.model, program.guide
    if num_particles > 1:
        dim = program.max_plate_nesting + 1
        model, guide = (in_particle_plate(fn, num_particles, dim) for fn in (model, guide))
    with ShareSubsamples(program.subsamples):
        with torch.no_grad():
            model_trace = poutine.trace(poutine.uncondition(model)).get_trace(
                *program.args, **program.kwargs
            )
        values = {name: site["value"] for name, site in samples(model_trace)}
        dreamt = {
            name: values.pop(name)
            for name, site in samples(model_trace)
            if site["infer"].get("was_observed")
        }
        args, kwargs = _show_dream(program, dreamt, dream_inputs)
        guide = poutine.condition(guide, data=values)
        guide_trace = prune_subsample_sites(poutine.trace(guide).get_trace(*args, **kwargs))
    for name, site in samples(guide_trace):
        if name in values and is_deterministic(site["fn"]):
            raise ValueError(
                f"Sleep-phi trains the guide on latents drawn from the model, but guide site "
                f"{name!r} is a point mass (Delta), which gives them no probability. Use "
                "insomnia=1.0 (wake-phi only), or a guide with a density there."
            )
        if name not in values and not site["is_observed"] and not is_deterministic(site["fn"]):
            raise ValueError(
                f"Sleep-phi trains the guide on latents drawn from the model, but guide site "
                f"{name!r} is not in the model. Use insomnia=1.0 (wake-phi only) for guides with "
                "auxiliary sites."
            )
    log_q = torch.as_tensor(guide_trace.log_prob_sum())
    if log_q.isfinite():
        return log_q
    for name, site in samples(guide_trace):
        if not site["log_prob_sum"].isfinite():
            raise ValueError(
                f"Sleep-phi trains the guide on latents and data drawn from the model, but there "
                f"its log-probability at site {name!r} is {site['log_prob_sum'].item()}. Let the "
                "guide cover all that the model can draw; no parameter has been updated."
            )
    raise ValueError("Sleep-phi got a log-probability of the guide that overflows when summed.")


def _show_dream(
    program: Program, dreamt: dict[str, Tensor], dream_inputs: Callable[..., tuple] | None
) -> tuple[tuple, dict[str, Any]]:
    """Arguments that let the guide look at dreamt data."""
    if dream_inputs is not None:
        return tuple(dream_inputs(dreamt, *program.args, **program.kwargs)), program.kwargs
    if "observations" not in program.kwargs:
        raise ValueError(
            f"Sleep-phi has to show the guide the data dreamt at {sorted(dreamt)}. Pass "
            "dream_inputs=lambda dream, *args: (dream[...],), which returns the guide's arguments; "
            "or let model and guide take their data as observations={site name: value}."
        )
    return program.args, program.kwargs | {"observations": dreamt}
