"""Score estimators in float32, on degenerate samples, and what they cost in memory and operations.

The truth is the float64 oracle, or the package itself in float64 at the float32 samples.
"""

from functools import partial

import numpy as np
import pytest

from tests.conformance.test_score import ESTIMATORS

every_estimator = pytest.mark.parametrize("name", ESTIMATORS)


def estimates(backend, name, samples, **options):
    """Scores at the samples, and at points near to and far from them."""
    function, fit, _ = ESTIMATORS[name]
    scores = getattr(backend.estimators, function)(backend.array(samples), **options)
    fitted = getattr(backend.estimators, fit)(backend.array(samples), **options)
    points = np.concatenate([samples[..., :2, :], 1e3 * samples[..., :1, :]], axis=-2)
    return backend.numpy(scores), backend.numpy(fitted.score(backend.array(points)))


def coinciding(rng):
    return np.full((6, 2), 0.1)  # the mean of six 0.1 is not 0.1


def coinciding_far_away(rng):
    return np.full((6, 2), 1e8 / 3)


def all_but_one_coincide(rng):
    samples = np.full((20, 2), 0.1)
    samples[-1] = 1.0
    return samples


def in_pairs(rng):
    return np.repeat(rng.normal(size=(10, 2)), 2, axis=0)


def two(rng):
    return np.array([[0.0, 0.0], [1.0, 2.0]])


def on_a_line(rng):
    return rng.normal(size=(20, 1)) * np.array([[1.0, 2.0]])


def constant_coordinate(rng):
    return np.concatenate([rng.normal(size=(20, 1)), np.full((20, 1), 0.1)], axis=1)


def tiny(rng):
    return 1e-25 * rng.normal(size=(20, 2))


def huge(rng):
    return 1e25 * rng.normal(size=(20, 2))


def of_different_scales(rng):
    return rng.normal(size=(20, 2)) * np.array([1e-3, 1e3])


def with_an_outlier(rng):
    samples = rng.normal(size=(20, 2))
    samples[0] = 1e4
    return samples


def far_apart_clusters(rng):
    return rng.normal(size=(20, 2)) + 1e4 * (np.arange(20) % 2)[:, None]


HARD = [
    coinciding,
    coinciding_far_away,
    all_but_one_coincide,
    in_pairs,
    two,
    on_a_line,
    constant_coordinate,
    tiny,
    huge,
    of_different_scales,
    with_an_outlier,
    far_apart_clusters,
]


@pytest.mark.parametrize("kernel", ["RBF", "IMQ"])
@pytest.mark.parametrize("make", HARD, ids=lambda make: make.__name__)
@every_estimator
def test_finite_in_float32(backend, name, make, kernel):
    samples = make(np.random.default_rng(0)).astype(np.float32)
    kernel = getattr(backend.estimators, kernel)()

    for estimate in estimates(backend, name, samples, kernel=kernel):
        assert estimate.dtype == np.float32
        assert np.isfinite(estimate).all()


@pytest.mark.parametrize("make", [coinciding, coinciding_far_away], ids=lambda make: make.__name__)
@every_estimator
def test_coinciding_samples_have_score_zero(backend, name, make):
    samples = make(np.random.default_rng(0)).astype(np.float32)

    scores, elsewhere = estimates(backend, name, samples)

    np.testing.assert_array_equal(scores, 0.0)
    np.testing.assert_array_equal(elsewhere[:2], 0.0)


@every_estimator
def test_a_constant_coordinate_has_score_zero(backend, name):
    samples = constant_coordinate(np.random.default_rng(0))

    scores, _ = estimates(backend, name, samples)

    np.testing.assert_array_equal(scores[:, 1], 0.0)
    # Estimators that count dimensions, by a divergence or a Laplacian, still count this one.
    if name in ("stein", "spectral", "kde", "parametric-stein"):
        alone, _ = estimates(backend, name, samples[:, :1])
        np.testing.assert_allclose(scores[:, :1], alone, atol=1e-7)


