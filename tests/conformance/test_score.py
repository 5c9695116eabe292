"""Score estimators against the NumPy oracle, at the samples and at other points."""

import numpy as np
import pytest

from tests.oracles import score as oracle

# name -> (estimate at the samples, fit, oracle)
ESTIMATORS = {
    "stein": ("stein_score", "fit_stein", "stein"),
    "spectral": ("spectral_score", "fit_spectral", "spectral"),
    "kde": ("kde_score", "fit_kde", "kde"),
    "parametric-stein": ("parametric_stein_score", "fit_parametric_stein", "parametric_stein"),
    "score-matching": ("score_matching_score", "fit_score_matching", "score_matching"),
    "kernel-exponential-family": (
        "kernel_exponential_family_score",
        "fit_kernel_exponential_family",
        "kernel_exponential_family",
    ),
    "nu-method": ("nu_method_score", "fit_nu_method", "nu_method"),
}
OPTIONS = {
    "stein": [{}, {"ridge": 0.3}],
    "spectral": [{}],
    "kde": [{}],
    "parametric-stein": [{}],
    "score-matching": [{}],
    "kernel-exponential-family": [{}],
    "nu-method": [{}, {"num_iterations": 7, "nu": 2.0}],
}
# The oracle solves exactly.
EXACT = {"kernel-exponential-family": {"tolerance": 1e-13, "max_iterations": 80}}
CASES = [
    pytest.param(name, options, id="-".join([name, *(f"{k}={v}" for k, v in options.items())]))
    for name in ESTIMATORS
    for options in OPTIONS[name]
]


def normal(rng, shape):
    return rng.normal(size=shape)


def correlated(rng, shape):
    """Scales from 1 to 100 and strong correlation."""
    dim = shape[-1]
    mixing = np.diag(np.logspace(0, 2, dim)) @ (0.1 * np.eye(dim) + np.ones((dim, dim)))
    return rng.normal(size=shape) @ mixing.T


def offset(rng, shape):
    return 100.0 + rng.normal(size=shape)


def two_clusters(rng, shape):
    return rng.normal(size=shape) + 6.0 * (np.arange(shape[-2]) % 2)[:, None]


