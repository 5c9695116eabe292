"""Distributions that the host does not have."""

from pyro_gradest.distributions.implicit import Implicit
from pyro_gradest.distributions.k_subset import KSubset
from pyro_gradest.distributions.one_hot_categorical import OneHotCategorical
from pyro_gradest.distributions.perturb_and_map import PerturbAndMAP
from pyro_gradest.distributions.plackett_luce import PlackettLuce
from pyro_gradest.distributions.plackett_luce_subset import PlackettLuceSubset
from pyro_gradest.distributions.spanning_tree import SpanningTree

__all__ = [
    "Implicit",
    "KSubset",
    "OneHotCategorical",
    "PerturbAndMAP",
    "PlackettLuce",
    "PlackettLuceSubset",
    "SpanningTree",
]
