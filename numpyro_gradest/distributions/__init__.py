"""Distributions that the host does not have."""

from numpyro_gradest.distributions.implicit import Implicit

__all__ = ["Implicit"]