def tied(rng, shape):
    """Samples that coincide in pairs, the last with the first if their number is odd."""
    half = rng.normal(size=(*shape[:-2], shape[-2] // 2, shape[-1]))
    return np.concatenate([half, half, half[..., :1, :]], axis=-2)[..., : shape[-2], :]


every_kind = pytest.mark.parametrize(
    "make", [normal, correlated, offset, two_clusters, tied], ids=lambda make: make.__name__
)
every_shape = pytest.mark.parametrize(
    "shape", [(2, 1), (9, 3), (2, 2, 6, 2)], ids=lambda shape: "x".join(map(str, shape))
)
every_kernel = pytest.mark.parametrize("kernel", ["RBF", "IMQ"])
# What depends on the shape does not depend on the kernel: every shape with one kernel is enough.
every_kernel_and_shape = pytest.mark.parametrize(
    ("kernel", "shape"),
    [("RBF", (9, 3)), ("IMQ", (9, 3)), ("IMQ", (2, 1)), ("IMQ", (2, 2, 6, 2))],
    ids=["RBF-9x3", "IMQ-9x3", "IMQ-2x1", "IMQ-2x2x6x2"],
)


def assert_matches(actual, desired, tolerance=1e-8):
    """To the tolerance, relative to the largest entry."""
    largest = np.abs(desired).max(initial=np.finfo(float).tiny)
    np.testing.assert_allclose(actual / largest, desired / largest, rtol=0, atol=tolerance)


def kernel_of(backend, name, bandwidth=None):
    return getattr(backend.estimators, name)(bandwidth)


# Kernels


@every_kernel
@pytest.mark.parametrize("what", ["gradient", "hessian", "gradient_of_laplacian"])
def test_oracle_differentiates_its_kernels(kernel, what):
    kernel, step = oracle.Kernel(kernel, 1.3), 1e-5
    x, y = np.random.default_rng(0).normal(size=(2, 3))
    differentiated = {
        "gradient": kernel.value,
        "hessian": kernel.gradient,
        "gradient_of_laplacian": lambda x, y: np.trace(kernel.hessian(x, y)),
    }[what]

    numerical = [
        (differentiated(x + step * e, y) - differentiated(x - step * e, y)) / (2 * step)
        for e in np.eye(3)
    ]

    np.testing.assert_allclose(getattr(kernel, what)(x, y), numerical, atol=1e-8)


@every_kernel
def test_kernel_value(backend, kernel):
    points, samples = np.random.default_rng(0).normal(size=(2, 5, 3))
    squared = np.array([[np.sum((x - y) ** 2) for y in samples] for x in points])

    actual = kernel_of(backend, kernel, 0.7).derivative(backend.array(squared))

    of_oracle = oracle.Kernel(kernel, 0.7)
    assert_matches(
        backend.numpy(actual), np.array([[of_oracle.value(x, y) for y in samples] for x in points])
    )


@every_kernel
@pytest.mark.parametrize("order", [0, 1, 2])
def test_kernel_derivatives_follow_from_each_other(backend, kernel, order):
    kernel = kernel_of(backend, kernel, 0.7)
    squared = np.random.default_rng(0).uniform(0, 4, size=(3, 5))

    (gradient,) = backend.gradients(lambda s: kernel.derivative(s, order), squared)

    assert_matches(backend.numpy(kernel.derivative(backend.array(squared), order + 1)), gradient)


@every_kernel
def test_curl_free_kernel_without_its_blocks(backend, kernel):
    rng = np.random.default_rng(0)
    points, samples, coefficients = (rng.normal(size=(n, 3)) for n in (4, 5, 5))
    curl_free = backend.estimators.CurlFree(kernel_of(backend, kernel, 1.3))
    arrays = backend.array(points), backend.array(samples)

    applied = curl_free.operator(*arrays)(backend.array(coefficients))
    divergence = curl_free.divergence(*arrays)

    of_oracle = oracle.Kernel(kernel, 1.3)
    pairs = list(zip(samples, coefficients, strict=True))
    assert_matches(
        backend.numpy(applied),
        np.array([sum(of_oracle.curl_free(x, y) @ c for y, c in pairs) for x in points]),
    )
    assert_matches(
        backend.numpy(divergence),
        np.array([sum(of_oracle.divergence(x, y) for y in samples) for x in points]),
    )
    np.testing.assert_allclose(of_oracle.curl_free(samples[0], samples[0]), np.eye(3), atol=1e-12)


def test_a_kernel_without_a_bandwidth_cannot_be_evaluated(backend):
    with pytest.raises(ValueError, match="needs a bandwidth"):
        backend.estimators.RBF().derivative(backend.array(np.ones((2, 2))))


# Bandwidth and whitening


@every_shape
@every_kind
def test_median_bandwidth(backend, make, shape):
    samples = make(np.random.default_rng(0), shape)

    actual = backend.numpy(backend.estimators.median_bandwidth(backend.array(samples)))

    desired = oracle.per_batch_element(oracle.median_bandwidth, samples)
    if make is tied and shape[-2] == 2:
        desired = np.ones_like(desired)  # both samples coincide
    assert_matches(actual, desired)


def test_bandwidth_where_most_samples_coincide(backend):
    samples = np.zeros((20, 2))
    samples[-1] = 1.0

    actual = backend.numpy(backend.estimators.median_bandwidth(backend.array(samples)))

    # 19 of 190 distances are sqrt(2), the others zero.
    assert_matches(actual, np.array(np.finfo(float).eps ** 0.25 * np.sqrt(0.1 * 2)))


@every_kind
def test_whitening(backend, make):
    samples = make(np.random.default_rng(0), (2, 30, 3))
    whitening = backend.estimators.fit_whitening(backend.array(samples))

    whitened = backend.numpy(whitening.points(backend.array(samples)))

    for of_element, mean, factor, u in zip(
        samples,
        backend.numpy(whitening.mean),
        backend.numpy(whitening.factor),
        whitened,
        strict=True,
    ):
        desired_mean, desired_factor = oracle.whitening(of_element)
        assert_matches(mean, desired_mean, 1e-12)
        assert_matches(factor, desired_factor)
        np.testing.assert_allclose(u.mean(axis=0), 0, atol=1e-10)
        # The regularisation is 1.5e-8 of the average variance, here up to 1e4 times the smallest.
        np.testing.assert_allclose(u.T @ u / 30, np.eye(3), atol=1e-5)


def test_whitening_turns_gradients_back(backend):
    rng = np.random.default_rng(0)
    samples, points, linear = rng.normal(size=(30, 3)), rng.normal(size=(4, 3)), rng.normal(size=3)
    whitening = backend.estimators.fit_whitening(backend.array(samples))

    (gradient,) = backend.gradients(
        lambda x: (whitening.points(x) * backend.array(linear)).sum(), points
    )
    actual = whitening.score(backend.array(np.broadcast_to(linear, points.shape)))

    assert_matches(backend.numpy(actual), gradient)


# Estimates


def score(backend, name, samples, **options):
    """The estimate at the samples, NumPy in and out."""
    function = getattr(backend.estimators, ESTIMATORS[name][0])
    return backend.numpy(function(backend.array(samples), **EXACT.get(name, {}), **options))


def fit(backend, name, samples, **options):
    """A fit to samples that are the backend's."""
    return getattr(backend.estimators, ESTIMATORS[name][1])(
        samples, **EXACT.get(name, {}), **options
    )


def score_elsewhere(backend, name, samples, points, **options):
    """The estimate at other points, NumPy in and out."""
    fitted = fit(backend, name, backend.array(samples), **options)
    return backend.numpy(fitted.score(backend.array(points)))


def desired_score(name, samples, *points, **options):
    """The oracle's."""
    of_element = getattr(oracle, ESTIMATORS[name][2])
    return oracle.per_batch_element(lambda *x: of_element(*x, **options), samples, *points)


def is_degenerate(make, shape):
    return make is tied and shape[-2] == 2


@pytest.mark.usefixtures("strict_promotion")
@every_kernel_and_shape
@every_kind
@pytest.mark.parametrize(("name", "options"), CASES)
def test_score_at_the_samples(backend, name, options, kernel, make, shape):
    samples = make(np.random.default_rng(0), shape)

    actual = score(backend, name, samples, kernel=kernel_of(backend, kernel), **options)

    if is_degenerate(make, shape):
        np.testing.assert_array_equal(actual, 0.0)
    else:
        assert_matches(actual, desired_score(name, samples, kernel=kernel, **options))


@pytest.mark.usefixtures("strict_promotion")
@every_kernel_and_shape
@pytest.mark.parametrize("make", [normal, two_clusters], ids=lambda make: make.__name__)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_score_at_other_points(backend, name, options, kernel, make, shape):
    rng = np.random.default_rng(0)
    samples, points = make(rng, shape), 1.5 * rng.normal(size=(*shape[:-2], 3, shape[-1]))

    actual = score_elsewhere(
        backend, name, samples, points, kernel=kernel_of(backend, kernel), **options
    )

    assert_matches(actual, desired_score(name, samples, points, kernel=kernel, **options))


@pytest.mark.parametrize("bandwidth", [0.9, np.array([0.9, 1.7])], ids=["one", "each"])
@every_kernel
@pytest.mark.parametrize("name", ESTIMATORS)
def test_score_without_whitening_and_with_a_bandwidth(backend, name, kernel, bandwidth):
    rng = np.random.default_rng(0)
    samples, points = offset(rng, (2, 9, 3)), offset(rng, (2, 3, 3))
    given = bandwidth if np.ndim(bandwidth) == 0 else backend.array(bandwidth)
    options = {"kernel": kernel_of(backend, kernel, given), "whiten": False}

    scores = score(backend, name, samples, **options)
    elsewhere = score_elsewhere(backend, name, samples, points, **options)

    for i, h in enumerate(np.broadcast_to(bandwidth, 2)):
        known = {"kernel": kernel, "bandwidth": h, "whiten": False}
        assert_matches(scores[i], desired_score(name, samples[i], **known))
        assert_matches(elsewhere[i], desired_score(name, samples[i], points[i], **known))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_default_kernel_is_imq_at_the_median_distance(backend, name):
    samples = np.random.default_rng(0).normal(size=(9, 3))
    assert_matches(score(backend, name, samples), desired_score(name, samples, kernel="IMQ"))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_score_of_a_fit_at_the_samples_is_what_the_function_returns(backend, name):
    samples = np.random.default_rng(0).normal(size=(9, 3))

    fitted = fit(backend, name, backend.array(samples))

    np.testing.assert_array_equal(backend.numpy(fitted.scores), score(backend, name, samples))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_score_of_transformed_samples_is_the_transformed_score(backend, name):
    # What whitening is for: x -> A x + b turns grad log q into A^-T grad log q. Only the
    # regularisation, 1.5e-8 of the variances, knows the coordinates.
    rng = np.random.default_rng(0)
    samples, matrix = rng.normal(size=(9, 3)), rng.normal(size=(3, 3)) + 2 * np.eye(3)

    actual = score(backend, name, samples @ matrix.T - 7.0)

    assert_matches(actual, score(backend, name, samples) @ np.linalg.inv(matrix), 1e-5)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_scores_are_detached(backend, name):
    rng = np.random.default_rng(0)
    samples, points = rng.normal(size=(9, 3)), rng.normal(size=(3, 3))

    gradients = backend.gradients(lambda x: fit(backend, name, x).scores, samples)
    gradients += backend.gradients(lambda x, y: fit(backend, name, x).score(y), samples, points)

    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0.0)


def test_spectral_score_with_all_eigenfunctions_is_the_stein_score_without_a_ridge(backend):
    samples = np.random.default_rng(0).normal(size=(9, 3))
    assert_matches(
        score(backend, "spectral", samples, num_eigenfunctions=9),
        score(backend, "stein", samples, ridge=0.0),
    )


@pytest.mark.parametrize("options", [{"num_eigenfunctions": 2}, {"energy": 0.5}], ids=str)
def test_spectral_score_with_few_eigenfunctions(backend, options):
    # Where no two eigenvalues are equal: the oracle might cut between them elsewhere.
    rng = np.random.default_rng(0)
    samples, points = rng.normal(size=(2, 9, 3)), rng.normal(size=(2, 3, 3))

    scores = score(backend, "spectral", samples, **options)
    elsewhere = score_elsewhere(backend, "spectral", samples, points, **options)

    assert_matches(scores, desired_score("spectral", samples, **options))
    assert_matches(elsewhere, desired_score("spectral", samples, points, **options))


def test_spectral_score_keeps_one_eigenfunction_at_least(backend):
    samples = np.random.default_rng(0).normal(size=(9, 3))
    assert_matches(
        score(backend, "spectral", samples, energy=1e-9),
        desired_score("spectral", samples, num_eigenfunctions=1),
    )


def test_conjugate_gradients_stop_where_they_are_told(backend):
    samples = np.random.default_rng(0).normal(size=(9, 3))
    kernel = backend.estimators.IMQ(1.3)

    actual = backend.estimators.kernel_exponential_family_score(
        backend.array(samples), kernel=kernel, ridge=0.2, max_iterations=1, whiten=False
    )

    # The first iteration is a step of steepest descent from zero.
    of_oracle = oracle.Kernel("IMQ", 1.3)
    right = 9 * np.array([oracle.mean_divergence(of_oracle, samples, x) for x in samples])
    image = 0.2 * right + np.array(
        [
            sum(of_oracle.curl_free(x, y) @ c for y, c in zip(samples, right, strict=True))
            for x in samples
        ]
    )
    assert_matches(backend.numpy(actual), -right * np.sum(right**2) / np.sum(right * image))


# Batches, compiled code


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_batch_is_its_elements(backend, name):
    rng = np.random.default_rng(0)
    samples, points = correlated(rng, (2, 9, 3)), rng.normal(size=(2, 3, 3))
    samples[1] = tied(rng, (9, 3))

    together = score(backend, name, samples)
    elsewhere = score_elsewhere(backend, name, samples, points)

    for i in range(2):
        assert_matches(together[i], score(backend, name, samples[i]), 1e-9)
        alone = score_elsewhere(backend, name, samples[i], points[i])
        assert_matches(elsewhere[i], alone, 1e-9)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_mapped_and_compiled(backend, name):
    rng = np.random.default_rng(0)
    samples = backend.array(rng.normal(size=(2, 9, 3)))
    points = backend.array(rng.normal(size=(2, 3, 3)))

    def at_points(samples, points):
        return fit(backend, name, samples).score(points)

    desired = backend.numpy(at_points(samples, points))

    assert_matches(backend.numpy(backend.vmap(at_points)(samples, points)), desired)
    compiled = backend.compiled(at_points, samples, points)
    assert_matches(backend.numpy(compiled(samples, points)), desired)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_fit_is_a_value(backend, name):
    # Fitted in one mapped function and evaluated in another.
    rng = np.random.default_rng(0)
    samples = backend.array(rng.normal(size=(2, 9, 3)))
    points = backend.array(rng.normal(size=(2, 3, 3)))

    fitted = backend.vmap(lambda samples: fit(backend, name, samples))(samples)
    actual = backend.vmap(lambda fitted, points: fitted.score(points))(fitted, points)

    desired = fit(backend, name, samples).score(points)
    assert_matches(backend.numpy(actual), backend.numpy(desired))


# Bad input


@pytest.fixture
def estimator(backend):
    return backend.estimators.stein_score


def test_one_sample_is_refused(backend, estimator):
    with pytest.raises(ValueError, match=r"2 or more, got 1 in samples of shape \(3, 1, 2\)"):
        estimator(backend.array(np.zeros((3, 1, 2))))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_refused(backend, estimator, value):
    samples = np.zeros((4, 2))
    samples[1, 1] = value
    with pytest.raises(ValueError, match="finite samples, got 1 entries of nan or inf among 8"):
        estimator(backend.array(samples))


def test_fewer_samples_than_dimensions_give_a_warning_with_the_rule(backend, estimator):
    samples = backend.array(np.random.default_rng(0).normal(size=(3, 4)))
    with pytest.warns(UserWarning, match="K >= 5 D, that is 20 samples") as warned:
        scores = estimator(samples)
    assert len(warned) == 1
    assert np.isfinite(backend.numpy(scores)).all()


def test_what_is_made_of_an_estimate_does_not_repeat_its_warning(backend):
    samples = backend.array(np.random.default_rng(0).normal(size=(3, 4)))

    def calibrated(samples):
        return backend.estimators.calibrate_score(samples, backend.estimators.stein_score(samples))

    with pytest.warns(UserWarning, match="stein_score got 3 samples in 4") as warned:
        backend.estimators.entropy_surrogate(samples, score_estimator=calibrated)
        backend.estimators.knn_entropy(samples)
    assert len(warned) == 1


@pytest.mark.parametrize("ridge", [0.0, 1e-4])
def test_a_ridge_too_small_for_float32_is_refused(backend, estimator, ridge):
    samples = np.random.default_rng(0).normal(size=(5, 2))
    with pytest.raises(ValueError, match=f"ridge >= 0.001 in float32, got {ridge}"):
        estimator(backend.array(samples.astype(np.float32)), ridge=ridge)
    assert np.isfinite(backend.numpy(estimator(backend.array(samples), ridge=ridge))).all()


@pytest.mark.parametrize("ridge", [-0.1, np.nan, np.inf])
def test_a_senseless_ridge_is_refused(backend, estimator, ridge):
    with pytest.raises(ValueError, match="needs a finite ridge >= 0"):
        estimator(backend.array(np.ones((5, 2))), ridge=ridge)


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("spectral_score", {"energy": 0.0}, "0 < energy <= 1"),
        ("spectral_score", {"energy": 1.1}, "0 < energy <= 1"),
        ("spectral_score", {"num_eigenfunctions": 0}, "num_eigenfunctions >= 1, got 0"),
        ("kernel_exponential_family_score", {"ridge": 0.0}, "ridge > 0"),
        ("kernel_exponential_family_score", {"tolerance": -1.0}, "a finite tolerance >= 0"),
        ("kernel_exponential_family_score", {"max_iterations": 0}, "max_iterations >= 1, got 0"),
        ("nu_method_score", {"num_iterations": 0}, "num_iterations >= 1, got 0"),
        ("nu_method_score", {"nu": 0.0}, "nu > 0"),
    ],
)
def test_senseless_options_are_refused(backend, function, options, message):
    samples = backend.array(np.eye(5)[:, :2])
    with pytest.raises(ValueError, match=f"{function} needs {message}"):
        getattr(backend.estimators, function)(samples, **options)


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, np.inf])
def test_a_senseless_bandwidth_is_refused(backend, estimator, bandwidth):
    with pytest.raises(ValueError, match="bandwidth that is positive and finite"):
        estimator(backend.array(np.ones((5, 2))), kernel=backend.estimators.RBF(bandwidth))


