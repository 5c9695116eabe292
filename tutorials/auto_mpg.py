"""Fuel consumption of 392 real cars, UCI's Auto MPG, which ships inside the ``mlxtend`` package.

Seven features: cylinders, displacement, horsepower, weight, acceleration, year and origin. A tenth
of the cars is held out; features and target are standardised by the mean and standard deviation of
the others, and scores are given back in miles per gallon.
"""

from typing import NamedTuple

import numpy as np
from mlxtend.data import autompg_data
from scipy.special import logsumexp
from scipy.stats import norm

NUM_FEATURES = 7
NUM_HELD_OUT = 39
WEIGHT = 3
"""The column of a car's weight."""


class Split(NamedTuple):
    """Standardised features ``[N, 7]`` and miles per gallon ``[N]``, float32."""

    features: np.ndarray
    targets: np.ndarray
    held_out_features: np.ndarray
    held_out_targets: np.ndarray
    target_std: float
    """Miles per gallon of one standardised unit."""

    def scores(self, mean: np.ndarray, noise: np.ndarray) -> tuple[float, float]:
        """Log-likelihood per held-out car and root-mean-square error, in miles per gallon.

        Args:
            mean: The network's output for the held-out cars, one row for each of S posterior
                draws, ``[S, N]``.
            noise: Standard deviation of the noise in each draw, ``[S]``.
        """
        log_prob = norm.logpdf(self.held_out_targets, mean, noise[:, None])
        mixture = logsumexp(log_prob, axis=0) - np.log(len(mean)) - np.log(self.target_std)
        errors = mean.mean(axis=0) - self.held_out_targets
        return float(mixture.mean()), float(self.target_std * np.sqrt((errors**2).mean()))


def load_cars() -> tuple[np.ndarray, np.ndarray]:
    """Features ``[392, 7]`` and miles per gallon ``[392]``, as they were collected."""
    features, targets = autompg_data()
    return features[:, :NUM_FEATURES].astype(np.float32), targets.astype(np.float32)


def load_split(seed: int) -> Split:
    """The cars, divided at random by a seed."""
    features, targets = load_cars()
    order = np.random.default_rng(seed).permutation(len(targets))
    held_out, train = order[:NUM_HELD_OUT], order[NUM_HELD_OUT:]
    features, _ = _standardised(features, train)
    targets, std = _standardised(targets, train)
    arrays = features[train], targets[train], features[held_out], targets[held_out]
    return Split(*arrays, target_std=float(std))


def _standardised(values: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean, std = values[train].mean(axis=0), values[train].std(axis=0)
    return (values - mean) / std, std
