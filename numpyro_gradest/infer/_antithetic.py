"""Antithetic pairs: model and guide run twice, with Bernoulli draws that mirror each other."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro import distributions as dist
from numpyro.primitives import Messenger

from numpyro_gradest.estimators import antithetic_probs, antithetic_score
from numpyro_gradest.infer._implicit import inputs_by_output
from numpyro_gradest.infer._site_estimators import SiteEstimators, is_score_site
from numpyro_gradest.infer._sites import Site, Trace, samples
from numpyro_gradest.infer._trace import Program, trace_guide, trace_model, trace_particle


def trace_pair(program: Program, key: Array) -> tuple[tuple[Trace, Trace], tuple[Trace, Trace]]:
    """Trace model and guide at two draws that are antithetic, and otherwise of the same noise.

    Each Bernoulli site of the guide's notes its value in the other run as ``partner``.
    """
    model_key, guide_key = jax.random.split(key)
    model_trace, guide_trace = trace_particle(program, key)
    draws = _bernoulli_draws(guide_trace, program.estimators)
    _refuse_dependent(program, guide_key, draws)
    with _DrawPartners(draws):
        partner_trace = trace_guide(program, guide_key, {})
    for name in draws:
        guide_trace[name]["partner"] = partner_trace[name]["value"]
        partner_trace[name]["partner"] = guide_trace[name]["value"]
    partner_model_trace = trace_model(program, model_key, partner_trace)
    return (model_trace, guide_trace), (partner_model_trace, partner_trace)


def antithetic_term(site: Site) -> Float[Array, " *batch"]:
    """For a site with a partner: what its pair's learning signal multiplies the gradient of."""
    value = site["value"]
    logits = _logits(site["fn"], jnp.shape(value))
    score = antithetic_score(value, site["partner"], logits)
    # Log-odds may be infinite where the two draws agree.
    term = score * jnp.where(score == 0, 0.0, logits)
    return term.sum(tuple(range(-site["fn"].event_dim, 0)))


class _DrawPartners(Messenger):
    """Draws the partners of what Bernoulli sites drew in another run with the same keys."""

    def __init__(self, draws: dict[str, Array]) -> None:
        super().__init__()
        self.draws = draws

    def process_message(self, msg: Site) -> None:
        if msg["type"] != "sample" or msg["name"] not in self.draws:
            return
        fn, values = msg["fn"], self.draws[msg["name"]]
        probs = antithetic_probs(values, _logits(fn, jnp.shape(values)))
        msg["drawn_for"] = fn
        msg["fn"] = dist.BernoulliProbs(probs).to_event(fn.event_dim)
        # The site's own key is what the other run made its draw of.
        msg["kwargs"]["rng_key"] = jax.random.fold_in(msg["kwargs"]["rng_key"], 1)

    def postprocess_message(self, msg: Site) -> None:
        if "drawn_for" in msg:
            msg["fn"] = msg.pop("drawn_for")


def _bernoulli_draws(guide_trace: Trace, estimators: SiteEstimators) -> dict[str, Array]:
    """Draws of the score-function sites, each of which has to be Bernoulli."""
    draws = {}
    for name, site in samples(guide_trace):
        if not is_score_site(site, estimators):
            continue
        if not isinstance(_base(site["fn"]), (dist.BernoulliLogits, dist.BernoulliProbs)):
            raise ValueError(
                f"DisARM needs guide sites that are Bernoulli or reparameterised, but {name!r} "
                f"draws from {type(_base(site['fn'])).__name__}. Use VIMCO or OVIS, or RLOO for "
                "the ELBO, which take any discrete site."
            )
        if site.get("_control_flow_done", False):
            raise ValueError(
                f"DisARM can't tell whether the draws of guide site {name!r}, inside scan or cond, "
                "depend on each other. Draw it in a plate, or use VIMCO or OVIS, or RLOO for the "
                "ELBO."
            )
        draws[name] = site["value"]
    if not draws:
        names = sorted(name for name, site in samples(guide_trace) if not site["is_observed"])
        raise ValueError(
            "DisARM draws antithetic pairs at Bernoulli sites, but the guide has none (it samples "
            f"{names or 'nothing'}). Use IWAE, of which it would be the same twice."
        )
    return draws


def _refuse_dependent(program: Program, guide_key: Array, draws: dict[str, Array]) -> None:
    """Raise where log-odds depend on a draw: at the two draws of a pair they would differ."""
    if len(draws) == 1:
        return

    def logits(draws: dict[str, Array]) -> list[Array]:
        trace = trace_guide(program, guide_key, draws)
        return [_base(trace[name]["fn"]).logits for name in sorted(draws)]

    names = sorted(draws)  # as a dict is flattened
    needed = inputs_by_output(jax.make_jaxpr(logits)(draws).jaxpr)
    for name, inputs in zip(names, needed, strict=True):
        for i in sorted(inputs):
            raise ValueError(dependence(name, names[i]))


def dependence(name: str, parent: str) -> str:
    return (
        f"The log-odds of guide site {name!r} depend on the draw of {parent!r}, so that the two "
        "draws of an antithetic pair would not be of one distribution. Compute them from what is "
        "not discrete, or use VIMCO or OVIS, or RLOO for the ELBO."
    )


def _logits(fn: Any, shape: tuple[int, ...]) -> Float[Array, " *shape"]:
    return jnp.broadcast_to(_base(fn).logits, shape)


def _base(fn: Any) -> Any:
    while isinstance(fn, (dist.Independent, dist.MaskedDistribution, dist.ExpandedDistribution)):
        fn = fn.base_dist
    return fn