def test_a_bandwidth_of_the_wrong_shape_is_refused(backend, estimator):
    kernel = backend.estimators.RBF(backend.array(np.ones(3)))
    with pytest.raises(ValueError, match="one for each batch element"):
        estimator(backend.array(np.ones((2, 5, 2))), kernel=kernel)


@pytest.mark.parametrize("shape", [(3, 3), (2, 3, 2)])
def test_points_of_the_wrong_shape_are_refused(backend, shape):
    fitted = backend.estimators.fit_stein(backend.array(np.eye(5)[:, :2]))
    with pytest.raises(ValueError, match=r"points of shape \[P, 2\]"):
        fitted.score(backend.array(np.zeros(shape)))


def test_points_of_another_dtype_are_refused(backend):
    fitted = backend.estimators.fit_stein(backend.array(np.eye(5)[:, :2]))
    with pytest.raises(TypeError, match="dtype of the samples"):
        fitted.score(backend.array(np.zeros((3, 2), np.float32)))


# Entropy


def test_gradient_of_the_entropy_surrogate_is_minus_the_mean_score(backend):
    samples = np.random.default_rng(0).normal(size=(2, 9, 3))

    (gradient,) = backend.gradients(backend.estimators.entropy_surrogate, samples)

    assert_matches(gradient, -oracle.per_batch_element(oracle.stein, samples) / 9)


