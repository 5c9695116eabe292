"""Distributions that the host does not have."""

from numpyro_gradest.distributions.implicit import Implicit
from numpyro_gradest.distributions.k_subset import KSubset
from numpyro_gradest.distributions.one_hot_categorical import OneHotCategorical
from numpyro_gradest.distributions.perturb_and_map import PerturbAndMAP
from numpyro_gradest.distributions.plackett_luce import PlackettLuce
from numpyro_gradest.distributions.plackett_luce_subset import PlackettLuceSubset
from numpyro_gradest.distributions.spanning_tree import SpanningTree

__all__ = [
    "Implicit",
    "KSubset",
    "OneHotCategorical",
    "PerturbAndMAP",
    "PlackettLuce",
    "PlackettLuceSubset",
    "SpanningTree",
]
