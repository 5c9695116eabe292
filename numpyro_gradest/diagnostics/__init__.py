"""Layer 3: whether a fit can be trusted, and which gradient estimator to fit with."""

from numpyro_gradest.diagnostics.gradient_plots import (
    plot_bias_and_variance,
    plot_snr_against_particles,
    plot_snr_per_second,
)
from numpyro_gradest.diagnostics.gradient_report import EstimatorComparison, GradientStatistics
from numpyro_gradest.diagnostics.gradient_statistics import compare_estimators, gradient_statistics
from numpyro_gradest.diagnostics.implicit_fit import check_implicit_fit
from numpyro_gradest.diagnostics.implicit_report import ImplicitFitReport, ImplicitSitesCheck
from numpyro_gradest.diagnostics.training_monitor import TrainingMetrics, TrainingMonitor

__all__ = [
    "EstimatorComparison",
    "GradientStatistics",
    "ImplicitFitReport",
    "ImplicitSitesCheck",
    "TrainingMetrics",
    "TrainingMonitor",
    "check_implicit_fit",
    "compare_estimators",
    "gradient_statistics",
    "plot_bias_and_variance",
    "plot_snr_against_particles",
    "plot_snr_per_second",
]
