"""Score estimators by their definitions, in NumPy: loops over samples, dense blocks, float64.

Nothing here uses the packages' shortcuts. A kernel is a function of two vectors with its gradients
written out for each kernel by hand; the out-of-sample Stein estimate is a second fit with the point
among the samples; a matrix-valued kernel is its blocks; an estimator that minimises an objective
has that objective's quadratic form built entry by entry.

Samples are ``[N, D]``; :func:`per_batch_element` takes care of leading axes.
"""

import math
from typing import NamedTuple

import numpy as np


class Kernel(NamedTuple):
    """A radial kernel of two vectors and what the estimators differentiate of it."""

    name: str
    bandwidth: float

    def value(self, x, y):
        squared = (x - y) @ (x - y) / self.bandwidth**2
        return np.exp(-squared / 2) if self.name == "RBF" else 1 / np.sqrt(1 + squared)

    def gradient(self, x, y):
        """Gradient in the first argument."""
        k = self.value(x, y)
        return -(k if self.name == "RBF" else k**3) * (x - y) / self.bandwidth**2

    def hessian(self, x, y):
        """Second derivatives in the first argument."""
        k, r, h = self.value(x, y), x - y, self.bandwidth
        outer, identity = np.outer(r, r), np.eye(len(r))
        if self.name == "RBF":
            return k * (outer / h**4 - identity / h**2)
        return 3 * k**5 * outer / h**4 - k**3 * identity / h**2

    def gradient_of_laplacian(self, x, y):
        """Gradient in the first argument of the Laplacian in the first argument."""
        k, r, h, dim = self.value(x, y), x - y, self.bandwidth, len(x)
        if self.name == "RBF":
            laplacian = k * (r @ r / h**4 - dim / h**2)
            return k * 2 * r / h**4 - laplacian * r / h**2
        return (6 * k**5 / h**4 - 15 * k**7 * (r @ r) / h**6 + 3 * dim * k**5 / h**4) * r

    def curl_free(self, x, y):
        """Matrix-valued kernel of gradient fields, the unit matrix at x = y."""
        return -(self.bandwidth**2) * self.hessian(x, y)

    def divergence(self, x, y):
        """Divergence of each row of ``curl_free`` in the second argument."""
        return self.bandwidth**2 * self.gradient_of_laplacian(x, y)


def per_batch_element(function, *arrays):
    """Apply a function of ``[N, D]`` arrays to every element of their leading axes."""
    batch = arrays[0].shape[:-2]
    results = [function(*(array[index] for array in arrays)) for index in np.ndindex(*batch)]
    return np.array(results).reshape(batch + np.shape(results[0]))


