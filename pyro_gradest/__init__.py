"""Gradient estimators for variational inference in Pyro."""

from pyro_gradest import estimators
from pyro_gradest.diagnostics import ImplicitFitReport, ImplicitSitesCheck, check_implicit_fit
from pyro_gradest.distributions import Implicit, OneHotCategorical, PerturbAndMAP
from pyro_gradest.estimators import (
    IMLE,
    SIMPLE,
    AdaptiveIMLE,
    GumbelSoftmaxST,
    ReinMax,
    StraightThrough,
)
from pyro_gradest.handlers import imle
from pyro_gradest.diagnostics import (
    EstimatorComparison,
    GradientStatistics,
    ImplicitFitReport,
    ImplicitSitesCheck,
    check_implicit_fit,
    compare_estimators,
    gradient_statistics,
    plot_bias_and_variance,
    plot_snr_against_particles,
    plot_snr_per_second,
from pyro_gradest.distributions import Implicit
from pyro_gradest.distributions import (
    Implicit,
    KSubset,
    PlackettLuce,
    PlackettLuceSubset,
    SpanningTree,
from pyro_gradest.infer import (
    IWAE,
    NVIL,
    OVIS,
    RLOO,
    TVO,
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
    "IMLE",
    "IWAE",
    "NVIL",
    "OVIS",
    "RLOO",
    "SIMPLE",
    "TVO",
    "VIMCO",
    "AdaptiveIMLE",
    "AutoImplicit",
    "GumbelSoftmaxST",
    "EstimatorComparison",
    "GradientStatistics",
    "Implicit",
    "ImplicitELBO",
    "ImplicitFitReport",
    "ImplicitSitesCheck",
    "ImportanceSamples",
    "OneHotCategorical",
    "PerturbAndMAP",
    "ReinMax",
    "ReweightedWakeSleep",
    "SemiImplicitELBO",
    "StraightThrough",
    "KSubset",
    "PlackettLuce",
    "PlackettLuceSubset",
    "SpanningTree",
    "check_implicit_fit",
    "compare_estimators",
    "estimators",
    "imle",
    "gradient_statistics",
    "importance_samples",
    "plot_bias_and_variance",
    "plot_snr_against_particles",
    "plot_snr_per_second",
]