# Largest error in float32, relative to the largest score: at N = 100 the kernel matrix with a ridge
# of 0.01 has a condition number near 1e4.
ERRORS_IN_FLOAT32 = {
    "stein": 2e-3,
    "spectral": 2e-3,
    "kde": 2e-3,
    "parametric-stein": 2e-3,
    "score-matching": 2e-3,
    "kernel-exponential-family": 2e-3,
    "nu-method": 2e-3,
}


@pytest.mark.parametrize("offset", [0.0, 100.0])
@every_estimator
def test_float32_agrees_with_float64(backend, name, offset):
    # Squared distances of raw samples at an offset of 100 would have errors of 24 %.
    samples = (offset + np.random.default_rng(0).normal(size=(100, 2))).astype(np.float32)

    scores, _ = estimates(backend, name, samples)
    desired, _ = estimates(backend, name, samples.astype(np.float64))

    error = np.abs(scores - desired).max() / np.abs(desired).max()
    assert error < ERRORS_IN_FLOAT32[name]


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_whitened_score_does_not_depend_on_the_scale_in_float32(backend, scale):
    samples = np.random.default_rng(0).normal(size=(30, 2)).astype(np.float32)

    scores, _ = estimates(backend, "stein", samples)
    scaled, _ = estimates(backend, "stein", np.float32(scale) * samples)

    np.testing.assert_allclose(scaled * np.float32(scale), scores, atol=1e-4 * scores.max())


def test_smallest_ridge_of_float32_survives_a_thousand_coinciding_pairs(backend):
    samples = np.repeat(np.random.default_rng(0).normal(size=(500, 2)), 2, axis=0)

    scores, _ = estimates(backend, "stein", samples.astype(np.float32), ridge=1e-3)

    assert np.isfinite(scores).all()


# Cost


@every_estimator
def test_no_array_over_pairs_and_dimensions(backend, name):
    num_samples, dim = 50, 7
    samples = backend.array(np.random.default_rng(0).normal(size=(num_samples, dim)))
    fit = getattr(backend.estimators, ESTIMATORS[name][1])

    largest = backend.largest_intermediate(lambda x: fit(x).score(x), samples)

    assert largest == num_samples**2


# Operations of the batched estimate: factorisations of [N, N] and [D, D] (whitening).
FACTORISATIONS = {
    "stein": {"cholesky": 2, "eigh": 0},
    "spectral": {"cholesky": 1, "eigh": 1},
    "kde": {"cholesky": 1, "eigh": 0},
    "parametric-stein": {"cholesky": 2, "eigh": 0},
    "score-matching": {"cholesky": 2, "eigh": 0},
    "kernel-exponential-family": {"cholesky": 1, "eigh": 0},
    "nu-method": {"cholesky": 1, "eigh": 0},
}


@every_estimator
def test_factorisations_are_batched_and_few(backend, name):
    function = getattr(backend.estimators, ESTIMATORS[name][0])
    samples = backend.array(np.random.default_rng(0).normal(size=(5, 12, 2)))

    operations = backend.operations(function, samples)

    for factorisation, count in FACTORISATIONS[name].items():
        found = [one for one in operations if factorisation in one and "solve" not in one]
        assert len(found) == count, found


@every_estimator
def test_operations_do_not_grow_with_batch_samples_or_dimensions(backend, name):
    function = getattr(backend.estimators, ESTIMATORS[name][0])
    # Conjugate gradients stop when the samples let them: the same number of iterations, then.
    if name == "kernel-exponential-family":
        function = partial(function, tolerance=0.0, max_iterations=5)
    rng = np.random.default_rng(0)

    small, large = (
        backend.operations(function, backend.array(rng.normal(size=shape)))
        for shape in [(2, 10, 2), (5, 20, 3)]
    )

    assert small == large