def median_bandwidth(samples):
    distances = []
    for i in range(len(samples)):
        for j in range(i):
            distances.append(np.sqrt(np.sum((samples[i] - samples[j]) ** 2)))
    root_mean_square = np.sqrt(np.mean(np.square(distances)))
    if root_mean_square == 0:
        return 1.0
    return max(
        sorted(distances)[(len(distances) - 1) // 2],
        np.finfo(np.float64).eps ** 0.25 * root_mean_square,
    )


def whitening(samples, whiten=True):
    """Mean and Cholesky factor of the regularised covariance (the unit matrix if not to whiten)."""
    mean = sum(samples) / len(samples)
    covariance = sum(np.outer(x - mean, x - mean) for x in samples) / len(samples)
    if not whiten:
        return mean, np.eye(len(mean))
    variances = np.diag(covariance)
    if np.any(variances == 0):
        raise ValueError("the oracle needs samples that differ in every coordinate")
    delta = np.sqrt(np.finfo(np.float64).eps)
    return mean, np.linalg.cholesky(covariance + delta * np.diag(variances))


def in_whitened_coordinates(estimate):
    """Estimate ``(samples, points, kernel) -> score at the points`` in whitened coordinates.

    A kernel is named; ``bandwidth`` is of whitened samples, the median distance if it is None.
    """

    def wrapped(samples, points=None, *, kernel="IMQ", bandwidth=None, whiten=True, **options):
        mean, factor = whitening(samples, whiten)
        whitened = np.array([np.linalg.solve(factor, x - mean) for x in samples])
        h = median_bandwidth(whitened) if bandwidth is None else bandwidth
        if points is not None:
            points = np.array([np.linalg.solve(factor, y - mean) for y in points])
        scores = estimate(whitened, points, Kernel(kernel, h), **options)
        return np.array([np.linalg.solve(factor.T, g) for g in scores])

    return wrapped


def gram(kernel, samples):
    return np.array([[kernel.value(x, y) for y in samples] for x in samples])


def stein_sums(kernel, samples):
    """<grad, K>_i = sum_k grad_{x_k} k(x_i, x_k)."""
    return np.array([sum(kernel.gradient(y, x) for y in samples) for x in samples])


@in_whitened_coordinates
def stein(samples, points, kernel, *, ridge=0.01):
    def fit(samples):
        matrix = gram(kernel, samples) + ridge * np.eye(len(samples))
        return -np.linalg.solve(matrix, stein_sums(kernel, samples))

    if points is None:
        return fit(samples)
    return [fit(np.vstack([samples, y]))[-1] for y in points]


@in_whitened_coordinates
def kde(samples, points, kernel):
    def log_density_gradient(x):
        total = sum(kernel.value(x, y) for y in samples)
        return sum(kernel.gradient(x, y) for y in samples) / total

    return [log_density_gradient(x) for x in (samples if points is None else points)]


@in_whitened_coordinates
def spectral(samples, points, kernel, *, num_eigenfunctions=None, energy=0.99):
    size = len(samples)
    eigenvalues, eigenvectors = np.linalg.eigh(gram(kernel, samples))
    order = np.argsort(-eigenvalues)
    if num_eigenfunctions is None:
        num_eigenfunctions = 1
        while sum(eigenvalues[order[:num_eigenfunctions]]) < energy * sum(eigenvalues):
            num_eigenfunctions += 1

    def eigenfunction(x, j):
        terms = [eigenvectors[m, j] * kernel.value(x, samples[m]) for m in range(size)]
        return np.sqrt(size) / eigenvalues[j] * sum(terms)

    def gradient_of_eigenfunction(x, j):
        terms = [eigenvectors[m, j] * kernel.gradient(x, samples[m]) for m in range(size)]
        return np.sqrt(size) / eigenvalues[j] * sum(terms)

    scores = np.zeros_like(samples if points is None else points)
    for j in order[:num_eigenfunctions]:
        beta = -sum(gradient_of_eigenfunction(x, j) for x in samples) / size
        for i, x in enumerate(samples if points is None else points):
            scores[i] += beta * eigenfunction(x, j)
    return scores


def density_of_kernel_form(kernel, samples, points, quadratic, linear, ridge):
    """Score of sum_k a_k k(x, x_k) with a minimising a'Qa / 2 + a'l and a relative ridge."""
    matrix = quadratic + ridge * np.mean(np.diag(quadratic)) * np.eye(len(samples))
    coefficients = np.linalg.solve(matrix, -linear)
    pairs = list(zip(samples, coefficients, strict=True))
    return [sum(a * kernel.gradient(y, x) for x, a in pairs) for y in points]


@in_whitened_coordinates
def parametric_stein(samples, points, kernel, *, ridge=0.01):
    size, matrix = len(samples), gram(kernel, samples)
    stein = stein_sums(kernel, samples)
    gradients = [[kernel.gradient(x, y) for y in samples] for x in samples]
    # The V-statistic of the kernel Stein discrepancy, with the scores sum_k a_k gradients[i][k].
    quadratic, linear = np.zeros((size, size)), np.zeros(size)
    for k in range(size):
        linear[k] = sum(gradients[i][k] @ stein[i] for i in range(size))
        for j in range(size):
            for i in range(size):
                for m in range(size):
                    quadratic[k, j] += matrix[i, m] * gradients[i][k] @ gradients[m][j]
    points = samples if points is None else points
    return density_of_kernel_form(kernel, samples, points, quadratic, linear, ridge)


@in_whitened_coordinates
def score_matching(samples, points, kernel, *, ridge=0.1):
    size = len(samples)
    gradients = [[kernel.gradient(x, y) for y in samples] for x in samples]
    quadratic, linear = np.zeros((size, size)), np.zeros(size)
    for k in range(size):
        linear[k] = sum(np.trace(kernel.hessian(x, samples[k])) for x in samples)
        for j in range(size):
            quadratic[k, j] = sum(gradients[i][k] @ gradients[i][j] for i in range(size))
    points = samples if points is None else points
    return density_of_kernel_form(kernel, samples, points, quadratic, linear, ridge)


def mean_divergence(kernel, samples, x):
    """zeta(x)"""
    return sum(kernel.divergence(x, y) for y in samples) / len(samples)


@in_whitened_coordinates
def kernel_exponential_family(samples, points, kernel, *, ridge=0.1):
    size = len(samples)
    regularisation = ridge / size  # lambda
    blocks = np.block([[kernel.curl_free(x, y) for y in samples] for x in samples])
    at_samples = np.concatenate([mean_divergence(kernel, samples, x) for x in samples])
    system = blocks + size * regularisation * np.eye(len(blocks))
    coefficients = np.linalg.solve(system, at_samples / regularisation).reshape(size, -1)

    def score(x):
        field = sum(kernel.curl_free(x, y) @ c for y, c in zip(samples, coefficients, strict=True))
        return field - mean_divergence(kernel, samples, x) / regularisation

    return [score(x) for x in (samples if points is None else points)]


@in_whitened_coordinates
def nu_method(samples, points, kernel, *, num_iterations=30, nu=1.0):
    # The iteration for the function itself, known by its values at the samples and at the points.
    size = len(samples)
    everywhere = samples if points is None else np.vstack([samples, points])
    blocks = [[kernel.curl_free(x, y) for y in samples] for x in everywhere]
    zeta = np.array([mean_divergence(kernel, samples, x) for x in everywhere])
    before, scores = np.zeros_like(zeta), np.zeros_like(zeta)
    for t in range(1, num_iterations + 1):
        u = (t - 1) * (2 * t - 3) * (2 * t + 2 * nu - 1)
        u /= (t + 2 * nu - 1) * (2 * t + 4 * nu - 1) * (2 * t + 2 * nu - 3)
        omega = 4 * (2 * t + 2 * nu - 1) * (t + nu - 1)
        omega /= (t + 2 * nu - 1) * (2 * t + 4 * nu - 1)
        image = np.array([sum(row[m] @ scores[m] for m in range(size)) / size for row in blocks])
        before, scores = scores, scores + u * (scores - before) - omega * (image + zeta)
    return scores if points is None else scores[size:]


def gaussian_score(points, mean, covariance):
    return -np.linalg.solve(covariance, (points - mean).T).T


def mixture_score(points, weights, means, scale):
    """Score of a mixture of spherical Gaussians of one scale."""
    scores = []
    for x in points:
        terms = [
            w * np.exp(-np.sum((x - m) ** 2) / (2 * scale**2))
            for w, m in zip(weights, means, strict=True)
        ]
        pulls = [(m - x) / scale**2 for m in means]
        scores.append(sum(t * p for t, p in zip(terms, pulls, strict=True)) / sum(terms))
    return np.array(scores)


def knn_entropy(samples, num_neighbors=3):
    """Kozachenko-Leonenko, with the radius of the ball that holds k neighbours of each sample."""
    num_samples, dim = samples.shape
    k = min(num_neighbors, num_samples - 1)
    log_radii = []
    for i in range(num_samples):
        distances = [math.dist(samples[i], samples[j]) for j in range(num_samples) if j != i]
        log_radii.append(math.log(sorted(distances)[k - 1]))
    log_volume = dim / 2 * math.log(math.pi) - math.lgamma(dim / 2 + 1)
    # psi(N) - psi(k) of integers is a sum of reciprocals.
    difference = sum(1 / n for n in range(k, num_samples))
    return difference + log_volume + dim * np.mean(log_radii)


def calibrate(samples, scores):
    """Scores with Stein's identity for linear functions imposed, by the whitening's covariance."""
    mean, factor = whitening(samples)
    moment = -sum(np.outer(x - mean, g) for x, g in zip(samples, scores, strict=True))
    missing = np.eye(samples.shape[1]) - moment / len(samples)
    correction = np.linalg.solve(factor @ factor.T, missing)
    return np.array([g - (x - mean) @ correction for x, g in zip(samples, scores, strict=True)])


def stein_identity(samples, scores):
    mean = sum(samples) / len(samples)
    return -sum(np.outer(s, x - mean) for x, s in zip(samples, scores, strict=True)) / len(samples)


def shrinkage(samples, scores):
    mean = sum(samples) / len(samples)
    total = sum(g @ (x - mean) for x, g in zip(samples, scores, strict=True))
    return -total / samples.size


def kernel_stein_discrepancy(samples, scores, *, kernel="IMQ", bandwidth=None, whiten=True):
    mean, factor = whitening(samples, whiten)
    points = np.array([np.linalg.solve(factor, x - mean) for x in samples])
    scores = np.array([factor.T @ s for s in scores])
    kernel = Kernel(kernel, median_bandwidth(points) if bandwidth is None else bandwidth)

    def stein_kernel(x, y, s, t):
        # Derivatives in y are those in x with the other sign.
        value = s @ t * kernel.value(x, y) - np.trace(kernel.hessian(x, y))
        return value - s @ kernel.gradient(x, y) + t @ kernel.gradient(x, y)

    pairs = list(zip(points, scores, strict=True))
    total = sum(stein_kernel(x, y, s, t) for x, s in pairs for y, t in pairs)
    return np.sqrt(total) / len(samples)


def sliced_wasserstein(samples, reference, directions):
    """Each draw repeated until both sets have as many, matched in order."""
    size = math.lcm(len(samples), len(reference))
    squares = []
    for direction in directions:
        left = np.repeat(np.sort([direction @ x for x in samples]), size // len(samples))
        right = np.repeat(np.sort([direction @ y for y in reference]), size // len(reference))
        squares.append(np.mean((left - right) ** 2))
    return np.sqrt(np.mean(squares))
