"""Distributions that the host does not have."""

from pyro_gradest.distributions.implicit import Implicit
from pyro_gradest.distributions.one_hot_categorical import OneHotCategorical
from pyro_gradest.distributions.perturb_and_map import PerturbAndMAP

__all__ = ["Implicit", "OneHotCategorical", "PerturbAndMAP"]
