"""Whether draws are those of a target: against the NumPy oracle, and for what they see and miss."""

import importlib
import inspect
import re
from functools import partial

import numpy as np
import pytest

from tests.oracles import score as oracle

every_shape = pytest.mark.parametrize(
    "shape", [(3, 1), (9, 3), (2, 2, 6, 2)], ids=lambda shape: "x".join(map(str, shape))
)
FUNCTIONS = ["shrinkage", "stein_identity", "kernel_stein_discrepancy"]


def judge(backend, name, samples, scores, **options):
    """NumPy in and out."""
    function = backend.as_a_whole(partial(getattr(backend.estimators, name), **options))
    return backend.numpy(function(backend.array(samples), backend.array(scores)))


def randomly(backend, samples):
    """What a function takes that draws directions, first by position and then by name."""
    if backend.host == "numpyro":
        import jax

        return (jax.random.key(0),), {}
    import torch

    return (), {"generator": torch.Generator().manual_seed(0)}


def distance(backend, samples, reference, **options):
    """Sliced Wasserstein, NumPy in and out."""
    key, generator = randomly(backend, samples)
    function = partial(backend.estimators.sliced_wasserstein, **generator, **options)
    arrays = backend.array(samples), backend.array(reference)
    return backend.numpy(backend.as_a_whole(function)(*key, *arrays))


def directions(backend, samples, number):
    """Those that :func:`distance` takes."""
    function = backend.estimators.sliced_wasserstein
    module = importlib.import_module(function.__module__)
    key, generator = randomly(backend, samples)
    return backend.numpy(
        module.random_directions(*key, backend.array(samples), number, *generator.values())
    )


def draws(shape, seed=0):
    """Samples with an offset, unequal scales and correlation, and scores of no density."""
    rng = np.random.default_rng(seed)
    mixing = np.diag(np.logspace(0, 1, shape[-1])) + 0.3
    return 3.0 + rng.normal(size=shape) @ mixing, rng.normal(size=shape)


def assert_matches(actual, desired):
    np.testing.assert_allclose(actual, desired, rtol=1e-10, atol=1e-10 * np.abs(desired).max())


# Against the oracle


@pytest.mark.usefixtures("strict_promotion")
@every_shape
@pytest.mark.parametrize("name", FUNCTIONS)
def test_equals_the_oracle(backend, name, shape):
    samples, scores = draws(shape)
    desired = oracle.per_batch_element(getattr(oracle, name), samples, scores)
    assert_matches(judge(backend, name, samples, scores), desired)


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("bandwidth", [None, 0.9])
@pytest.mark.parametrize("kernel", ["RBF", "IMQ"])
def test_discrepancy_of_every_kernel(backend, kernel, bandwidth, whiten):
    samples, scores = draws((2, 7, 3))
    options = {"kernel": getattr(backend.estimators, kernel)(bandwidth), "whiten": whiten}

    actual = judge(backend, "kernel_stein_discrepancy", samples, scores, **options)

    options["kernel"] = kernel
    desired = oracle.per_batch_element(
        lambda x, s: oracle.kernel_stein_discrepancy(x, s, bandwidth=bandwidth, **options),
        samples,
        scores,
    )
    assert_matches(actual, desired)


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize("num_reference", [5, 6, 12])
@every_shape
def test_sliced_wasserstein_equals_the_oracle(backend, shape, num_reference):
    samples, _ = draws(shape)
    reference, _ = draws((*shape[:-2], num_reference, shape[-1]), seed=1)

    actual = distance(backend, samples, reference, num_projections=7)

    lines = directions(backend, samples, 7)
    np.testing.assert_allclose(np.linalg.norm(lines, axis=-1), 1.0, rtol=1e-12)
    desired = oracle.per_batch_element(
        lambda x, y: oracle.sliced_wasserstein(x, y, lines), samples, reference
    )
    assert_matches(actual, desired)


# What follows from their definitions


def test_shrinkage_is_the_mean_of_the_diagonal_of_the_identity(backend):
    samples, scores = draws((2, 9, 3))
    matrix = judge(backend, "stein_identity", samples, scores)
    assert_matches(
        judge(backend, "shrinkage", samples, scores), np.trace(matrix, axis1=-2, axis2=-1) / 3
    )


def test_identity_compares_covariances_of_gaussians(backend):
    samples, _ = draws((40, 3))
    target = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 3.0]])
    scores = oracle.gaussian_score(samples, np.ones(3), target)
    covariance = np.cov(samples.T, bias=True)
    actual = judge(backend, "stein_identity", samples, scores)
    assert_matches(actual, np.linalg.solve(target, covariance))


