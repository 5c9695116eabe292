"""The model's score at draws of the implicit sites, by differentiating its log-density."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from torch import Tensor

from pyro_gradest.infer._implicit import (
    ImplicitGroup,
    concatenate_groups,
    implicit_groups,
    to_constrained,
    weight_of,
)
from pyro_gradest.infer._sites import Site, Trace, is_auxiliary, is_deterministic, samples
from pyro_gradest.infer._trace import (
    Program,
    ShareSubsamples,
    in_particle_plate,
    trace_particles,
)


class ScoredGroup(NamedTuple):
    """Draws of the implicit sites that share their plates, element by element of these."""

    sites: tuple[str, ...]
    samples: Float[Tensor, " E K D"]
    """In unconstrained space."""
    model_scores: Float[Tensor, " E K D"]
    """Gradient of log p(x, z) in them, the other latents held at their draws."""
    reference: Float[Tensor, " E R D"] | None
    """Reference draws, in unconstrained space too."""


def score_draws(
    program: Program, num_draws: int, reference: dict[str, Tensor] | None
) -> list[ScoredGroup]:
    """Draw from the guide, and differentiate the model there."""
    sizes = [num_draws] if program.vectorize_particles else [1] * num_draws
    runs = [_score_run(program, size) for size in sizes]
    drawn, scores = (concatenate_groups(list(each)) for each in zip(*runs, strict=True))
    wanted: list[ImplicitGroup | None] = [None] * len(drawn)
    if reference is not None:
        traces = trace_particles(program, 1)
        checked = _checked(reference, *traces)
        rows = [dict(zip(checked, row, strict=True)) for row in zip(*checked.values(), strict=True)]
        wanted = list(concatenate_groups([_groups_at(*traces, row) for row in rows]))
    groups = []
    for group, scored, one in zip(drawn, scores, wanted, strict=True):
        weight = group.weight.reshape(-1)
        counts = weight > 0  # what a mask hides has no target

        def by_element(values: Tensor, counts: Tensor = counts) -> Tensor:
            values = values.detach().movedim(0, -2)
            return values.reshape(-1, *values.shape[-2:])[counts]

        groups.append(
            ScoredGroup(
                sites=group.sites,
                samples=by_element(group.samples),
                # A scale multiplies the target and the entropy alike.
                model_scores=by_element(scored.samples) / weight[counts, None, None],
                reference=None if one is None else by_element(one.samples),
            )
        )
    for each in groups:
        if not torch.isfinite(each.model_scores).all():
            raise ValueError(
                f"The model's score at a draw of the implicit sites {list(each.sites)} is not "
                "finite: the draw is not, or it lies outside of the model's support. Check the "
                "guide's parameters."
            )
        if each.reference is not None and not torch.isfinite(each.reference).all():
            raise ValueError(
                f"A reference draw of the implicit sites {list(each.sites)} is not finite in "
                "unconstrained space: it is not finite itself, or it lies outside or on the edge "
                "of the model's support. Leave such draws out at all sites."
            )
    return groups


def _score_run(
    program: Program, num_particles: int
) -> tuple[list[ImplicitGroup], list[ImplicitGroup]]:
    with torch.no_grad():
        model_trace, guide_trace = trace_particles(program, num_particles)
    _refuse_subsample(model_trace, guide_trace)
    drawn = implicit_groups(guide_trace, num_particles)
    implicit = {name: site for name, site in samples(guide_trace) if "implicit" in site}
    model_sites = dict(samples(model_trace))
    held = _drawn(guide_trace)
    unconstrained, log_dets = {}, []
    for name, site in implicit.items():
        u = site["implicit"].detach().requires_grad_()
        transform = to_constrained((model_sites.get(name) or site)["fn"])
        value = transform(u)
        log_det = transform.log_abs_det_jacobian(u, value)
        weight = weight_of(site)
        log_dets.append((weight * sum_rightmost(log_det, log_det.dim() - weight.dim())).sum())
        unconstrained[name] = u
        held.nodes[name]["value"] = value
    model, guide = program.model, program.guide
    if num_particles > 1:
        nesting = program.max_plate_nesting + 1
        model, guide = (in_particle_plate(fn, num_particles, nesting) for fn in (model, guide))

    def trace_at(fn: Callable, values: Trace) -> Trace:
        replayed = poutine.trace(poutine.replay(fn, trace=values))
        return replayed.get_trace(*program.args, **program.kwargs)

    with ShareSubsamples(program.subsamples), torch.enable_grad():
        guide_at = trace_at(guide, held)
        log_q = guide_at.log_prob_sum(lambda name, _: name not in held)
        log_density = trace_at(model, guide_at).log_prob_sum() + sum(log_dets) - log_q
    leaves = list(unconstrained.values())
    gradients = torch.autograd.grad(log_density, leaves, materialize_grads=True)
    for site, gradient in zip(implicit.values(), gradients, strict=True):
        site["implicit"] = gradient
    return drawn, implicit_groups(guide_trace, num_particles)


def _drawn(guide_trace: Trace) -> Trace:
    """All guide sites but point masses, which may be computed from implicit sites."""
    drawn = Trace()
    for name, site in samples(guide_trace):
        if "implicit" in site or is_auxiliary(site) or not is_deterministic(site["fn"]):
            drawn.add_node(name, **site)
    return drawn


def _groups_at(
    model_trace: Trace, guide_trace: Trace, values: dict[str, Tensor]
) -> list[ImplicitGroup]:
    """The groups with other values, which are constrained, in the place of the draws."""
    model_sites = dict(samples(model_trace))
    for name, site in samples(guide_trace):
        if name in values:
            site["implicit"] = _unconstrained(model_sites.get(name) or site, values[name])
    return implicit_groups(guide_trace, 1)


def _checked(
    reference: dict[str, Tensor], model_trace: Trace, guide_trace: Trace
) -> dict[str, Tensor]:
    """Reference draws of the implicit sites, and of no other."""
    implicit = {name: site for name, site in samples(guide_trace) if "implicit" in site}
    checked = {}
    for name, site in implicit.items():
        parts = (site["infer"] or {}).get("joins", ())
        if parts and name not in reference:
            drawn = _draws_at({part: guide_trace.nodes[part] for part in parts}, reference)
            drawn = {part: _unconstrained(model_trace.nodes[part], drawn[part]) for part in parts}
            flat = [values.reshape(len(values), -1) for values in drawn.values()]
            checked[name] = torch.cat(flat, dim=-1)
        else:
            checked[name] = _draws_at({name: site}, reference)[name]
    _check_same_number(checked)
    return checked


def _draws_at(sites: dict[str, Site], reference: dict[str, Tensor]) -> dict[str, Tensor]:
    drawn = {}
    for name, site in sites.items():
        if name not in reference:
            raise ValueError(
                f"Reference draws need every implicit site, or every latent that one joins, but "
                f"{name!r} is not among {sorted(reference)}."
            )
        drawn[name], shape = torch.as_tensor(reference[name]), tuple(site["value"].shape)
        if tuple(drawn[name].shape[1:]) != shape or len(drawn[name]) < 2:
            raise ValueError(
                f"Reference draws of site {name!r} need the shape [R >= 2, *{shape}], got "
                f"{tuple(drawn[name].shape)}."
            )
        drawn[name] = drawn[name].to(site["value"])
    _check_same_number(drawn)
    return drawn


def _check_same_number(drawn: dict[str, Tensor]) -> None:
    numbers = {name: len(values) for name, values in drawn.items()}
    if len(set(numbers.values())) > 1:
        raise ValueError(
            f"Reference draws are joint and need the same number R at every site, got {numbers}."
        )


def _unconstrained(site: Site, values: Tensor) -> Tensor:
    return to_constrained(site["fn"]).inv(values)


def _refuse_subsample(*traces: Trace) -> None:
    for trace in traces:
        for _, site in samples(trace):
            for frame in site["cond_indep_stack"]:
                if frame.full_size not in (None, frame.size):
                    raise ValueError(
                        f"Plate {frame.name!r} is subsampled, and a subsample has a posterior of "
                        "its own. Pass the check all of the data: the plate without "
                        "subsample_size."
                    )