def test_entropy_surrogate_with_another_estimator(backend):
    # With the exact score of N(0, C) the surrogate's value is x' C^-1 x averaged, and its gradient
    # in a linear generator's matrix A, x = A z, is the inverse of A' where the z are white.
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(40, 2))
    noise -= noise.mean(axis=0)
    noise = noise @ np.linalg.inv(np.linalg.cholesky(noise.T @ noise / 40)).T
    matrix = np.array([[1.0, 0.3], [-0.4, 2.0]])
    precision = backend.array(np.linalg.inv(matrix @ matrix.T))

    def entropy(matrix):
        return backend.estimators.entropy_surrogate(
            backend.array(noise) @ matrix.T, score_estimator=lambda x: -x @ precision
        )

    (gradient,) = backend.gradients(entropy, matrix)

    assert_matches(gradient, np.linalg.inv(matrix).T)


def test_entropy_surrogate_refuses_an_estimator_of_another_shape(backend):
    with pytest.raises(ValueError, match="keeps the shape of the samples"):
        backend.estimators.entropy_surrogate(
            backend.array(np.ones((5, 2))), score_estimator=lambda samples: samples[0]
        )


# --- calibration and the entropy's value ---------------------------------------------------------


@pytest.mark.parametrize("draw", [normal, correlated, offset, two_clusters])
def test_calibration_equals_the_oracle(backend, draw):
    rng = np.random.default_rng(3)
    samples, scores = draw(rng, (2, 30, 3)), rng.normal(size=(2, 30, 3))
    actual = backend.numpy(
        backend.estimators.calibrate_score(backend.array(samples), backend.array(scores))
    )
    desired = oracle.per_batch_element(oracle.calibrate, samples, scores)
    np.testing.assert_allclose(actual, desired, rtol=1e-8, atol=1e-8 * abs(desired).max())