def test_discrepancy_has_no_units(backend):
    samples, scores = draws((9, 3))
    mixing = np.array([[2.0, 0.3, 0.0], [0.0, 0.1, 1.0], [0.5, 0.0, 7.0]])
    transformed = samples @ mixing.T - 5.0, np.linalg.solve(mixing.T, scores.T).T
    name = "kernel_stein_discrepancy"
    # But for the regularisation of the whitening.
    np.testing.assert_allclose(
        judge(backend, name, *transformed), judge(backend, name, samples, scores), rtol=1e-5
    )


def test_distance_of_a_shift_is_its_length_along_the_lines(backend):
    samples, _ = draws((9, 3))
    shift = np.array([1.0, -2.0, 0.5])
    actual = distance(backend, samples, samples + shift)
    desired = np.sqrt(np.mean((directions(backend, samples, 100) @ shift) ** 2))
    np.testing.assert_allclose(actual, desired, rtol=1e-10)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_is_detached(backend, name):
    samples, scores = draws((6, 2))
    for gradient in backend.gradients(getattr(backend.estimators, name), samples, scores):
        np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_mapped_and_compiled(backend, name):
    samples, scores = draws((2, 6, 2))
    function = getattr(backend.estimators, name)
    arrays = backend.array(samples), backend.array(scores)
    desired = judge(backend, name, samples, scores)
    assert_matches(backend.numpy(backend.vmap(function)(*arrays)), desired)
    assert_matches(backend.numpy(backend.compiled(function, *arrays)(*arrays)), desired)


def test_discrepancy_forms_no_array_over_pairs_and_dimensions(backend):
    samples, scores = (backend.array(each) for each in draws((30, 8)))
    function = backend.estimators.kernel_stein_discrepancy
    assert backend.largest_intermediate(function, samples, scores) <= 30 * 30


# What they see, and what they miss

N = 1000
# Eigenvalues of the identity, 1 - 1/N, spread by the draws' own covariance over (1 +- sqrt(D/N))^2.
SPREAD = 3 * np.sqrt(2 / N)


def gaussian(scale=1.0, offset=0.0):
    return offset + scale * np.random.default_rng(0).normal(size=(N, 2))


def two_modes(points):
    means = np.array([[-4.0, 0.0], [4.0, 0.0]])
    return oracle.mixture_score(points, np.array([0.5, 0.5]), means, 1.0)


def test_draws_of_the_target_pass(backend):
    samples = gaussian()
    np.testing.assert_allclose(
        judge(backend, "stein_identity", samples, -samples), np.eye(2), atol=SPREAD
    )
    assert abs(judge(backend, "shrinkage", samples, -samples) - 1) < SPREAD
    # E h(x, x) = D + D / h^2 with h^2 near 2 D log 2; the V-statistic of draws of p is 1 / N of it.
    assert judge(backend, "kernel_stein_discrepancy", samples, -samples) ** 2 < 2 * 2.8 / N


def test_shrunk_draws_are_seen_by_the_identity(backend):
    samples = gaussian(scale=0.5)
    matrix = judge(backend, "stein_identity", samples, -samples)
    np.testing.assert_allclose(matrix, 0.25 * np.eye(2), atol=0.25 * SPREAD)


def test_shifted_draws_are_seen_by_the_discrepancy_alone(backend):
    samples = gaussian(offset=0.5)
    matrix = judge(backend, "stein_identity", samples, -samples)
    np.testing.assert_allclose(matrix, np.eye(2), atol=SPREAD)
    exact = judge(backend, "kernel_stein_discrepancy", gaussian(), -gaussian())
    assert judge(backend, "kernel_stein_discrepancy", samples, -samples) > 5 * exact


def test_a_missing_mode_is_seen_by_reference_draws_alone(backend):
    missing = gaussian(offset=np.array([4.0, 0.0]))
    matrix = judge(backend, "stein_identity", missing, two_modes(missing))
    np.testing.assert_allclose(matrix, np.eye(2), atol=2 * SPREAD)
    of_missing = judge(backend, "kernel_stein_discrepancy", missing, two_modes(missing))
    of_exact = judge(backend, "kernel_stein_discrepancy", gaussian(), -gaussian())
    np.testing.assert_allclose(of_missing, of_exact, rtol=0.1)  # one mode, exactly drawn

    side = np.where(np.arange(N) % 2, 4.0, -4.0)[:, None] * [1.0, 0.0]
    reference = np.random.default_rng(1).normal(size=(N, 2)) + side
    # Half of the mass is 8 away along the first axis, half of whose square lies along a line.
    assert distance(backend, missing, reference) > 3.0
    assert distance(backend, gaussian() + side, reference) < 0.5


def test_a_ridge_that_shrinks_is_seen_by_shrinkage(backend):
    samples = gaussian()[:100]
    c = {
        ridge: judge(
            backend,
            "shrinkage",
            samples,
            backend.numpy(
                backend.as_a_whole(partial(backend.estimators.stein_score, ridge=ridge))(
                    backend.array(samples)
                )
            ),
        )
        for ridge in (0.01, 10.0)
    }
    assert 0.9 < c[0.01] < 1.05
    assert c[10.0] < 0.8


