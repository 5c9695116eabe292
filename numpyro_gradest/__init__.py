"""Gradient estimators for variational inference in NumPyro."""

from numpyro_gradest import estimators
from numpyro_gradest.infer import IWAE, OVIS, VIMCO

__version__ = "0.1.0"

__all__ = ["IWAE", "OVIS", "VIMCO", "estimators"]