def test_calibrated_scores_obey_steins_identity(backend):
    """Whatever the estimate: the entropy's gradient along affine maps is then exact."""
    rng = np.random.default_rng(4)
    samples, scores = correlated(rng, (50, 4)), rng.normal(size=(50, 4))
    calibrated = backend.numpy(
        backend.estimators.calibrate_score(backend.array(samples), backend.array(scores))
    )
    moment = -(samples - samples.mean(0)).T @ calibrated / 50
    # The regularisation of the covariance is what is left.
    np.testing.assert_allclose(np.linalg.eigvals(moment), 1.0, atol=1e-4)


def test_calibration_leaves_coinciding_samples_alone(backend):
    zeros = backend.array(np.zeros((5, 2)))
    calibrated = backend.numpy(backend.estimators.calibrate_score(zeros + 3.0, zeros))
    np.testing.assert_array_equal(calibrated, 0.0)


def test_calibration_refuses_other_shapes(backend):
    with pytest.raises(ValueError, match=r"one score per sample.*\(5, 2\).*\(5, 1\)"):
        backend.estimators.calibrate_score(
            backend.array(np.eye(5)[:, :2]), backend.array(np.zeros((5, 1)))
        )


@pytest.mark.parametrize("shape", [(2, 1), (7, 3), (2, 20, 2)], ids=str)
@pytest.mark.parametrize("num_neighbors", [1, 3])
def test_knn_entropy_equals_the_oracle(backend, shape, num_neighbors):
    samples = np.random.default_rng(5).normal(size=shape)
    actual = backend.estimators.knn_entropy(backend.array(samples), num_neighbors=num_neighbors)
    desired = oracle.per_batch_element(lambda x: oracle.knn_entropy(x, num_neighbors), samples)
    np.testing.assert_allclose(backend.numpy(actual), desired, rtol=1e-9, atol=1e-9)


def test_knn_entropy_of_a_gaussian(backend):
    samples = 2.0 * np.random.default_rng(6).normal(size=(2000, 2))
    exact = 2 * (0.5 * np.log(2 * np.pi * np.e) + np.log(2.0))
    actual = backend.numpy(backend.estimators.knn_entropy(backend.array(samples)))
    # Its standard error is about 0.03 nats.
    np.testing.assert_allclose(actual, exact, atol=0.15)


def test_knn_entropy_of_coinciding_samples_is_finite(backend):
    for values in (np.zeros((5, 2)), np.repeat(np.eye(3), 4, axis=0)):
        for dtype in (np.float32, np.float64):
            entropy = backend.estimators.knn_entropy(backend.array(values.astype(dtype)))
            assert np.isfinite(backend.numpy(entropy)).all()
            assert backend.numpy(entropy) < -5


def test_knn_entropy_needs_neighbors(backend):
    with pytest.raises(ValueError, match="num_neighbors >= 1, got 0"):
        backend.estimators.knn_entropy(backend.array(np.eye(3)), num_neighbors=0)
