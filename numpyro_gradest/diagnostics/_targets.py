"""What the gradient of an objective is an estimate of, by its class and options."""

import re
from typing import Any, NamedTuple

_BOUNDS = ("IWAE", "VIMCO", "OVIS", "NVIL", "RLOO", "DisARM")
_numpyro_ELBOS = ("Trace_ELBO", "TraceGraph_ELBO", "TraceMeanField_ELBO", "TraceEnum_ELBO")


class Target(NamedTuple):
    """A gradient, by what it is that of."""

    words: str
    num_particles: int | None
    """K, and the order, where it is the K-sample bound of an order; else ``None``."""
    alpha: float | None


def target_of(loss: Any) -> Target:
    """What the mean of a loss's gradient is the gradient of."""
    bound, name = bound_of(loss), type(loss).__name__
    if bound is None:
        return Target(_other(loss, name), None, None)
    if getattr(loss, "gamma", 0.0):
        return Target(f"{bound.words} plus {loss.gamma:g} times wake-phi", None, None)
    if getattr(loss, "reparam", None) == "stl" and bound.num_particles != 1:
        return Target(f"{bound.words} less the score of reparameterised sites", None, None)
    return bound


def words_at_any_number(target: Target) -> str:
    """What it is a gradient of, whatever the number of particles."""
    return re.sub(r"^\d+(?=-sample)|(?<=with )\d+(?= particles$)", "K", target.words)


def bound_of(loss: Any) -> Target | None:
    """The bound whose gradient a loss is meant to have, biased or not."""
    name = type(loss).__name__
    if _is_mixture(loss):
        return None
    if name in _numpyro_ELBOS:
        return _bound(1, 0.0)
    if name in _BOUNDS or name == "RenyiELBO":
        alpha = 1.0 if getattr(loss, "elbo_weight", 0.0) == 1 else float(loss.alpha)
        return _bound(loss.num_particles, alpha)
    return None


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
    if name == "ReweightedWakeSleep":
        return f"wake-sleep with {loss.num_particles} particles"
    if name == "TVO":
        ends = loss.partition
        which = ends if isinstance(ends, str) else ", ".join(f"{end:.2g}" for end in ends)
        return f"thermodynamic objective ({which})"
    return f"objective of {name}"
