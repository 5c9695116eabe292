"""Which costs a score-function site gets the credit for: those downstream of its draw.

Only direct dependencies are read off the programs. What follows from them depends on the plates,
too: within a plate an element of one site depends on the same element of another, but by way of a
site outside of the plate on all of its elements.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float
from numpyro.ops.provenance import eval_provenance

from numpyro_gradest.infer._sites import Site, Trace, log_prob_of, samples
from numpyro_gradest.infer._trace import Program, trace_guide, trace_model

Upstream = dict[str, frozenset[str]]
"""Score-function sites, and of each the plates in which only the same element matters."""


class Credit(NamedTuple):
    """Of one score-function site."""

    log_q: Float[Array, " *plates"]
    """Log-density of the draw, which happens whatever its scale and mask."""
    cost: Float[Array, " *plates"]
    """The terms of the log-weight downstream of the draw, with all scales, detached."""


class _Parents(NamedTuple):
    """The latent sites that something is computed from, without those they depend on."""

    of_draws: dict[str, frozenset[str]]
    of_model_terms: dict[str, frozenset[str]]
    of_guide_terms: dict[str, frozenset[str]]


def upstream_sites(
    program: Program, model_trace: Trace, guide_trace: Trace, score_sites: set[str]
) -> dict[tuple[str, str], Upstream]:
    """What the term of each site, by its part and name, is downstream of."""
    parents = _parents(program, guide_trace)
    upstream: dict[tuple[str, str], Upstream] = {}
    of_draws: dict[str, Upstream] = {}
    for name, site in samples(guide_trace):
        above_it = parents.of_guide_terms[name] | parents.of_draws.get(name, frozenset())
        above = _above(above_it - {name}, of_draws, site)
        if name in score_sites:
            above[name] = _plates(site)
        upstream["guide", name] = of_draws[name] = above
    for name, site in samples(model_trace):
        upstream["model", name] = _above(parents.of_model_terms[name], of_draws, site)
    return upstream


def _parents(program: Program, guide_trace: Trace) -> _Parents:
    """Runs the programs once more, abstractly, with the draws for arguments."""
    draws = {name: site["value"] for name, site in samples(guide_trace) if not site["is_observed"]}
    for name in draws:
        if guide_trace[name].get("_control_flow_done"):
            raise NotImplementedError(
                f"Guide site {name!r} is drawn inside of scan or cond, where it can't be told what "
                'is downstream of it. Use credit="whole".'
            )

    # Sites may have any name, that of an argument of the host's function among them.
    def run(**values: Array) -> _Parents:
        key = jax.random.key(0)
        guide = trace_guide(program, key, dict(zip(draws, values.values(), strict=True)))
        model = trace_model(program, key, guide)
        return _Parents(
            {name: guide[name]["fn"].sample(key) for name in draws}, _terms(model), _terms(guide)
        )

    names = {f"draw {i}": name for i, name in enumerate(draws)}
    parents = eval_provenance(run, **dict(zip(names, draws.values(), strict=True)))
    return jax.tree.map(lambda found: frozenset(map(names.__getitem__, found)), parents)


def _terms(trace: Trace) -> dict[str, Any]:
    return {
        name: log_prob_of(name, site) * (1.0 if site["scale"] is None else site["scale"])
        for name, site in samples(trace)
    }


def _above(parents: Iterable[str], of_draws: dict[str, Upstream], site: Site) -> Upstream:
    above: Upstream = {}
    for parent in parents:
        for name, plates in of_draws[parent].items():
            above[name] = above.get(name, _plates(site)) & plates
    return above


def _plates(site: Site) -> frozenset[str]:
    return frozenset(frame.name for frame in site["cond_indep_stack"])
