"""What the gradient of an objective is an estimate of: by its class, its options and its sites."""

import re
from dataclasses import fields
from typing import Any, NamedTuple

from numpyro_gradest.estimators import ovis_gamma_learning_signal
from numpyro_gradest.infer._discrete_sites import CARRIED, has_density
from numpyro_gradest.infer._site_estimators import SiteEstimators, is_learning_signal, unwrapped
from numpyro_gradest.infer._sites import Site, own_estimator

_BOUNDS = ("IWAE", "VIMCO", "OVIS", "NVIL", "RLOO", "DisARM")
_numpyro_ELBOS = ("Trace_ELBO", "TraceGraph_ELBO", "TraceMeanField_ELBO", "TraceEnum_ELBO")
Sites = dict[str, Site]
_ON_PATH = ("pathwise", "dreg", "stl")


class Target(NamedTuple):
    """A gradient, by what it is that of."""

    words: str
    num_particles: int | None
    """K, and the order, where it is the K-sample bound of an order; else ``None``."""
    alpha: float | None


def target_of(loss: Any, guide_sites: Sites) -> Target:
    """What the mean of a loss's gradient is the gradient of, with the guide's sites as they are."""
    bound = bound_of(loss)
    departing = _in_words(loss, guide_sites)
    if bound is not None and not departing:
        return bound
    words = _other(loss, type(loss).__name__) if bound is None else bound.words
    return Target(" ".join([words, *departing]), None, None)


def words_at_any_number(target: Target) -> str:
    """What it is a gradient of, whatever the number of particles."""
    return re.sub(r"^\d+(?=-sample)|(?<=with )\d+(?= particles)", "K", target.words)


def bound_of(loss: Any) -> Target | None:
    """The bound whose gradient a loss is meant to have, biased or not."""
    name = type(loss).__name__
    if _is_mixture(loss):
        return None
    if name in _numpyro_ELBOS:
        return _bound(1, 0.0)
    if name == "RenyiELBO" or (name in _BOUNDS and _is_ours(loss)):
        alpha = 1.0 if getattr(loss, "elbo_weight", 0.0) == 1 else float(loss.alpha)
        return _bound(loss.num_particles, alpha)
    return None


def departures(loss: Any, guide_sites: Sites) -> dict[str, str]:
    """The sites whose gradient has not the mean that the target's has, and in what it departs."""
    bound, gamma = bound_of(loss), getattr(loss, "gamma", 0.0)
    num_particles = getattr(bound or loss, "num_particles", 1)
    found = {}
    for name, estimator, site in _draws(loss, guide_sites):
        if estimator in _ON_PATH and CARRIED in site:
            found[name] = f"by {_short(site[CARRIED].estimator)}"
        elif estimator == "stl" and num_particles != 1:
            found[name] = "less the score of reparameterised sites"
        elif estimator == "score" and gamma:
            found[name] = _plus_wake_phi(gamma)
        elif not isinstance(estimator, str):
            function, options = unwrapped(estimator)
            if function is ovis_gamma_learning_signal:
                if options.get("gamma", 0.0):
                    found[name] = _plus_wake_phi(options["gamma"])
            elif not is_learning_signal(function):
                found[name] = f"by {_own_words(estimator)}"
    return found


def choices_for_reference(loss: Any, guide_sites: Sites, *, is_host: bool) -> dict[str, Any]:
    """What sites get in place of what they chose, so that a loss run for long is its own mean.

    ``is_host`` says that the loss stands for one of the host's, under which no choice counts but
    that of a gradient to carry.
    """
    departing = {} if is_host else departures(loss, guide_sites)
    chosen: dict[str, Any] = {}
    for name, site in guide_sites.items():
        own = own_estimator(site)
        if CARRIED in site:
            chosen |= {name: None} if has_density(site) else {}
        elif own is not None and (is_host or name in departing):
            chosen[name] = None if is_host or own == "stl" else "score"
    return chosen


def _draws(loss: Any, guide_sites: Sites) -> list[tuple[str, Any, Site]]:
    """The guide's draws, each with its name and estimator."""
    # The host's losses ask no site, but differentiate along every path that there is.
    estimators = SiteEstimators.of(loss) if _is_ours(loss) else SiteEstimators("pathwise")
    draws = [(name, estimators.at(site), site) for name, site in guide_sites.items()]
    return [draw for draw in draws if draw[1] is not None]


def _in_words(loss: Any, guide_sites: Sites) -> list[str]:
    """In what the sites depart, those of all draws of their kind without the names."""
    found = departures(loss, guide_sites)
    is_on_path = {name: kind in _ON_PATH for name, kind, _ in _draws(loss, guide_sites)}
    words: list[str] = []
    for words_of_site in dict.fromkeys(found.values()):
        sites = [name for name, other in found.items() if other == words_of_site]
        peers = [name for name in is_on_path if is_on_path[name] == is_on_path[sites[0]]]
        where = "" if sites == peers else f" at {', '.join(sites)}"
        words.append(f"{'and ' if words else ''}{words_of_site}{where}")
    return words


def _plus_wake_phi(gamma: float) -> str:
    return f"plus {gamma:g} times wake-phi"


def _short(estimator: Any) -> str:
    """An estimator with those of its options that are not the default."""
    given = {}
    for field in fields(estimator):
        if (value := getattr(estimator, field.name)) != field.default:
            given[field.name] = value
    return f"{type(estimator).__name__}({_listed(given)})"


def _own_words(signal: Any) -> str:
    function, options = unwrapped(signal)
    name = getattr(function, "__name__", type(function).__name__)
    return f"{name}({_listed(options)})" if options else name


def _listed(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _is_ours(loss: Any) -> bool:
    """Whether it is a loss of this package, whatever its name."""
    return hasattr(loss, "_reparams")


def _is_mixture(loss: Any) -> bool:
    """Whether it mixes two bounds, or has one for the model and another for the guide."""
    is_pooled = getattr(loss, "pool_replicates", False) and loss.num_replicates > 1
    return is_pooled or 0 < getattr(loss, "elbo_weight", 0.0) < 1


def _bound(num_particles: int, alpha: float) -> Target:
    if num_particles == 1 or alpha == 1:
        return Target("ELBO", 1, 0.0)
    order = f" of order {alpha:g}" if alpha else ""
    return Target(f"{num_particles}-sample bound{order}", num_particles, alpha)


def _other(loss: Any, name: str) -> str:
    if _is_mixture(loss):
        words = _bound(loss.num_particles, float(loss.alpha)).words
        if loss.pool_replicates:
            words += f" (the model's over {loss.num_replicates} times as many)"
        weight = loss.elbo_weight
        return f"{words} and ELBO, {1 - weight:g} to {weight:g}" if weight else words
    if name == "ReweightedWakeSleep" and _is_ours(loss):
        return f"wake-sleep with {loss.num_particles} particles"
    if name == "TVO":
        ends = loss.partition
        which = ends if isinstance(ends, str) else ", ".join(f"{end:.2g}" for end in ends)
        return f"thermodynamic objective ({which})"
    number = 1 if _is_ours(loss) else getattr(loss, "num_particles", 1)
    return f"objective of {name}" + (f" with {number} particles" if number > 1 else "")
