"""Scores of distributions that can only be sampled: grad log q estimated from draws of q."""

from pyro_gradest.estimators.score.entropy import entropy_surrogate
from pyro_gradest.estimators.score.kernels import IMQ, RBF, CurlFree, median_bandwidth
from pyro_gradest.estimators.score.knn_entropy import knn_entropy
from pyro_gradest.estimators.score.stein import SteinFit, fit_stein, stein_score
from pyro_gradest.estimators.score.whitening import Whitening, fit_whitening

__all__ = [
    "IMQ",
    "RBF",
    "CurlFree",
    "SteinFit",
    "Whitening",
    "entropy_surrogate",
    "fit_stein",
    "fit_whitening",
    "knn_entropy",
    "median_bandwidth",
    "stein_score",
]
