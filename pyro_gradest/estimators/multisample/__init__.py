"""Multi-sample objectives: an estimator is a function from log-weights to coefficients."""

from pyro_gradest.estimators.multisample.bounds import (
    effective_sample_size,
    iwae_bound,
    normalized_weights,
    renyi_bound,
)
from pyro_gradest.estimators.multisample.dreg import dreg_weights, wake_phi_dreg_weights
from pyro_gradest.estimators.multisample.ovis import (
    ovis_gamma_learning_signal,
    ovis_mc_learning_signal,
)
from pyro_gradest.estimators.multisample.reinforce import reinforce_learning_signal
from pyro_gradest.estimators.multisample.surrogate import linear_surrogate
from pyro_gradest.estimators.multisample.vimco import vimco_learning_signal
from pyro_gradest.estimators.multisample.wake_sleep import wake_phi_learning_signal

__all__ = [
    "dreg_weights",
    "effective_sample_size",
    "iwae_bound",
    "linear_surrogate",
    "normalized_weights",
    "ovis_gamma_learning_signal",
    "ovis_mc_learning_signal",
    "reinforce_learning_signal",
    "renyi_bound",
    "vimco_learning_signal",
    "wake_phi_dreg_weights",
    "wake_phi_learning_signal",
]
