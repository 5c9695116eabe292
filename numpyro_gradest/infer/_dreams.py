"""Runs the model forwards, and the guide at what it drew: the sleep phase."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro import handlers

from numpyro_gradest.infer._sites import is_deterministic, log_prob_of, samples
from numpyro_gradest.infer._trace import Program, of_type


def dream_log_q(
    program: Program, key: Array, dream_inputs: Callable[..., tuple] | None
) -> Float[Array, ""]:
    """log q(z | x) at latents and data drawn from the model, summed with its scales."""
    model_key, guide_key = jax.random.split(key)
    params = jax.tree.map(lambda leaf: leaf, program.params)
    model = handlers.uncondition(handlers.seed(program.model, model_key))
    model = handlers.substitute(model, data=jax.lax.stop_gradient(params))
    model_trace = handlers.trace(model).get_trace(*program.args, **program.kwargs)
    values = {name: jax.lax.stop_gradient(site["value"]) for name, site in samples(model_trace)}
    dreamt = {
        name: values.pop(name)
        for name, site in samples(model_trace)
        if site["is_observed"] or site["infer"].get("was_observed")
    }

    args, kwargs = _show_dream(program, dreamt, dream_inputs)
    # The model drew the data of its own subsample: the guide must look at the same one.
    data = params | values | of_type(model_trace, "plate")
    guide = handlers.substitute(handlers.seed(program.guide, guide_key), data=data)
    guide_trace = handlers.trace(guide).get_trace(*args, **kwargs)
    for name, site in samples(guide_trace):
        if name in values and is_deterministic(site):
            raise ValueError(
                f"Sleep-phi trains the guide on latents drawn from the model, but guide site "
                f"{name!r} is a point mass (Delta), which gives them no probability. Use "
                "insomnia=1.0 (wake-phi only), or a guide with a density there."
            )
        if name not in values and not site["is_observed"] and not is_deterministic(site):
            raise ValueError(
                f"Sleep-phi trains the guide on latents drawn from the model, but guide site "
                f"{name!r} is not in the model. Use insomnia=1.0 (wake-phi only) for guides with "
                "auxiliary sites."
            )
    total = jnp.zeros(())
    for name, site in samples(guide_trace):
        scale = 1.0 if site["scale"] is None else site["scale"]
        total += jnp.sum(scale * log_prob_of(name, site))
    return total


def _show_dream(
    program: Program, dreamt: dict[str, Array], dream_inputs: Callable[..., tuple] | None
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
