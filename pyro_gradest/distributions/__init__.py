"""Distributions that the host does not have."""

from pyro_gradest.distributions.implicit import Implicit
from pyro_gradest.distributions.one_hot_categorical import OneHotCategorical

__all__ = ["Implicit", "OneHotCategorical"]
