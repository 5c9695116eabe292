"""Estimators for discrete states against the NumPy oracle, and the claims of their docstrings."""

import numpy as np
import pytest

from tests.oracles import discrete as oracle

# name -> (factory and its arguments, all states, shape of theta of one datum)
SOLVERS = {
    "top_k": (("top_k", 2), oracle.subsets(5, 2), (5,)),
    "one_hot_argmax": (("one_hot_argmax",), oracle.subsets(4, 1), (4,)),
    "threshold": (("threshold",), oracle.bits(), ()),
    "ranking": (("ranking",), oracle.rankings(4), (4,)),
    "spanning_tree": (("spanning_tree",), oracle.spanning_trees(4), (4, 4)),
    "assignment": (("assignment",), oracle.assignments(3), (3, 3)),
    "shortest_path": (("shortest_path",), oracle.grid_paths(2, 4), (2, 4)),
}
every_solver = pytest.mark.parametrize("name", SOLVERS)
BATCH = (2, 3)


def make_solver(backend, name):
    factory, *arguments = SOLVERS[name][0]
    return getattr(backend.estimators, factory)(*arguments)


def fixed_noise(backend, values):
    """Noise that is always the same."""
    values = backend.array(values)

    class Fixed(backend.estimators.Noise):
        def sample_like(self, *arguments, generator=None):
            return values

    return Fixed()


def key_for(backend, seed=0):
    """What a draw takes first: a key in JAX, nothing in torch, whose generator is seeded."""
    if backend.host == "numpyro":
        import jax

        return (jax.random.key(seed),)
    import torch

    torch.manual_seed(seed)
    return ()


def draw(backend, estimator, theta, solver, *, seed=0, **options):
    return estimator.sample(*key_for(backend, seed), theta, solver, **options)


def perturb_and_map(backend, theta, solver, *, seed=0, **options):
    function = backend.estimators.perturb_and_map
    return function(*key_for(backend, seed), backend.array(theta), solver, **options)


def scores(name, rng, batch=BATCH):
    """Theta and noise of a batch; costs of a path stay positive under any step of these tests."""
    shape = batch + SOLVERS[name][2]
    if name == "shortest_path":
        return -rng.uniform(8, 9, size=shape), rng.uniform(-1, 1, size=shape)
    return rng.normal(size=shape), rng.gumbel(size=shape)


def objective_gradient(z, matrix):
    """dL/dz of the quadratic objective z' M z / 2, with M symmetric."""
    return (matrix @ z.ravel()).reshape(z.shape)


def quadratic(backend, rng, shape):
    """A quadratic objective of a batch of states, and its matrix."""
    size = int(np.prod(shape))
    matrix = rng.normal(size=(size, size))
    matrix = matrix @ matrix.T
    constant = backend.array(matrix)

    def objective(z):
        flat = z.reshape(-1, size)
        return ((flat @ constant) * flat).sum() / 2

    return objective, matrix


def evaluate(backend, function, *arrays):
    """``function`` of NumPy arrays, in JAX compiled as a whole, which takes less time."""
    arrays = [backend.array(array) for array in arrays]
    if backend.host == "numpyro":
        return backend.numpy(backend.compiled(function)(*arrays))
    return backend.numpy(function(*arrays))


def every_datum(function, batch, *arrays):
    """``function`` of every element of the batch axes."""
    results = [function(*(a[i] for a in arrays)) for i in np.ndindex(*batch)]
    return np.array(results).reshape(batch + np.shape(results[0]))


# Solvers


@every_solver
def test_solver_finds_the_maximum(backend, name):
    theta, noise = scores(name, np.random.default_rng(0))
    solver, states = make_solver(backend, name), SOLVERS[name][1]

    solved = backend.numpy(solver(backend.array(theta + noise)))

    desired = every_datum(lambda t: oracle.maximiser(states, t), BATCH, theta + noise)
    np.testing.assert_array_equal(solved, desired)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [0.0, 1000.0, -1000.0])
def test_ties_give_exactly_k_ones(backend, dtype, value):
    theta = backend.array(np.full((3, 6), value, dtype=dtype))

    states = backend.numpy(backend.estimators.top_k(4)(theta))
    one_hot = backend.numpy(backend.estimators.one_hot_argmax()(theta))

    assert states.dtype == one_hot.dtype == dtype
    np.testing.assert_array_equal(states.sum(axis=-1), 4)
    np.testing.assert_array_equal(one_hot.sum(axis=-1), 1)
    assert set(np.unique(states)) == {0, 1}


