"""Layer 2: model and guide in, a loss for SVI out."""

from numpyro_gradest.infer.auto_implicit import AutoImplicit
from numpyro_gradest.infer.disarm import DisARM
from numpyro_gradest.infer.implicit_elbo import ImplicitELBO
from numpyro_gradest.infer.importance_samples import ImportanceSamples, importance_samples
from numpyro_gradest.infer.iwae import IWAE
from numpyro_gradest.infer.multisample_elbo import MultiSampleELBO
from numpyro_gradest.infer.nvil import NVIL
from numpyro_gradest.infer.ovis import OVIS
from numpyro_gradest.infer.reweighted_wake_sleep import ReweightedWakeSleep
from numpyro_gradest.infer.rloo import RLOO
from numpyro_gradest.infer.semi_implicit_elbo import SemiImplicitELBO
from numpyro_gradest.infer.tvo import TVO
from numpyro_gradest.infer.vimco import VIMCO

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
