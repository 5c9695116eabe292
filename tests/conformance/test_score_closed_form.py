"""Score estimators against densities whose score is known, with bands stated for each.

Two figures are averaged over replicates: the shrinkage c = -mean(g . (x - mean x)) / D, divided by
that of the true score, which says how far off a fitted guide's variance will be; and the error, the
root-mean-square distance to the true score relative to the latter's size. "Few" samples are 5 D. In
bands the first figure is a lower and an upper end, the second an upper end.
"""

import numpy as np
import pytest

from tests.conformance.test_score import ESTIMATORS
from tests.oracles import score as oracle


def gaussian(rng, num_replicates, num_samples, dim, correlation):
    covariance = (1 - correlation) * np.eye(dim) + correlation
    mean = np.arange(dim) - 1.0
    samples = rng.normal(size=(num_replicates, num_samples, dim)) @ np.linalg.cholesky(covariance).T
    samples = samples + mean
    return samples, np.array([oracle.gaussian_score(x, mean, covariance) for x in samples])


def mixture(rng, num_replicates, num_samples, means, scale, weights):
    component = rng.choice(len(means), p=weights, size=(num_replicates, num_samples))
    samples = means[component] + scale * rng.normal(size=(*component.shape, means.shape[1]))
    return samples, np.array([oracle.mixture_score(x, weights, means, scale) for x in samples])


TARGETS = {
    "gaussian-1d": lambda rng: gaussian(rng, 40, 100, 1, 0.0),
    "gaussian-4d": lambda rng: gaussian(rng, 40, 100, 4, 0.0),
    "gaussian-4d-correlated": lambda rng: gaussian(rng, 40, 100, 4, 0.9),
    "gaussian-16d": lambda rng: gaussian(rng, 10, 200, 16, 0.0),
    "gaussian-4d-few": lambda rng: gaussian(rng, 100, 20, 4, 0.0),
    "gaussian-16d-few": lambda rng: gaussian(rng, 20, 80, 16, 0.0),
    "two-modes-1d": lambda rng: mixture(
        rng, 40, 100, np.array([[-2.0], [2.0]]), 1.0, np.array([0.5, 0.5])
    ),
    "four-modes-2d": lambda rng: mixture(
        rng,
        20,
        200,
        np.array([[-2.0, -2.0], [-2.0, 2.0], [2.0, -2.0], [2.0, 2.0]]),
        1.0,
        np.array([0.125, 0.125, 0.5, 0.25]),
    ),
}

# estimator -> target -> (lowest c, highest c, largest error)
BANDS = {
    "stein": {
        "gaussian-1d": (0.98, 1.01, 1.58),
        "gaussian-4d": (0.95, 0.98, 1.18),
        "gaussian-4d-correlated": (0.95, 0.98, 1.17),
        "gaussian-16d": (0.92, 0.95, 0.78),
        "gaussian-4d-few": (0.85, 0.88, 1.36),
        "gaussian-16d-few": (0.86, 0.89, 0.77),
        "two-modes-1d": (0.96, 0.99, 0.83),
        "four-modes-2d": (1.00, 1.03, 0.68),
    },
    "spectral": {
        "gaussian-1d": (0.96, 0.99, 0.70),
        "gaussian-4d": (0.95, 0.98, 0.75),
        "gaussian-4d-correlated": (0.95, 0.98, 0.74),
        "gaussian-16d": (0.92, 0.95, 0.73),
        "gaussian-4d-few": (0.85, 0.88, 1.06),
        "gaussian-16d-few": (0.87, 0.90, 0.71),
        "two-modes-1d": (0.95, 0.98, 0.45),
        "four-modes-2d": (0.99, 1.02, 0.52),
    },
    "kde": {
        "gaussian-1d": (0.20, 0.23, 0.83),
        "gaussian-4d": (0.04, 0.07, 0.99),
        "gaussian-4d-correlated": (0.04, 0.07, 0.99),
        "gaussian-16d": (0.00, 0.03, 1.04),
        "gaussian-4d-few": (0.04, 0.07, 1.00),
        "gaussian-16d-few": (0.00, 0.03, 1.04),
        "two-modes-1d": (0.18, 0.21, 0.99),
        "four-modes-2d": (0.09, 0.12, 1.02),
    },
    "parametric-stein": {
        "gaussian-1d": (0.94, 0.97, 0.62),
        "gaussian-4d": (0.92, 0.95, 0.36),
        "gaussian-4d-correlated": (0.92, 0.95, 0.36),
        "gaussian-16d": (0.92, 0.95, 0.35),
        "gaussian-4d-few": (0.84, 0.87, 0.65),
        "gaussian-16d-few": (0.86, 0.89, 0.52),
        "two-modes-1d": (0.94, 0.97, 0.43),
        "four-modes-2d": (0.92, 0.95, 0.57),
    },
    "score-matching": {
        "gaussian-1d": (0.97, 1.00, 0.78),
        "gaussian-4d": (0.99, 1.02, 0.36),
        "gaussian-4d-correlated": (0.99, 1.02, 0.36),
        "gaussian-16d": (0.99, 1.02, 0.36),
        "gaussian-4d-few": (1.03, 1.06, 0.78),
        "gaussian-16d-few": (1.00, 1.03, 0.58),
        "two-modes-1d": (0.96, 0.99, 0.50),
        "four-modes-2d": (1.02, 1.05, 0.45),
    },
    "kernel-exponential-family": {
        "gaussian-1d": (0.92, 0.95, 2.14),
        "gaussian-4d": (0.91, 0.94, 1.58),
        "gaussian-4d-correlated": (0.91, 0.94, 1.57),
        "gaussian-16d": (0.95, 0.98, 0.94),
        "gaussian-4d-few": (0.77, 0.80, 1.64),
        "gaussian-16d-few": (0.92, 0.95, 0.92),
        "two-modes-1d": (0.92, 0.95, 1.10),
        "four-modes-2d": (0.98, 1.01, 0.86),
    },
    "nu-method": {
        "gaussian-1d": (0.94, 0.97, 2.14),
        "gaussian-4d": (0.92, 0.95, 1.46),
        "gaussian-4d-correlated": (0.92, 0.95, 1.45),
        "gaussian-16d": (0.95, 0.98, 0.78),
        "gaussian-4d-few": (0.80, 0.83, 2.45),
        "gaussian-16d-few": (0.92, 0.95, 1.00),
        "two-modes-1d": (0.93, 0.96, 1.10),
        "four-modes-2d": (0.99, 1.02, 0.72),
    },
}


def figures(samples, actual, desired):
    """Relative shrinkage and error."""
    centred = samples - samples.mean(axis=1, keepdims=True)
    shrinkage = np.sum(actual * centred) / np.sum(desired * centred)
    error = np.sqrt(np.mean((actual - desired) ** 2) / np.mean(desired**2))
    return shrinkage, error


@pytest.mark.parametrize(("name", "target"), [(n, t) for n in ESTIMATORS for t in TARGETS])
def test_error_bands(backend, name, target):
    samples, desired = TARGETS[target](np.random.default_rng(0))
    function = getattr(backend.estimators, ESTIMATORS[name][0])

    actual = backend.numpy(function(backend.array(samples)))

    shrinkage, error = figures(samples, actual, desired)
    lowest, highest, largest_error = BANDS[name][target]
    assert lowest < shrinkage < highest
    assert error < largest_error
