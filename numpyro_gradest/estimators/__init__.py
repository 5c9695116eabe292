"""Layer 1: arrays in, arrays out. Nothing here knows what a model, a site or a plate is."""

from numpyro_gradest.estimators.multisample import (
    effective_sample_size,
    iwae_bound,
    linear_surrogate,
    normalized_weights,
    ovis_gamma_learning_signal,
    ovis_mc_learning_signal,
    reinforce_learning_signal,
    renyi_bound,
    vimco_learning_signal,
    wake_phi_learning_signal,
)
from numpyro_gradest.estimators.score import (
    IMQ,
    RBF,
    CurlFree,
    SteinFit,
    Whitening,
    entropy_surrogate,
    fit_stein,
    fit_whitening,
    median_bandwidth,
    stein_score,
)

__all__ = [
    "IMQ",
    "RBF",
    "CurlFree",
    "SteinFit",
    "Whitening",
    "effective_sample_size",
    "entropy_surrogate",
    "fit_stein",
    "fit_whitening",
    "iwae_bound",
    "linear_surrogate",
    "median_bandwidth",
    "normalized_weights",
    "ovis_gamma_learning_signal",
    "ovis_mc_learning_signal",
    "reinforce_learning_signal",
    "renyi_bound",
    "stein_score",
    "vimco_learning_signal",
    "wake_phi_learning_signal",
]