@pytest.mark.parametrize(("num_items", "k"), [(83, 5), (400, 20), (50, 20)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_largest_of_many_rows(backend, dtype, num_items, k):
    """Of arrays so large that they are searched another way; tied, huge, and in order."""
    rng = np.random.default_rng(0)
    theta = rng.normal(size=(6, 80, num_items)).astype(dtype)
    theta[1] = rng.integers(3, size=theta[1].shape)
    theta[2] = rng.choice([-1000, 0, 1000], size=theta[2].shape)
    theta[3] = np.sort(theta[3], axis=-1)
    theta[4] = -np.sort(theta[4], axis=-1)
    theta[5, :, :-3] = np.finfo(dtype).min

    states = backend.numpy(backend.estimators.top_k(k).solve(backend.array(theta)))

    assert set(np.unique(states)) == {0, 1}
    np.testing.assert_array_equal(states.sum(axis=-1), k)
    largest = np.sort(theta, axis=-1)[..., -k:]
    chosen = np.sort(theta[states == 1].reshape(*theta.shape[:2], k), axis=-1)
    np.testing.assert_array_equal(chosen, largest)


def test_path_across_free_cells(backend):
    """Cells that cost nothing or less are edges all the same."""
    theta = backend.array(np.array([[0.0, -5.0, 1.0], [0.0, -5.0, 0.0], [-5.0, 0.0, 0.0]]))

    state = backend.numpy(backend.estimators.shortest_path()(theta))

    np.testing.assert_array_equal(state * [[0, 1, 0], [0, 1, 0], [1, 0, 0]], 0)
    assert state[0, 0] == state[2, 2] == 1


def test_solver_of_numpy_functions(backend):
    """A function of one datum, and one of the whole batch, with the batch in any number of axes."""
    calls = []

    def one(theta):
        calls.append(theta.shape)
        theta -= theta.max()  # may be overwritten
        return theta == 0

    numpy_solver = backend.estimators.numpy_solver
    theta = np.random.default_rng(0).normal(size=(2, 3, 4))
    desired = every_datum(lambda t: oracle.maximiser(oracle.subsets(4, 1), t), (2, 3), theta)

    given = backend.array(theta)
    np.testing.assert_array_equal(backend.numpy(numpy_solver(one)(given)), desired)
    np.testing.assert_array_equal(backend.numpy(given), theta)
    assert set(calls) == {(4,)}

    def batched(theta):
        calls.append(theta.shape)
        return (theta == theta.max(axis=-1, keepdims=True)).astype(int)

    whole = numpy_solver(batched, batched=True)
    np.testing.assert_array_equal(backend.numpy(whole(given)), desired)
    assert calls[-1] == (6, 4)


@pytest.mark.parametrize("estimator", ["IMLE", "StraightThrough", "GumbelSoftmaxST"])
def test_solver_is_never_differentiated(backend, estimator):
    theta = np.random.default_rng(0).normal(size=(3, 4))
    solver = backend.estimators.one_hot_argmax()
    bomb = solver._replace(solve=gradient_bomb(backend, solver.solve))
    with pytest.raises(RuntimeError, match="was differentiated"):
        backend.gradients(bomb.solve, theta)  # the bomb works

    estimator = getattr(backend.estimators, estimator)()
    weights = backend.array(np.arange(4.0))
    (gradient,) = backend.gradients(
        lambda t: (draw(backend, estimator, t, bomb) * weights).sum(), theta
    )

    assert np.abs(gradient).max() > 0


def gradient_bomb(backend, solve):
    message = "the solver was differentiated"
    if backend.host == "numpyro":
        import jax

        @jax.custom_jvp
        def bomb(theta):
            return solve(theta)

        @bomb.defjvp
        def explode(primals, tangents):
            raise RuntimeError(message)

        return bomb
    import torch

    class Bomb(torch.autograd.Function):
        @staticmethod
        def forward(ctx, theta):
            return solve(theta)

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError(message)

    return Bomb.apply


# IMLE


@pytest.mark.parametrize("symmetric", [True, False])
@every_solver
def test_imle_equals_the_oracle(backend, name, symmetric):
    rng = np.random.default_rng(0)
    theta, noise = scores(name, rng)
    _, states, shape = SOLVERS[name]
    objective, matrix = quadratic(backend, rng, shape)
    estimator = backend.estimators.IMLE(
        step_size=0.8,
        symmetric=symmetric,
        noise=fixed_noise(backend, 2 * noise),
        temperature=0.5,
    )

    (gradient,) = backend.gradients(
        lambda t: objective(draw(backend, estimator, t, make_solver(backend, name))), theta
    )

    def of_datum(theta, noise):
        dy = objective_gradient(oracle.maximiser(states, theta + noise), matrix)
        return oracle.imle(states, theta, noise, dy, step_size=0.8, symmetric=symmetric)

    desired = every_datum(of_datum, BATCH, theta, noise)
    assert np.abs(desired).max() > 0
    np.testing.assert_allclose(gradient, desired, atol=1e-12)


def test_scale_does_not_depend_on_the_number_of_samples(backend):
    """The mean over S draws has the mean of the gradients of each, at the same step size."""
    rng = np.random.default_rng(0)
    theta, noise = rng.normal(size=(3, 5)), rng.gumbel(size=(4, 3, 5))
    objective, _ = quadratic(backend, rng, (5,))

    def gradient_of(noise, **options):
        estimator = backend.estimators.IMLE(step_size=0.3, noise=fixed_noise(backend, noise))
        num_samples = options.get("num_samples", 1)
        (gradient,) = backend.gradients(
            lambda t: (
                objective(draw(backend, estimator, t, backend.estimators.top_k(2), **options))
                / num_samples
            ),
            theta,
        )
        return gradient

    together = gradient_of(noise, num_samples=4)

    each = [gradient_of(one) for one in noise]
    assert np.abs(together).max() > 0
    np.testing.assert_allclose(together, np.mean(each, axis=0), atol=1e-12)


def expected_gradient(backend, estimator, theta, k, objective, number=2**18):
    """Expectation of the gradient over Gumbel noise, by points that fill its space evenly."""
    points = oracle.gumbel_points(number, len(theta))
    estimator = estimator(fixed_noise(backend, points))
    zeros = backend.array(np.zeros(points.shape))
    (gradient,) = backend.gradients(
        lambda t: objective(draw(backend, estimator, t + zeros, backend.estimators.top_k(k))),
        theta,
    )
    return gradient / number


def relative_error(actual, desired):
    return np.linalg.norm(actual - desired) / np.linalg.norm(desired)


@pytest.mark.parametrize(("n", "k"), [(3, 1), (4, 2)])
def test_imle_is_unbiased_in_the_limit_for_quadratic_objectives(backend, n, k):
    rng = np.random.default_rng(0)
    theta, states = rng.normal(size=n), oracle.subsets(n, k)
    matrix = rng.normal(size=(n, n))
    matrix = (matrix + matrix.T) / 2

    def objective(z):
        return ((z @ backend.array(matrix)) * z).sum() / 2

    exact = oracle.expectation_gradient(
        oracle.plackett_luce_subset, states, theta, lambda z: z @ matrix @ z / 2
    )

    def error(step_size, **options):
        actual = expected_gradient(
            backend,
            lambda noise: backend.estimators.IMLE(step_size=step_size, noise=noise, **options),
            theta,
            k,
            objective,
        )
        return relative_error(actual, exact)

    # The bias falls about as the step size does, of which a quarter is left.
    large, small = error(0.4), error(0.1)
    assert large > 0.05
    assert small < 0.4 * large
    assert error(0.05) < 0.03
    # A forward difference keeps its bias.
    assert error(0.05, symmetric=False) > 0.15


def test_imle_of_one_hot_states_is_reinmax_in_the_limit(backend):
    """For an objective that is not quadratic, where both have the same bias."""
    rng = np.random.default_rng(1)
    theta, weights = rng.normal(size=3), backend.array(np.array([2.0, -1.0, 0.5]))

    def objective(z):
        return ((z * weights).sum(-1) ** 3 + (z[..., 0] * 2 - z[..., 2]) ** 5).sum()

    def value(z):
        return (z @ np.array([2.0, -1.0, 0.5])) ** 3 + (z[0] * 2 - z[2]) ** 5

    states = oracle.subsets(3, 1)
    probabilities = oracle.softmax(theta)
    (dy,) = backend.gradients(objective, np.eye(3))
    reinmax = sum(probabilities[i] * oracle.reinmax(theta, np.eye(3)[i], dy[i]) for i in range(3))
    exact = oracle.expectation_gradient(oracle.plackett_luce_subset, states, theta, value)
    # Steps in proportion to the objective's large gradient.
    actual = expected_gradient(
        backend,
        lambda noise: backend.estimators.IMLE(step_size=0.0005, noise=noise),
        theta,
        1,
        objective,
    )

    assert relative_error(actual, reinmax) < 0.03
    assert relative_error(reinmax, exact) > 0.2


# Adaptive IMLE


@pytest.mark.parametrize("relative", [True, False])
@every_solver
def test_adaptive_imle_equals_the_oracle(backend, name, relative):
    rng = np.random.default_rng(0)
    step = 0.2 if name == "shortest_path" else 0.8
    theta, noise = scores(name, rng)
    theta[1, 1] *= 1e-3 if name != "shortest_path" else 1.0  # shorter than the temperature
    _, states, shape = SOLVERS[name]
    objective, matrix = quadratic(backend, rng, shape)
    used = np.ones(BATCH + shape)
    used[0, 2] = 0  # a datum without gradient
    used[0, 1].flat[1:] = 0  # and one with a single entry that has one
    estimator = backend.estimators.AdaptiveIMLE(
        noise=fixed_noise(backend, 2 * noise),
        temperature=0.5,
        initial_step=step,
        relative=relative,
    )
    state, mask = estimator.init(backend.array(theta)), backend.array(used)

    def loss(t, counts):
        z = draw(backend, estimator, t, make_solver(backend, name), state=state, counts=counts)
        return objective(z * mask)

    gradient, counts = backend.gradients(loss, theta, np.zeros(2))

    results = []
    for index in np.ndindex(*BATCH):
        z = oracle.maximiser(states, theta[index] + noise[index])
        dy = objective_gradient(z * used[index], matrix) * used[index]
        results.append(
            oracle.adaptive_imle(
                states,
                theta[index],
                noise[index],
                dy,
                relative_step=step,
                temperature=0.5,
                relative=relative,
                is_of_bits=name == "threshold",
            )
        )
    desired = np.array([gradient for gradient, *_ in results]).reshape(theta.shape)
    assert np.abs(desired).max() > 0
    np.testing.assert_allclose(gradient, desired, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(counts, np.sum([result[1:] for result in results], axis=0))


@pytest.mark.parametrize("multiplicative", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_adaptive_update_equals_the_oracle(backend, multiplicative, momentum):
    options = {
        "target": 0.4,
        "rate": 0.3,
        "decay": 0.7,
        "momentum": momentum,
        "multiplicative": multiplicative,
    }
    estimator = backend.estimators.AdaptiveIMLE(initial_step=0.4, **options)
    state = estimator.init(backend.array(np.zeros(1)))
    desired = (0.4, 0.4, 0.0)
    for counts in ([0, 5], [5, 5], [4, 4], [0, 0], [1, 4], [3, 3], [2, 3], [0, 3]):
        state = estimator.update(state, backend.array(np.array(counts, dtype=float)))
        desired = oracle.adaptive_update(desired, counts, **options)
        np.testing.assert_allclose([backend.numpy(x) for x in state], desired, atol=1e-14)


def test_adaptive_step_stays_in_bounds(backend):
    estimator = backend.estimators.AdaptiveIMLE(rate=5.0)
    for counts, bound in (([0, 1], 1e3), ([100, 1], 1e-6)):
        state = estimator.init(backend.array(np.zeros(1)))
        for _ in range(6):
            state = estimator.update(state, backend.array(np.array(counts, dtype=float)))
        np.testing.assert_allclose(backend.numpy(state.relative_step), bound)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_adaptive_state_is_restored_bit_for_bit(backend, dtype):
    estimator = backend.estimators.AdaptiveIMLE()
    solver, theta = backend.estimators.top_k(2), np.random.default_rng(0).normal(size=(6, 5))
    theta = theta.astype(dtype)
    objective, _ = quadratic(backend, np.random.default_rng(1), (5,))

    def step(state, seed):
        def loss(t, counts):
            z = draw(backend, estimator, t, solver, seed=seed, state=state, counts=counts)
            return objective(z if dtype == np.float64 else in_double(backend, z))

        gradient, counts = backend.gradients(loss, theta, np.zeros(2, dtype))
        return estimator.update(state, backend.array(counts)), gradient

    state = estimator.init(backend.array(theta))
    for seed in range(3):
        state, _ = step(state, seed)
    saved = [backend.numpy(x).tobytes() for x in state]
    restored = type(state)(*(backend.array(np.frombuffer(x, dtype)[0]) for x in saved))
    for seed in range(3, 6):
        state, gradient = step(state, seed)
        restored, again = step(restored, seed)
        np.testing.assert_array_equal(gradient, again)
        assert [backend.numpy(x).tobytes() for x in state] == [
            backend.numpy(x).tobytes() for x in restored
        ]
    assert backend.numpy(state.relative_step).dtype == dtype


def in_double(backend, z):
    return z.double() if backend.host == "pyro" else z.astype(float)


def test_a_datum_does_not_depend_on_its_batch(backend):
    rng = np.random.default_rng(0)
    theta, noise = rng.normal(size=(5, 6)), rng.gumbel(size=(5, 6))
    theta[1] *= 1000
    objective, _ = quadratic(backend, rng, (6,))

    def gradient_of(rows):
        noise_of_rows = fixed_noise(backend, noise[rows])
        estimator = backend.estimators.AdaptiveIMLE(initial_step=0.5, noise=noise_of_rows)
        state = estimator.init(backend.array(theta))
        (gradient,) = backend.gradients(
            lambda t: objective(
                draw(backend, estimator, t, backend.estimators.top_k(3), state=state)
            ),
            theta[rows],
        )
        return gradient

    whole = gradient_of(slice(None))

    assert np.abs(whole).max() > 0
    for i in range(5):
        np.testing.assert_allclose(gradient_of(slice(i, i + 1))[0], whole[i], rtol=1e-12)


# What IMLE is compared with


def with_noise(name):
    return name in ("StraightThrough", "GumbelSoftmaxST")


@pytest.mark.parametrize("k", [1, 2, 4])
def test_marginals_of_subsets(backend, k):
    theta = np.random.default_rng(0).normal(size=(3, 5)) * 3
    states = oracle.subsets(5, k)
    marginals = backend.estimators.top_k(k).marginals
    dy = np.random.default_rng(1).normal(size=(3, 5))

    value = evaluate(backend, marginals, theta)
    (product,) = backend.gradients(lambda t: (marginals(t) * backend.array(dy)).sum(), theta)

    desired = every_datum(lambda t: oracle.mean(states, t), (3,), theta)
    np.testing.assert_allclose(value, desired, atol=1e-12)
    desired = every_datum(lambda t, d: oracle.covariance(states, t) @ d, (3,), theta, dy)
    np.testing.assert_allclose(product, desired, atol=1e-12)


def test_marginals_of_trees(backend):
    """Of theta that need not be symmetric; mapped over data as well as of a batch."""
    theta = np.random.default_rng(0).normal(size=(3, 4, 4))
    states, marginals = oracle.spanning_trees(4), backend.estimators.spanning_tree().marginals
    dy = np.random.default_rng(1).normal(size=(3, 4, 4))

    value = evaluate(backend, marginals, theta)
    mapped = evaluate(backend, backend.vmap(marginals), theta)
    (product,) = backend.gradients(lambda t: (marginals(t) * backend.array(dy)).sum(), theta)

    desired = every_datum(lambda t: oracle.mean(states, t), (3,), theta)
    np.testing.assert_allclose(value, desired, atol=1e-12)
    np.testing.assert_allclose(mapped, desired, atol=1e-12)
    desired = every_datum(lambda t, d: oracle.covariance(states, t) @ d.ravel(), (3,), theta, dy)
    np.testing.assert_allclose(product, desired.reshape(theta.shape), atol=1e-12)


def test_straight_through_trees_has_the_gradient_of_the_mean(backend):
    """Of the exponential family, at the temperature, whatever the draws."""
    rng = np.random.default_rng(0)
    theta, noise, weights = rng.normal(size=(2, 4, 4)), rng.gumbel(size=(4, 4)), rng.normal(size=16)
    states, solver = oracle.spanning_trees(4), backend.estimators.spanning_tree()
    estimator = backend.estimators.StraightThrough(
        noise=fixed_noise(backend, noise), temperature=0.5
    )

    def loss(theta):
        z = draw(backend, estimator, theta, solver).reshape(2, 16)
        return ((z @ backend.array(weights)) ** 2).sum()

    (gradient,) = backend.gradients(loss, theta)

    def of_datum(theta):
        z = oracle.maximiser(states, theta + noise / 2).ravel()
        dy = 2 * (z @ weights) * weights
        return (oracle.covariance(states, 2 * theta) @ dy).reshape(4, 4) * 2

    desired = every_datum(of_datum, (2,), theta)
    assert np.abs(desired).max() > 0.1
    np.testing.assert_allclose(gradient, desired, atol=1e-12)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_marginals_of_hard_scores(backend, k):
    """Float32, +-1000 and ties; all items chosen."""
    theta = np.zeros((2, 7), np.float32)
    theta[0, :2] = 1000, -1000
    marginals = backend.estimators.top_k(k).marginals

    value = evaluate(backend, marginals, theta)
    (gradient,) = backend.gradients(lambda t: marginals(t)[..., 2].sum(), theta)

    np.testing.assert_allclose(value.sum(axis=-1), k, rtol=1e-5)
    np.testing.assert_allclose(value[1], k / 7, rtol=1e-5)
    np.testing.assert_allclose(value[0, :2], [1, k == 7], atol=1e-5)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(("n", "k"), [(1, 1), (30, 7), (200, 100)])
def test_marginals_beside_excluded_items(backend, n, k):
    """Float32: of many items, and with as many more that are never in, which change nothing."""
    theta = np.random.default_rng(0).normal(size=(2, n)).astype(np.float32)
    theta[1] = 3.0
    solver = backend.estimators.top_k(k)
    weights = np.arange(2 * n, dtype=np.float32) / n

    def marginals_and_product(theta):
        weighted = backend.array(weights[: theta.shape[-1]])
        (product,) = backend.gradients(lambda t: (solver.marginals(t) * weighted).sum(), theta)
        return evaluate(backend, solver.marginals, theta), product

    alone, product = marginals_and_product(theta)
    excluded = np.full((2, n), -1e6, np.float32)
    both, product_of_both = marginals_and_product(np.concatenate([theta, excluded], axis=1))
    drawn = solver.draw(*key_for(backend), backend.array(theta), *[None] * (backend.host == "pyro"))

    np.testing.assert_allclose(alone.sum(axis=-1), k, rtol=1e-5)
    np.testing.assert_allclose(alone[1], k / n, rtol=1e-5)
    np.testing.assert_allclose(both[:, :n], alone, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(both[:, n:], 0)
    np.testing.assert_allclose(product_of_both[:, :n], product, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(backend.numpy(drawn).sum(axis=-1), k)


@pytest.mark.parametrize("name", ["StraightThrough", "GumbelSoftmaxST", "ReinMax", "SIMPLE"])
def test_gradients_of_one_hot_states(backend, name):
    rng = np.random.default_rng(0)
    theta, noise = rng.normal(size=(6, 4)), rng.gumbel(size=(6, 4))
    objective, matrix = quadratic(backend, rng, (4,))
    options = {"noise": fixed_noise(backend, noise)} if with_noise(name) else {}
    if name == "GumbelSoftmaxST":
        options["relaxation"] = 0.7
    estimator = getattr(backend.estimators, name)(**options)
    solver = backend.estimators.one_hot_argmax()

    z = backend.numpy(draw(backend, estimator, backend.array(theta), solver))
    (gradient,) = backend.gradients(lambda t: objective(draw(backend, estimator, t, solver)), theta)

    def of_datum(theta, noise, z):
        dy = matrix @ z
        if name == "ReinMax":
            return oracle.reinmax(theta, z, dy)
        if name == "GumbelSoftmaxST":
            return oracle.covariance_of(oracle.softmax((theta + noise) / 0.7)) @ dy / 0.7
        return oracle.covariance_of(oracle.softmax(theta)) @ dy

    np.testing.assert_array_equal(np.sort(z, axis=-1), [[0, 0, 0, 1]] * 6)
    desired = every_datum(of_datum, (6,), theta, noise, z)
    np.testing.assert_allclose(gradient, desired, atol=1e-12)


def test_reinmax_of_bits_is_that_of_two_classes(backend):
    """A bit with logit t is a one-hot state with scores (t, 0)."""
    theta, estimator = np.random.default_rng(0).normal(size=8), backend.estimators.ReinMax()
    solver = backend.estimators.threshold()

    z = backend.numpy(draw(backend, estimator, backend.array(theta), solver))
    (gradient,) = backend.gradients(
        lambda t: ((draw(backend, estimator, t, solver) + 1) ** 2).sum(), theta
    )

    for t, bit, actual in zip(theta, z, gradient, strict=True):
        state, dy = np.array([bit, 1 - bit]), np.array([2 * (bit + 1), 0.0])
        np.testing.assert_allclose(actual, oracle.reinmax(np.array([t, 0.0]), state, dy)[0])


@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("name", ["top_k", "spanning_tree"])
def test_reinmax_is_unbiased_up_to_quadratic_objectives(backend, name, degree):
    """Summed over all subsets or trees; biased by design for the others."""
    rng = np.random.default_rng(0)
    states, shape = np.array(SOLVERS[name][1]), SOLVERS[name][2]
    theta, weights = rng.normal(size=shape), rng.normal(size=shape)
    drawn, axes = backend.array(states), tuple(range(-len(shape), 0))
    solver = make_solver(backend, name)._replace(draw=lambda *_: drawn)
    probabilities = oracle.exponential_family(states, theta)

    def objective(theta):
        z = draw(backend, backend.estimators.ReinMax(), theta, solver)
        values = ((z * backend.array(weights)).sum(axes) + 1) ** degree
        return (backend.array(probabilities) * values).sum()

    (gradients,) = backend.gradients(objective, np.broadcast_to(theta, states.shape))

    mean, values = oracle.mean(states, theta), ((states * weights).sum(axes) + 1) ** degree
    exact = np.tensordot(probabilities * values, states - mean, axes=1)
    error = relative_error(gradients.sum(axis=0), exact)
    assert error < 1e-12 if degree < 3 else error > 0.01


def test_straight_through_without_a_mean_is_the_identity(backend):
    theta = np.random.default_rng(0).normal(size=(2, 4))
    weights = backend.array(np.arange(4.0))
    estimator, solver = backend.estimators.StraightThrough(), backend.estimators.ranking()

    (gradient,) = backend.gradients(
        lambda t: (draw(backend, estimator, t, solver) * weights).sum(), theta
    )

    np.testing.assert_array_equal(gradient, [np.arange(4.0)] * 2)


@pytest.mark.parametrize("name", ["top_k", "spanning_tree"])
def test_simple_is_exact_for_linear_objectives(backend, name):
    rng, shape = np.random.default_rng(0), SOLVERS[name][2]
    theta, weights = rng.normal(size=shape), rng.normal(size=shape)
    states, solver = SOLVERS[name][1], make_solver(backend, name)

    (gradient,) = backend.gradients(
        lambda t: (
            draw(backend, backend.estimators.SIMPLE(), t, solver) * backend.array(weights)
        ).sum(),
        theta,
    )

    desired = oracle.covariance(states, theta) @ weights.ravel()
    np.testing.assert_allclose(gradient.ravel(), desired, atol=1e-12)


# The laws of the draws


def assert_law(drawn, states, probabilities):
    """Frequencies lie within 4.5 standard errors, in units that would show a wrong law."""
    number = len(drawn)
    for state, p in zip(states, probabilities, strict=True):
        frequency = np.mean(np.all(drawn == state, axis=-1))
        error = np.sqrt(p * (1 - p) / number)
        assert error < 0.01, "uninformative"
        assert abs(frequency - p) < 4.5 * error


@pytest.mark.parametrize("name", ["top_k", "spanning_tree"])
def test_law_of_exact_draws(backend, name):
    rng, (_, states, shape) = np.random.default_rng(0), SOLVERS[name]
    theta, solver = rng.normal(size=shape), make_solver(backend, name)

    drawn = evaluate(
        backend,
        lambda t: draw(backend, backend.estimators.SIMPLE(), t, solver, num_samples=20_000),
        theta,
    )

    drawn, flat = drawn.reshape(20_000, -1), [state.ravel() for state in states]
    assert_law(drawn, flat, oracle.exponential_family(states, theta))


def test_law_of_gumbel_top_k(backend):
    theta, states = np.array([1.0, -0.5, 0.3, 0.0]), oracle.subsets(4, 2)

    drawn = perturb_and_map(backend, theta, backend.estimators.top_k(2), num_samples=20_000)

    probabilities = [oracle.plackett_luce_subset(theta, state) for state in states]
    assert_law(backend.numpy(drawn), states, probabilities)
    # Which is not the exponential family: the test could tell.
    with pytest.raises(AssertionError):
        assert_law(backend.numpy(drawn), states, oracle.exponential_family(states, theta))


def test_law_of_bits_and_of_one_hot_states(backend):
    estimators, theta = backend.estimators, np.array([1.0, -0.5, 0.3])

    bits = perturb_and_map(backend, theta, estimators.threshold(), num_samples=20_000)
    one_hot = perturb_and_map(backend, theta, estimators.one_hot_argmax(), num_samples=20_000)

    for bit, t in zip(backend.numpy(bits).T, theta, strict=True):
        assert_law(bit[:, None], [0, 1], 1 / (1 + np.exp([t, -t])))
    assert_law(backend.numpy(one_hot), list(np.eye(3)), oracle.softmax(theta))


EULER = 0.5772156649015329
MOMENTS = {
    "GumbelNoise": ({}, EULER, np.pi**2 / 6),
    "LogisticNoise": ({}, 0.0, np.pi**2 / 3),
    "GaussianNoise": ({}, 0.0, 1.0),
    # Means and variances of the gamma terms; times k these approach Gumbel's.
    "SumOfGammaNoise": (
        {"num_ones": 4, "num_terms": 30},
        (sum(1 / i for i in range(1, 31)) - np.log(30)) / 4,
        sum(1 / i**2 for i in range(1, 31)) / 4,
    ),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", MOMENTS)
def test_moments_of_noise(backend, name, dtype):
    options, mean, variance = MOMENTS[name]
    noise = getattr(backend.estimators, name)(**options)
    number = 40_000

    drawn = noise.sample_like(*key_for(backend), backend.array(np.zeros((number, 1), dtype)))

    drawn = backend.numpy(drawn)
    assert drawn.dtype == dtype
    assert np.isfinite(drawn).all()
    error = np.sqrt(variance / number)
    assert abs(drawn.mean() - mean) < 4.5 * error
    # The fourth moment of none of these exceeds 5.4 times the squared variance by much.
    assert abs(drawn.var() / variance - 1) < 4.5 * np.sqrt(8 / number)


# Hard input and errors


@pytest.mark.parametrize(
    "name", ["IMLE", "AdaptiveIMLE", "StraightThrough", "GumbelSoftmaxST", "ReinMax", "SIMPLE"]
)
def test_hard_scores_in_float32(backend, name):
    """Scores of +-1000, ties and zeros, and objectives whose gradient is huge, tiny or zero."""
    theta = np.array([[1000, -1000, 0, 0], [0, 0, 0, 0], [1e-30, 0, 0, 0]], np.float32)
    is_adaptive = name == "AdaptiveIMLE"
    estimator = getattr(backend.estimators, name)(**({"initial_step": 20.0} if is_adaptive else {}))
    options = {"state": estimator.init(backend.array(theta))} if is_adaptive else {}
    solver = backend.estimators.one_hot_argmax()
    for scale in (0.0, 1e-25, 1.0, 1e25):
        weights = backend.array((scale * np.arange(4)).astype(np.float32))
        (gradient,) = backend.gradients(
            lambda t, w=weights: (draw(backend, estimator, t, solver, **options) * w).sum(), theta
        )
        assert gradient.dtype == np.float32
        assert np.isfinite(gradient).all()
        if scale == 1.0:
            assert np.abs(gradient[1]).max() > 0


@pytest.mark.parametrize("name", ["IMLE", "AdaptiveIMLE"])
def test_nan_gradient_is_not_hidden(backend, name):
    estimator = getattr(backend.estimators, name)()
    theta = np.zeros((2, 3))
    options = {"state": estimator.init(backend.array(theta))} if name == "AdaptiveIMLE" else {}
    weights = backend.array(np.array([[1.0, 2.0, 3.0], [1.0, np.nan, np.inf]]))
    solver = backend.estimators.top_k(1)

    (gradient,) = backend.gradients(
        lambda t: (draw(backend, estimator, t, solver, **options) * weights).sum(), theta
    )

    assert np.isfinite(gradient[0]).all()
    assert np.isnan(gradient[1]).any()


def test_wrong_arguments(backend):
    estimators, theta = backend.estimators, np.zeros((2, 3))
    top_2, IMLE = estimators.top_k(2), estimators.IMLE
    with pytest.raises(ValueError, match=r"top_k\(4\) needs theta with 4 or more .* \(2, 3\)"):
        perturb_and_map(backend, theta, estimators.top_k(4))
    for wrong in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="needs finite theta"):
            perturb_and_map(backend, theta + wrong, top_2)
    with pytest.raises(TypeError, match=r"floating|Type-check"):  # the latter under test alone
        draw(backend, IMLE(), backend.array(np.zeros(3, int)), top_2)
    with pytest.raises(ValueError, match="2 event axes"):
        draw(backend, IMLE(), backend.array(np.zeros(3)), estimators.assignment())
    with pytest.raises(ValueError, match="a weight for each pair"):
        perturb_and_map(backend, theta, estimators.spanning_tree())
    for make, options in (
        (IMLE, {"step_size": 0.0}),
        (IMLE, {"step_size": float("nan")}),
        (IMLE, {"temperature": -1.0}),
        (estimators.AdaptiveIMLE, {"initial_step": 0.0}),
        (estimators.AdaptiveIMLE, {"decay": 1.0}),
        (estimators.AdaptiveIMLE, {"momentum": -0.1}),
        (estimators.AdaptiveIMLE, {"target": 0.0}),
        (estimators.AdaptiveIMLE, {"target": 1.0}),
        (estimators.StraightThrough, {"temperature": 0.0}),
        (estimators.GumbelSoftmaxST, {"relaxation": 0.0}),
        (estimators.SumOfGammaNoise, {"num_ones": 0}),
        (estimators.top_k, {"k": 0}),
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            make(**options)
    with pytest.raises(ValueError, match="num_samples"):
        perturb_and_map(backend, theta, top_2, num_samples=0)
    for estimator in (
        estimators.GumbelSoftmaxST(),
        estimators.ReinMax(),
        estimators.SIMPLE(),
    ):
        with pytest.raises(ValueError, match="IMLE takes any solver"):
            draw(backend, estimator, backend.array(theta), estimators.ranking())


def test_states_of_a_solver_are_checked(backend):
    estimators, theta = backend.estimators, np.zeros((2, 3))
    with pytest.raises(ValueError, match="entries other than 0 and 1"):
        perturb_and_map(backend, theta, lambda t: t + 0.5)
    with pytest.raises(ValueError, match=r"shape of theta, \(2, 3\), got \(2,\)"):
        perturb_and_map(backend, theta, lambda t: t[:, 0])
    with pytest.raises(TypeError, match="numpy_solver"):
        perturb_and_map(backend, theta, lambda t: np.zeros((2, 3)))
    half = perturb_and_map(
        backend, theta, estimators.Solver(lambda t: 0 * t + 0.5, is_binary=False)
    )
    np.testing.assert_array_equal(backend.numpy(half), 0.5)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda t: t + 0.5, "entries other than 0 and 1"),
        (lambda t: t[:2], r"shape of theta, \(3,\), got \(2,\)"),
        (lambda t: 1 / 0, "division by zero"),
    ],
    ids=["relaxed", "shape", "raises"],
)
def test_errors_on_the_host_reach_the_caller(backend, function, message):
    solver = backend.estimators.numpy_solver(function)
    with pytest.raises(Exception, match=message):
        backend.numpy(perturb_and_map(backend, np.zeros((2, 3)), solver))
