"""The model's score at draws of the implicit sites, by differentiating its log-density."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.distributions.util import sum_rightmost

from numpyro_gradest.infer._implicit import implicit_groups, weight_of
from numpyro_gradest.infer._sites import (
    Site,
    Trace,
    is_auxiliary,
    is_deterministic,
    log_prob_of,
    samples,
)
from numpyro_gradest.infer._trace import Program, mutable_state_of, of_type, trace_particle


class ScoredGroup(NamedTuple):
    """Draws of the implicit sites that share their plates, element by element of these."""

    sites: tuple[str, ...]
    samples: Float[Array, " E K D"]
    """In unconstrained space."""
    model_scores: Float[Array, " E K D"]
    """Gradient of log p(x, z) in them, the other latents held at their draws."""
    reference: Float[Array, " E R D"] | None
    """Reference draws, in unconstrained space too."""


def score_draws(
    program: Program, key: Array, num_draws: int, reference: dict[str, Array] | None
) -> list[ScoredGroup]:
    """Draw from the guide, and differentiate the model there."""
    plate_key, draw_key = jax.random.split(key)
    program = program.with_plate_key(plate_key)
    run = partial(_score_one, program)
    drawn, scores = jax.jit(jax.vmap(run))(jax.random.split(draw_key, num_draws))
    wanted = None
    if reference is not None:
        traces = trace_particle(program, draw_key)
        wanted = jax.jit(jax.vmap(partial(_groups_at, *traces)))(_checked(reference, *traces))
    groups = []
    for sites, group in drawn.items():
        weight = group.weight[0].reshape(-1)
        counts = weight > 0  # what a mask hides has no target

        def by_element(values: Array, counts: Array = counts) -> Array:
            values = jnp.moveaxis(values, 0, -2)
            return values.reshape(-1, *values.shape[-2:])[counts]

        groups.append(
            ScoredGroup(
                sites=sites,
                samples=by_element(group.samples),
                # A scale multiplies the target and the entropy alike.
                model_scores=by_element(scores[sites].samples) / weight[counts, None, None],
                reference=None if wanted is None else by_element(wanted[sites].samples),
            )
        )
    for each in groups:
        if not jnp.isfinite(each.model_scores).all():
            raise ValueError(
                f"The model's score at a draw of the implicit sites {list(each.sites)} is not "
                "finite: the draw is not, or it lies outside of the model's support. Check the "
                "guide's parameters."
            )
        if each.reference is not None and not jnp.isfinite(each.reference).all():
            raise ValueError(
                f"A reference draw of the implicit sites {list(each.sites)} is not finite in "
                "unconstrained space: it is not finite itself, or it lies outside or on the edge "
                "of the model's support. Leave such draws out at all sites."
            )
    return groups


def _score_one(program: Program, key: Array) -> tuple:
    model_trace, guide_trace = trace_particle(program, key)
    _refuse_subsample(guide_trace | model_trace)
    drawn = implicit_groups(guide_trace)
    implicit = {name: site for name, site in samples(guide_trace) if "implicit" in site}
    held = _drawn(guide_trace) | of_type(guide_trace | model_trace, "plate")
    held |= program.params | mutable_state_of(guide_trace)

    def trace_at(fn: Callable, data: dict[str, Any]) -> list[tuple[str, Site]]:
        fn = handlers.substitute(handlers.seed(fn, key), data=data)
        return samples(handlers.trace(fn).get_trace(*program.args, **program.kwargs))

    def log_density(unconstrained: dict[str, Array]) -> Array:
        total, values = jnp.zeros(()), dict(held)
        for name, u in unconstrained.items():
            transform = biject_to(model_trace.get(name, implicit[name])["fn"].support)
            values[name] = transform(u)
            log_det = transform.log_abs_det_jacobian(u, values[name])
            weight = weight_of(implicit[name])
            total += jnp.sum(weight * sum_rightmost(log_det, jnp.ndim(log_det) - weight.ndim))
        computed = [each for each in trace_at(program.guide, values) if each[0] not in held]
        values |= {name: site["value"] for name, site in computed}
        total -= sum(_scaled_log_prob(*each) for each in computed)
        return total + sum(_scaled_log_prob(*each) for each in trace_at(program.model, values))

    scores = jax.grad(log_density)({name: site["implicit"] for name, site in implicit.items()})
    return drawn, implicit_groups(_with_implicit(guide_trace, scores))


def _drawn(guide_trace: Trace) -> dict[str, Array]:
    """Values of all guide sites but point masses, which may be computed from implicit sites."""
    return {
        name: site["value"]
        for name, site in samples(guide_trace)
        if "implicit" in site or is_auxiliary(site) or not is_deterministic(site)
    }


def _scaled_log_prob(name: str, site: Site) -> Array:
    scale = 1.0 if site["scale"] is None else site["scale"]
    return jnp.sum(scale * log_prob_of(name, site))


def _groups_at(model_trace: Trace, guide_trace: Trace, values: dict[str, Array]) -> dict:
    """The groups with other values, which are constrained, in the place of the draws."""
    unconstrained = {
        name: _unconstrained(model_trace.get(name, guide_trace[name]), value)
        for name, value in values.items()
    }
    return implicit_groups(_with_implicit(guide_trace, unconstrained))


def _checked(
    reference: dict[str, Array], model_trace: Trace, guide_trace: Trace
) -> dict[str, Array]:
    """Reference draws of the implicit sites, and of no other."""
    implicit = {name: site for name, site in samples(guide_trace) if "implicit" in site}
    checked = {}
    for name, site in implicit.items():
        parts = site["infer"].get("joins", ())
        if parts and name not in reference:
            drawn = _draws_at({part: guide_trace[part] for part in parts}, reference)
            drawn = {part: _unconstrained(model_trace[part], drawn[part]) for part in parts}
            flat = [values.reshape(len(values), -1) for values in drawn.values()]
            checked[name] = jnp.concatenate(flat, axis=-1)
        else:
            checked[name] = _draws_at({name: site}, reference)[name]
    _check_same_number(checked)
    return checked


def _draws_at(sites: dict[str, Site], reference: dict[str, Array]) -> dict[str, Array]:
    drawn = {}
    for name, site in sites.items():
        if name not in reference:
            raise ValueError(
                f"Reference draws need every implicit site, or every latent that one joins, but "
                f"{name!r} is not among {sorted(reference)}."
            )
        drawn[name], shape = jnp.asarray(reference[name]), jnp.shape(site["value"])
        if drawn[name].shape[1:] != shape or len(drawn[name]) < 2:
            raise ValueError(
                f"Reference draws of site {name!r} need the shape [R >= 2, *{shape}], got "
                f"{drawn[name].shape}."
            )
        drawn[name] = drawn[name].astype(site["value"].dtype)
    _check_same_number(drawn)
    return drawn


def _check_same_number(drawn: dict[str, Array]) -> None:
    numbers = {name: len(values) for name, values in drawn.items()}
    if len(set(numbers.values())) > 1:
        raise ValueError(
            f"Reference draws are joint and need the same number R at every site, got {numbers}."
        )


def _unconstrained(site: Site, values: Array) -> Array:
    return biject_to(site["fn"].support).inv(values)


def _refuse_subsample(trace: Trace) -> None:
    for name, site in trace.items():
        if site["type"] == "plate" and site["args"][1] not in (None, site["args"][0]):
            raise ValueError(
                f"Plate {name!r} is subsampled, and a subsample has a posterior of its own. Pass "
                "the check all of the data: the plate without subsample_size."
            )


def _with_implicit(guide_trace: Trace, values: dict[str, Array]) -> Trace:
    return {
        name: site | {"implicit": values[name]} if name in values else site
        for name, site in guide_trace.items()
    }
