"""Antithetic pairs: model and guide run twice, with Bernoulli draws that mirror each other."""

from typing import Any

import torch
from jaxtyping import Float
from pyro import distributions as dist
from pyro.distributions.util import sum_rightmost
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_gradest.estimators import antithetic_probs, antithetic_score
from pyro_gradest.infer._random import OtherRandomNumbersError, is_rng_state, replayed, rng_state
from pyro_gradest.infer._site_estimators import SiteEstimators, is_score_site
from pyro_gradest.infer._sites import Site, Trace, is_subsample, samples
from pyro_gradest.infer._trace import Program, trace_particles

Draws = dict[str, Site]


def trace_pair(
    program: Program, num_particles: int
) -> tuple[tuple[Trace, Trace], tuple[Trace, Trace]]:
    """Trace model and guide at two draws that are antithetic, and otherwise of the same noise.

    Each Bernoulli site of the guide's notes its value in the other run as ``partner``.
    """
    start = rng_state()
    with _NoteDraws() as notes:
        first = trace_particles(program, num_particles)
    draws = _bernoulli_draws(first[1], program.estimators)
    with replayed(start), _DrawPartners(draws, notes.states):
        second = trace_particles(program, num_particles)
    partners = _bernoulli_draws(second[1], program.estimators)
    for name in sorted(draws.keys() ^ partners.keys()):
        raise ValueError(
            f"Guide site {name!r} is drawn at one of the two draws of an antithetic pair only, as "
            "the guide branches on another discrete draw. Use VIMCO or OVIS, or RLOO for the ELBO."
        )
    for name, site in draws.items():
        site["partner"], partners[name]["partner"] = partners[name]["value"], site["value"]
    return first, second


def antithetic_term(site: Site) -> Float[Tensor, " *batch"]:
    """For a site with a partner: what its pair's learning signal multiplies the gradient of."""
    value = site["value"]
    logits = _logits(site["fn"], value.shape)
    score = antithetic_score(value, site["partner"], logits)
    # Log-odds may be infinite where the two draws agree.
    term = score * logits.masked_fill(score == 0, 0.0)
    return sum_rightmost(term, site["fn"].event_dim)


class _NoteDraws(Messenger):
    """Notes the random numbers that Bernoulli sites start from, and keeps as many for partners."""

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[str, list[Tensor]] = {}

    def _pyro_sample(self, msg: Site) -> None:
        if _is_bernoulli_draw(msg):
            self.states[msg["name"]] = rng_state()
            msg["is_noted"] = True

    def _pyro_post_sample(self, msg: Site) -> None:
        if msg.pop("is_noted", False):  # not of the model's copy of the site
            msg["fn"].sample()


class _DrawPartners(Messenger):
    """Draws the partners of what Bernoulli sites drew in another run with the same numbers."""

    def __init__(self, draws: Draws, states: dict[str, list[Tensor]]) -> None:
        super().__init__()
        self.draws = draws
        self.states = states

    def _pyro_sample(self, msg: Site) -> None:
        name, fn = msg["name"], msg["fn"]
        if name not in self.draws or not _is_bernoulli_draw(msg):
            return
        if not is_rng_state(self.states[name]):
            raise OtherRandomNumbersError(
                "The two draws of an antithetic pair need the same noise, but before guide site "
                f"{name!r} the guide drew a different number of random values. Make it draw the "
                "same at each call."
            )
        fn.sample()  # what the other run made its draw of; the numbers after it were kept for this
        value = self.draws[name]["value"]
        logits = _logits(fn, value.shape)
        others = _logits(self.draws[name]["fn"], value.shape)
        # Waits for the device, as the host's own checks of values do.
        if is_validation_enabled() and not torch.allclose(logits, others, equal_nan=True):
            raise ValueError(
                f"The log-odds of guide site {name!r} depend on the draw of another discrete site, "
                "so that the two draws of an antithetic pair would not be of one distribution. "
                "Compute them from what is not discrete, or use VIMCO or OVIS, or RLOO for the "
                "ELBO."
            )
        msg["drawn_for"] = fn
        msg["fn"] = dist.Bernoulli(antithetic_probs(value, logits)).to_event(fn.event_dim)

    def _pyro_post_sample(self, msg: Site) -> None:
        if "drawn_for" in msg:
            msg["fn"] = msg.pop("drawn_for")


def _is_bernoulli_draw(msg: Site) -> bool:
    """Whether the site is about to draw, and from a Bernoulli distribution."""
    is_drawn = not (msg["done"] or msg["is_observed"] or is_subsample(msg))
    return is_drawn and _is_bernoulli(msg["fn"]) and not msg["fn"].has_rsample


def _bernoulli_draws(guide_trace: Trace, estimators: SiteEstimators) -> Draws:
    """The score-function sites, each of which has to be Bernoulli."""
    draws = {}
    for name, site in samples(guide_trace):
        if not is_score_site(site, estimators):
            continue
        if not _is_bernoulli(site["fn"]):
            raise ValueError(
                f"DisARM needs guide sites that are Bernoulli or reparameterised, but {name!r} "
                f"draws from {type(_base(site['fn'])).__name__}. Use VIMCO or OVIS, or RLOO for "
                "the ELBO, which take any discrete site."
            )
        draws[name] = site
    if not draws:
        names = sorted(name for name, site in samples(guide_trace) if not site["is_observed"])
        raise ValueError(
            "DisARM draws antithetic pairs at Bernoulli sites, but the guide has none (it samples "
            f"{names or 'nothing'}). Use IWAE, of which it would be the same twice."
        )
    return draws


def _is_bernoulli(fn: Any) -> bool:
    return isinstance(_base(fn), dist.Bernoulli)


def _logits(fn: Any, shape: torch.Size) -> Float[Tensor, " *shape"]:
    return _base(fn).logits.expand(shape)


def _base(fn: Any) -> Any:
    while isinstance(fn, (dist.Independent, dist.MaskedDistribution, dist.ExpandedDistribution)):
        fn = fn.base_dist
    return fn
