"""Layer 2: model and guide in, a loss for SVI out."""

from pyro_gradest.infer.auto_implicit import AutoImplicit
from pyro_gradest.infer.disarm import DisARM
from pyro_gradest.infer.implicit_elbo import ImplicitELBO
from pyro_gradest.infer.importance_samples import ImportanceSamples, importance_samples
from pyro_gradest.infer.iwae import IWAE
from pyro_gradest.infer.multisample_elbo import MultiSampleELBO
from pyro_gradest.infer.nvil import NVIL
from pyro_gradest.infer.ovis import OVIS
from pyro_gradest.infer.reweighted_wake_sleep import ReweightedWakeSleep
from pyro_gradest.infer.rloo import RLOO
from pyro_gradest.infer.semi_implicit_elbo import SemiImplicitELBO
from pyro_gradest.infer.tvo import TVO
from pyro_gradest.infer.vimco import VIMCO

__all__ = [
    "IWAE",
    "NVIL",
    "OVIS",
    "RLOO",
    "TVO",
    "VIMCO",
    "AutoImplicit",
    "DisARM",
    "ImplicitELBO",
    "ImportanceSamples",
    "MultiSampleELBO",
    "ReweightedWakeSleep",
    "SemiImplicitELBO",
    "importance_samples",
]
