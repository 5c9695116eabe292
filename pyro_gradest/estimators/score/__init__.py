"""Scores of distributions that can only be sampled: grad log q estimated from draws of q."""

from pyro_gradest.estimators.score.calibration import calibrate_score
from pyro_gradest.estimators.score.entropy import entropy_surrogate
from pyro_gradest.estimators.score.exponential_family import (
    CurlFreeFit,
    fit_kernel_exponential_family,
    kernel_exponential_family_score,
)
from pyro_gradest.estimators.score.kde import KDEFit, fit_kde, kde_score
from pyro_gradest.estimators.score.kernels import IMQ, RBF, CurlFree, median_bandwidth
from pyro_gradest.estimators.score.knn_entropy import knn_entropy
from pyro_gradest.estimators.score.nu_method import fit_nu_method, nu_method_score
from pyro_gradest.estimators.score.parametric import (
    ParametricFit,
    fit_parametric_stein,
    fit_score_matching,
    parametric_stein_score,
    score_matching_score,
)
from pyro_gradest.estimators.score.sliced_wasserstein import sliced_wasserstein
from pyro_gradest.estimators.score.spectral import SpectralFit, fit_spectral, spectral_score
from pyro_gradest.estimators.score.stein import SteinFit, fit_stein, stein_score
from pyro_gradest.estimators.score.stein_discrepancy import kernel_stein_discrepancy
from pyro_gradest.estimators.score.stein_identity import shrinkage, stein_identity
from pyro_gradest.estimators.score.whitening import Whitening, fit_whitening

__all__ = [
    "IMQ",
    "RBF",
    "CurlFree",
    "CurlFreeFit",
    "KDEFit",
    "ParametricFit",
    "SpectralFit",
    "SteinFit",
    "Whitening",
    "calibrate_score",
    "entropy_surrogate",
    "fit_kde",
    "fit_kernel_exponential_family",
    "fit_nu_method",
    "fit_parametric_stein",
    "fit_score_matching",
    "fit_spectral",
    "fit_stein",
    "fit_whitening",
    "kde_score",
    "kernel_exponential_family_score",
    "kernel_stein_discrepancy",
    "knn_entropy",
    "median_bandwidth",
    "nu_method_score",
    "parametric_stein_score",
    "score_matching_score",
    "shrinkage",
    "sliced_wasserstein",
    "spectral_score",
    "stein_identity",
    "stein_score",
]
