"""Gradient estimators for variational inference in NumPyro."""

from numpyro_gradest import estimators
from numpyro_gradest.diagnostics import ImplicitFitReport, ImplicitSitesCheck, check_implicit_fit
from numpyro_gradest.distributions import Implicit, OneHotCategorical, PerturbAndMAP
from numpyro_gradest.estimators import (
    IMLE,
    SIMPLE,
    AdaptiveIMLE,
    GumbelSoftmaxST,
    ReinMax,
    StraightThrough,
)
from numpyro_gradest.handlers import adapt_imle, imle
from numpyro_gradest.diagnostics import (
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
from numpyro_gradest.distributions import Implicit
from numpyro_gradest.distributions import (
    Implicit,
    KSubset,
    PlackettLuce,
    PlackettLuceSubset,
    SpanningTree,
from numpyro_gradest.infer import (
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
    "adapt_imle",
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
