"""Which costs a score-function site gets the credit for: those downstream of its draw.

Only direct dependencies are read off the programs. What follows from them depends on the plates,
too: within a plate an element of one site depends on the same element of another, but by way of a
site outside of the plate on all of its elements.
"""

from collections.abc import Iterable
from typing import NamedTuple

from jaxtyping import Float
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_gradest.infer._sites import Site, Trace, is_subsample, samples

Upstream = dict[str, frozenset[str]]
"""Score-function sites, and of each the plates in which only the same element matters."""


class Credit(NamedTuple):
    """Of one score-function site."""

    log_q: Float[Tensor, " K *plates"]
    """Log-density of the draws, which happen whatever their scale and mask."""
    cost: Float[Tensor, " K *plates"]
    """The terms of the log-weight downstream of the draws, with all scales, detached."""


class TrackDraws(Messenger):
    """Marks what is computed from each latent site by the host's provenance."""

    def _pyro_post_sample(self, msg: Site) -> None:
        if not (is_subsample(msg) or msg["is_observed"]):
            msg["drawn_from"] = get_provenance(msg["value"])
            own = frozenset([msg["name"]])
            msg["value"] = track_provenance(detach_provenance(msg["value"]), own)


def upstream_sites(
    model_trace: Trace, guide_trace: Trace, score_sites: set[str]
) -> dict[tuple[str, str], Upstream]:
    """What the term of each site, by its part and name, is downstream of."""
    upstream: dict[tuple[str, str], Upstream] = {}
    of_draws: dict[str, Upstream] = {}
    for name, site in samples(guide_trace):
        parents = get_provenance(site["log_prob"]) | site.get("drawn_from", frozenset())
        above = _above(parents - {name}, of_draws, site)
        if name in score_sites:
            above[name] = _plates(site)
        upstream["guide", name] = of_draws[name] = above
    for name, site in samples(model_trace):
        upstream["model", name] = _above(get_provenance(site["log_prob"]), of_draws, site)
    return upstream


def _above(parents: Iterable[str], of_draws: dict[str, Upstream], site: Site) -> Upstream:
    above: Upstream = {}
    for parent in parents:
        for name, plates in of_draws[parent].items():
            above[name] = above.get(name, _plates(site)) & plates
    return above


def _plates(site: Site) -> frozenset[str]:
    return frozenset(frame.name for frame in site["cond_indep_stack"])
