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
from pyro_gradest.distributions import Implicit
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
    "IWAE",
    "NVIL",
    "OVIS",
    "RLOO",
    "TVO",
    "VIMCO",
    "AutoImplicit",
    "EstimatorComparison",
    "GradientStatistics",
    "Implicit",
    "ImplicitELBO",
    "ImplicitFitReport",
    "ImplicitSitesCheck",
    "ImportanceSamples",
    "ReweightedWakeSleep",
    "SemiImplicitELBO",
    "check_implicit_fit",
    "compare_estimators",
    "estimators",
    "gradient_statistics",
    "importance_samples",
    "plot_bias_and_variance",
    "plot_snr_against_particles",
    "plot_snr_per_second",
]
