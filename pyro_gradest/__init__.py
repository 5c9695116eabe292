"""Gradient estimators for variational inference in Pyro."""

from pyro_gradest import estimators
from pyro_gradest.diagnostics import ImplicitFitReport, ImplicitSitesCheck, check_implicit_fit
from pyro_gradest.distributions import (
    Implicit,
    KSubset,
    PlackettLuce,
    PlackettLuceSubset,
    SpanningTree,
)
from pyro_gradest.infer import (
    IWAE,
    OVIS,
    VIMCO,
    AutoImplicit,
    ImplicitELBO,
    ImportanceSamples,
    ReweightedWakeSleep,
    SemiImplicitELBO,
    importance_samples,
)

__version__ = "0.1.0"

__all__ = [
    "IWAE",
    "OVIS",
    "VIMCO",
    "AutoImplicit",
    "Implicit",
    "ImplicitELBO",
    "ImplicitFitReport",
    "ImplicitSitesCheck",
    "ImportanceSamples",
    "KSubset",
    "PlackettLuce",
    "PlackettLuceSubset",
    "ReweightedWakeSleep",
    "SemiImplicitELBO",
    "SpanningTree",
    "check_implicit_fit",
    "estimators",
    "importance_samples",
]