# Bad input


@pytest.fixture
def refuse(backend):
    """Call a function without the run-time type check, which would be first to see a wrong shape;
    a user has none."""

    def call(name, *arrays, match, error=ValueError, **options):
        function = inspect.unwrap(getattr(backend.estimators, name))
        with pytest.raises(error, match=f"{name} needs {match}"):
            function(*map(backend.array, arrays), **options)

    return call


@pytest.mark.parametrize("name", FUNCTIONS)
def test_scores_that_do_not_fit_are_refused(refuse, name):
    samples, scores = draws((6, 2))
    refuse(name, samples, scores[:5], match=r"one score for each sample.*got \(5, 2\)")
    single = scores.astype(np.float32)
    refuse(name, samples, single, error=TypeError, match="scores of the samples' dtype .*float32")
    scores[0, 0] = np.nan
    refuse(name, samples, scores, match="finite scores")
    refuse(name, scores, samples, match="finite samples")


def test_references_that_do_not_fit_are_refused(backend):
    key, _ = randomly(backend, None)
    function = partial(inspect.unwrap(backend.estimators.sliced_wasserstein), *key)
    samples, reference = map(backend.array, draws((6, 2)))
    with pytest.raises(ValueError, match=r"reference draws of shape \[P, 2\].*got \(3, 4\)"):
        function(samples, reference.reshape(3, 4))
    single = backend.array(np.ones((6, 2), np.float32))
    with pytest.raises(TypeError, match=r"reference draws of the samples' dtype .*float32"):
        function(samples, single)
    with pytest.raises(ValueError, match="num_projections >= 1, got 0"):
        function(samples, reference, num_projections=0)


# The report

TRUSTED = {
    "sites": ("z", "w"),
    "num_elements": 1,
    "dim": 2,
    "num_particles": 50,
    "num_samples": 1000,
    "shrinkage": 0.98,
    "narrowest": 0.95,
    "widest": 1.04,
    "kernel_stein_discrepancy": 0.1,
    "equivalent_draws": 800.0,
    "sliced_wasserstein": 0.1,
    "num_reference": 1000,
}


def report_of(backend, **figures):
    check = backend.package.ImplicitSitesCheck(**TRUSTED | figures)
    return backend.package.ImplicitFitReport((check,))


def test_report_of_a_fit_to_trust(backend):
    assert report_of(backend).is_trusted
    assert str(report_of(backend)).splitlines() == [
        "sites  D  shrinkage  narrowest  widest  worth draws  distance",
        "z, w   2  0.98       0.95       1.04    800          0.10",
        "Trust this fit, as far as these figures see.",
    ]


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({"shrinkage": 0.85}, "too narrow. Raise num_particles to 100 or more, .*calibrate_score"),
        ({"shrinkage": 0.85, "num_particles": 5}, "Raise num_particles to 10 or more"),
        ({"shrinkage": 1.2}, "too wide. Correct the score_estimator by calibrate_score"),
        ({"narrowest": 0.5}, "0.50 of the target's variance: too narrow. .*learning rate.*width"),
        ({"widest": 2.0}, "2.00 times the target's variance: too wide. .*learning rate"),
        ({"equivalent_draws": 20.0}, "as far from the target as 20 exact ones"),
        ({"sliced_wasserstein": 0.5}, "Nothing else shows it: it is likely to miss a mode"),
        ({"sliced_wasserstein": 0.5, "narrowest": 0.5}, "It may miss a mode"),
    ],
)
def test_report_says_what_to_change(backend, figures, words):
    report = report_of(backend, **figures)
    assert not report.is_trusted
    assert re.search(f"(?s)Do not trust this fit:\n- z, w: .*{words}", str(report))


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({"sliced_wasserstein": None, "num_reference": 0}, "a mode .* without reference draws"),
        ({"num_particles": 9}, "num_particles=9 is few for 2 dimensions; the rule is 10"),
        ({"num_samples": 99}, "Pass num_samples=100"),
    ],
)
def test_report_says_what_it_can_not_tell(backend, figures, words):
    report = report_of(backend, **figures)
    assert report.is_trusted
    assert re.search(words, str(report))


def test_report_allows_for_chance(backend):
    assert not report_of(backend, narrowest=0.55).is_trusted
    assert report_of(backend, narrowest=0.55, num_elements=1000).is_trusted
    assert report_of(backend, narrowest=0.55, num_samples=200).is_trusted
    assert report_of(backend, sliced_wasserstein=0.4, num_reference=100).is_trusted
    assert not report_of(backend, sliced_wasserstein=0.4).is_trusted
