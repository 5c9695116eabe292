"""Discrete states: draws by maximising under noise, and gradients through them."""

from numpyro_gradest.estimators.discrete.adaptive_imle import AdaptiveIMLE, AdaptiveState
from numpyro_gradest.estimators.discrete.combinatorial import (
    assignment,
    shortest_path,
    spanning_tree,
)
from numpyro_gradest.estimators.discrete.imle import IMLE
from numpyro_gradest.estimators.discrete.noise import (
    GaussianNoise,
    GumbelNoise,
    LogisticNoise,
    Noise,
    SumOfGammaNoise,
)
from numpyro_gradest.estimators.discrete.perturb_and_map import perturb_and_map
from numpyro_gradest.estimators.discrete.solvers import (
    Solver,
    numpy_solver,
    one_hot_argmax,
    ranking,
    threshold,
    top_k,
)
from numpyro_gradest.estimators.discrete.straight_through import (
    SIMPLE,
    GumbelSoftmaxST,
    ReinMax,
    StraightThrough,
)

__all__ = [
    "IMLE",
    "SIMPLE",
    "AdaptiveIMLE",
    "AdaptiveState",
    "GaussianNoise",
    "GumbelNoise",
    "GumbelSoftmaxST",
    "LogisticNoise",
    "Noise",
    "ReinMax",
    "Solver",
    "StraightThrough",
    "SumOfGammaNoise",
    "assignment",
    "numpy_solver",
    "one_hot_argmax",
    "perturb_and_map",
    "ranking",
    "shortest_path",
    "spanning_tree",
    "threshold",
    "top_k",
]
