"""Multi-sample objectives: an estimator is a function from log-weights to coefficients."""

from pyro_gradest.estimators.multisample.bounds import (
    effective_sample_size,
    iwae_bound,
    normalized_weights,
    renyi_bound,
)
from pyro_gradest.estimators.multisample.disarm import (
    antithetic_probs,
    antithetic_score,
    disarm_learning_signal,
)
from pyro_gradest.estimators.multisample.dreg import dreg_weights, wake_phi_dreg_weights
from pyro_gradest.estimators.multisample.nvil import (
    NVILState,
    initial_nvil_state,
    nvil_learning_signal,
    update_nvil_state,
)
from pyro_gradest.estimators.multisample.ovis import (
    ovis_gamma_learning_signal,
    ovis_mc_learning_signal,
)
from pyro_gradest.estimators.multisample.reinforce import (
    reinforce_learning_signal,
    reinforce_leave_one_out_learning_signal,
)
from pyro_gradest.estimators.multisample.renyi import renyi_learning_signal, renyi_weights
from pyro_gradest.estimators.multisample.surrogate import linear_surrogate
from pyro_gradest.estimators.multisample.thermodynamic import (
    moment_matching_partition,
    thermodynamic_bound,
    thermodynamic_learning_signal,
    thermodynamic_partition,
    thermodynamic_weights,
)
from pyro_gradest.estimators.multisample.vimco import vimco_learning_signal
from pyro_gradest.estimators.multisample.wake_sleep import wake_phi_learning_signal

__all__ = [
    "NVILState",
    "antithetic_probs",
    "antithetic_score",
    "disarm_learning_signal",
    "dreg_weights",
    "effective_sample_size",
    "initial_nvil_state",
    "iwae_bound",
    "linear_surrogate",
    "moment_matching_partition",
    "normalized_weights",
    "nvil_learning_signal",
    "ovis_gamma_learning_signal",
    "ovis_mc_learning_signal",
    "reinforce_learning_signal",
    "reinforce_leave_one_out_learning_signal",
    "renyi_bound",
    "renyi_learning_signal",
    "renyi_weights",
    "thermodynamic_bound",
    "thermodynamic_learning_signal",
    "thermodynamic_partition",
    "thermodynamic_weights",
    "update_nvil_state",
    "vimco_learning_signal",
    "wake_phi_dreg_weights",
    "wake_phi_learning_signal",
]
