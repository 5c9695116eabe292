"""Gradient estimators for variational inference in Pyro."""

from pyro_gradest import estimators
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
)
from pyro_gradest.distributions import (
    Implicit,
    KSubset,
    OneHotCategorical,
    PerturbAndMAP,
    PlackettLuce,
    PlackettLuceSubset,
    SpanningTree,
)
from pyro_gradest.estimators import (
    IMLE,
    SIMPLE,
    AdaptiveIMLE,
    GumbelSoftmaxST,
    ReinMax,
    StraightThrough,
)
from pyro_gradest.handlers import imle
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
    "EstimatorComparison",
    "GradientStatistics",
    "GumbelSoftmaxST",
    "Implicit",
    "ImplicitELBO",
    "ImplicitFitReport",
    "ImplicitSitesCheck",
    "ImportanceSamples",
    "KSubset",
    "OneHotCategorical",
    "PerturbAndMAP",
    "PlackettLuce",
    "PlackettLuceSubset",
    "ReinMax",
    "ReweightedWakeSleep",
    "SemiImplicitELBO",
    "SpanningTree",
    "StraightThrough",
    "check_implicit_fit",
    "compare_estimators",
    "estimators",
    "gradient_statistics",
    "imle",
    "importance_samples",
    "plot_bias_and_variance",
    "plot_snr_against_particles",
    "plot_snr_per_second",
]
