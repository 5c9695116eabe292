"""Distributions that the host does not have."""

from pyro_gradest.distributions.implicit import Implicit

__all__ = ["Implicit"]
