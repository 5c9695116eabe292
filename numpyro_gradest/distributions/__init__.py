"""Distributions that the host does not have."""

from numpyro_gradest.distributions.implicit import Implicit
from numpyro_gradest.distributions.one_hot_categorical import OneHotCategorical
from numpyro_gradest.distributions.perturb_and_map import PerturbAndMAP

__all__ = ["Implicit", "OneHotCategorical", "PerturbAndMAP"]
