"""Distributions over subsets, rankings and spanning trees against all their values."""

import math
from functools import partial

import numpy as np
import pytest
from scipy.stats import chisquare

from tests.oracles import combinatorial as oracle

# name -> (class, its options, probabilities of all values, shape of the logits of one datum)
LAWS = {
    "k_subset": ("KSubset", {"k": 2}, partial(oracle.k_subset, k=2), (5,)),
    "plackett_luce_subset": (
        "PlackettLuceSubset",
        {"k": 3},
        partial(oracle.plackett_luce_subset, k=3),
        (5,),
    ),
    "plackett_luce": ("PlackettLuce", {}, oracle.plackett_luce, (4,)),
    "spanning_tree": ("SpanningTree", {}, oracle.spanning_tree, (4, 4)),
}
LINEAR = ("k_subset", "spanning_tree")
every_law = pytest.mark.parametrize("name", LAWS)
every_linear_law = pytest.mark.parametrize("name", LINEAR)
BATCH = (2,)


def make(backend, name, logits, **options):
    factory, law_options, _, _ = LAWS[name]
    if isinstance(logits, np.ndarray):
        logits = backend.array(logits)
    return getattr(backend.package, factory)(logits, **law_options, **options)


def scores(name, rng, batch=BATCH, scale=1.0):
    logits = scale * rng.normal(size=batch + LAWS[name][3])
    return logits + np.swapaxes(logits, -1, -2) if name == "spanning_tree" else logits


def tables(name, logits):
    """The probabilities of all values, of each datum."""
    event_dim = len(LAWS[name][3])
    rows = logits.reshape(-1, *logits.shape[logits.ndim - event_dim :])
    return [LAWS[name][2](row) for row in rows]


def evaluate(backend, function, *arrays):
    """``function`` of NumPy arrays, in JAX compiled as a whole, which takes less time."""
    arrays = [backend.array(array) for array in arrays]
    if backend.host == "numpyro":
        return backend.numpy(backend.compiled(function)(*arrays))
    return backend.numpy(function(*arrays))


def sample(backend, site, shape, seed=0):
    if backend.host == "numpyro":
        import jax

        return backend.compiled(lambda key: site.sample(key, shape))(jax.random.key(seed))
    import torch

    torch.manual_seed(seed)
    return site.sample(shape)


def kl_divergence(backend, p, q):
    if backend.host == "numpyro":
        from numpyro.distributions import kl_divergence
    else:
        from torch.distributions import kl_divergence
    return kl_divergence(p, q)


# Log-probabilities


@every_law
def test_log_prob_of_every_value(backend, name):
    logits = scores(name, np.random.default_rng(0), scale=2.0)
    values = np.stack([value for value, _ in tables(name, logits)[0]])

    log_prob = evaluate(
        backend,
        lambda logits, values: make(backend, name, logits).log_prob(values),
        logits,
        values[:, None],
    )

    for i, table in enumerate(tables(name, logits)):
        np.testing.assert_allclose(log_prob[:, i], np.log([p for _, p in table]), atol=1e-12)
    np.testing.assert_allclose(np.exp(log_prob).sum(axis=0), 1, atol=1e-12)


@every_law
def test_gradient_in_logits_at_every_value(backend, name):
    """Of a weighted sum over all values, so that no value's gradient can be wrong unseen."""
    logits = scores(name, np.random.default_rng(0), scale=2.0)
    values = np.stack([value for value, _ in tables(name, logits)[0]])
    weights = np.random.default_rng(1).normal(size=(len(values), 1))

    (gradient,) = backend.gradients(
        lambda logits: (
            make(backend, name, logits).log_prob(backend.array(values[:, None]))
            * backend.array(weights)
        ),
        logits,
    )

    def objective(logits):
        table = LAWS[name][2](logits)
        return sum(w * np.log(p) for w, (_, p) in zip(weights[:, 0], table, strict=True))

    desired = [oracle.gradient(objective, row) for row in logits]
    np.testing.assert_allclose(gradient, desired, atol=1e-10)


@every_linear_law
def test_log_prob_is_linear_in_the_value(backend, name):
    """Also between the values of the support, so that its gradient there says something."""
    logits = scores(name, np.random.default_rng(0), batch=())
    value = np.random.default_rng(1).normal(size=logits.shape)

    (gradient,) = backend.gradients(
        make(backend, name, logits, validate_args=False).log_prob, value
    )

    np.testing.assert_allclose(gradient, logits / 2 if name == "spanning_tree" else logits)


@every_law
def test_enumeration_lists_every_value_once(backend, name):
    logits = scores(name, np.random.default_rng(0), batch=(3, 2))
    site = make(backend, name, logits)

    values = backend.numpy(site.enumerate_support(expand=False))
    expanded = backend.numpy(site.enumerate_support())

    desired = np.stack([value for value, _ in tables(name, logits)[0]])
    assert site.has_enumerate_support
    assert values.shape == (len(desired), 1, 1, *logits.shape[2:])
    assert {v.tobytes() for v in values} == {v.astype(values.dtype).tobytes() for v in desired}
    np.testing.assert_array_equal(expanded, np.broadcast_to(values, expanded.shape))
    assert expanded.shape[1:] == logits.shape


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 5])
def test_enumeration_of_trees(backend, num_nodes):
    """Cayley's number of them, all different."""
    site = backend.package.SpanningTree(backend.array(np.zeros((num_nodes, num_nodes))))

    values = site.enumerate_support()

    assert len({v.tobytes() for v in backend.numpy(values)}) == num_nodes ** max(num_nodes - 2, 0)
    assert backend.numpy(
        site.support(values) if backend.host == "numpyro" else site.support.check(values)
    ).all()
    np.testing.assert_allclose(
        backend.numpy(site.log_prob(values)), -np.log(len(values)), atol=1e-12
    )


# Quadrature


@pytest.mark.parametrize(("n", "k"), [(3, 2), (12, 11), (60, 20), (400, 200)])
def test_subset_of_equal_items(backend, n, k):
    value = np.arange(n) < k

    log_prob = evaluate(
        backend,
        lambda logits: backend.package.PlackettLuceSubset(logits, k).log_prob(
            backend.array(1.0 * value)
        ),
        np.full(n, 3.0),
    )

    np.testing.assert_allclose(log_prob, -math.log(math.comb(n, k)), rtol=0, atol=1e-11)


@pytest.mark.parametrize("scale", [0.01, 5.0, 30.0])
def test_subsets_of_very_different_items(backend, scale):
    """Every subset, of probabilities down to exp(-200)."""
    rng = np.random.default_rng(0)
    logits = scale * rng.uniform(-1, 1, size=(3, 6))
    desired = [oracle.plackett_luce_subset(row, 4) for row in logits]
    values = np.stack([value for value, _ in desired[0]])

    log_prob = evaluate(
        backend,
        lambda logits: backend.package.PlackettLuceSubset(logits, 4).log_prob(
            backend.array(values[:, None])
        ),
        logits,
    )

    desired = np.log([[p for _, p in table] for table in desired]).T
    np.testing.assert_allclose(log_prob, desired, rtol=1e-13, atol=1e-12)


# Moments


@every_linear_law
def test_moments(backend, name):
    logits = scores(name, np.random.default_rng(0), scale=1.5)

    mean = evaluate(backend, lambda logits: make(backend, name, logits).mean, logits)
    variance = evaluate(backend, lambda logits: make(backend, name, logits).variance, logits)

    for i, table in enumerate(tables(name, logits)):
        m = oracle.expectation(table, lambda z: z)
        np.testing.assert_allclose(mean[i], m, atol=1e-12)
        v = oracle.expectation(table, lambda z, m=m: (z - m) ** 2)
        np.testing.assert_allclose(variance[i], v, atol=1e-12)


@every_linear_law
def test_entropy_and_divergence(backend, name):
    """Values and gradients."""
    rng = np.random.default_rng(0)
    logits, others = scores(name, rng, scale=1.5), scores(name, rng)
    law = LAWS[name][2]

    def both(logits, others):
        p, q = make(backend, name, logits), make(backend, name, others)
        return p.entropy() + 3 * kl_divergence(backend, p, q)

    value = evaluate(backend, both, logits, others)
    gradients = backend.gradients(both, logits, others)

    def desired(logits, others):
        p, q = law(logits), law(others)
        return oracle.entropy(p) + 3 * oracle.kl_divergence(p, q)

    for i, (one, other) in enumerate(zip(logits, others, strict=True)):
        np.testing.assert_allclose(value[i], desired(one, other), atol=1e-12)
        np.testing.assert_allclose(
            gradients[0][i], oracle.gradient(lambda t, q=other: desired(t, q), one), atol=1e-10
        )
        np.testing.assert_allclose(
            gradients[1][i], oracle.gradient(lambda t, p=one: desired(p, t), other), atol=1e-10
        )


# Draws


def p_value(drawn, table):
    """Of the hypothesis that the draws are from the table, by Pearson's test."""
    places = {value.astype(drawn.dtype).tobytes(): i for i, (value, _) in enumerate(table)}
    counts = np.bincount([places[z.tobytes()] for z in drawn], minlength=len(table))
    expected = len(drawn) * np.array([p for _, p in table])
    assert expected.min() > 5, "uninformative"
    return chisquare(counts, expected).pvalue


@every_law
def test_law_of_draws(backend, name):
    """Each datum has its own logits."""
    logits = scores(name, np.random.default_rng(1), scale=0.5)
    site = make(backend, name, logits)

    drawn = backend.numpy(sample(backend, site, (20_000,)))

    assert drawn.shape == (20_000, *logits.shape)
    for i, table in enumerate(tables(name, logits)):
        assert p_value(np.ascontiguousarray(drawn[:, i]), table) > 1e-6
        # The draws of the other datum are told apart.
        assert p_value(np.ascontiguousarray(drawn[:, 1 - i]), table) < 1e-12


def test_laws_of_subsets_are_told_apart(backend):
    logits = np.array([1.0, -0.5, 0.3, 0.0, -1.0])
    family = backend.package.KSubset(backend.array(logits), 2)
    in_turn = backend.package.PlackettLuceSubset(backend.array(logits), 2)
    tables = oracle.k_subset(logits, 2), oracle.plackett_luce_subset(logits, 2)

    drawn = [backend.numpy(sample(backend, site, (20_000,))) for site in (family, in_turn)]

    p_values = [[p_value(d, table) for table in tables] for d in drawn]
    assert min(p_values[0][0], p_values[1][1]) > 1e-6
    assert max(p_values[0][1], p_values[1][0]) < 1e-12


def test_law_of_trees_of_five_nodes(backend):
    """And the heaviest trees of perturbed logits have another law."""
    rng = np.random.default_rng(0)
    logits = rng.uniform(-0.7, 0.7, size=(5, 5))
    logits = logits + logits.T
    table = oracle.spanning_tree(logits)
    site = backend.package.SpanningTree(backend.array(logits))

    drawn = backend.numpy(sample(backend, site, (20_000,)))

    assert p_value(drawn, table) > 1e-6
    noise = np.triu(rng.gumbel(size=(16_000, 5, 5)), k=1)
    perturbed = np.triu(logits, k=1) + noise
    heaviest = backend.numpy(backend.estimators.spanning_tree()(backend.array(perturbed)))
    assert p_value(heaviest, table) < 1e-12


def test_winner_of_a_ranking_is_categorical(backend):
    logits = np.array([1.0, -1.0, 0.5])
    site = backend.package.PlackettLuce(backend.array(logits))

    winners = backend.numpy(sample(backend, site, (20_000,)))[:, 0]

    probabilities = np.exp(logits) / np.exp(logits).sum()
    assert chisquare(np.bincount(winners), 20_000 * probabilities).pvalue > 1e-6


def test_ranking_is_the_inverse_of_the_solvers_state(backend):
    logits = np.array([[0.5, 3.0, 1.0, -2.0]])
    # Far apart, the best order is all but certain.
    order = backend.numpy(
        sample(backend, backend.package.PlackettLuce(backend.array(100 * logits)), ())
    )
    state = backend.numpy(backend.estimators.ranking()(backend.array(logits)))

    np.testing.assert_array_equal(order, [[1, 2, 0, 3]])
    np.testing.assert_array_equal(state, 3 - np.argsort(order, axis=-1))


# Shapes and transformations


@every_law
def test_expand(backend, name):
    logits = scores(name, np.random.default_rng(0), batch=(2, 1))
    site = make(backend, name, logits)
    expanded = site.expand((4, 2, 3))

    drawn = sample(backend, expanded, (5,))

    assert tuple(expanded.batch_shape) == (4, 2, 3)
    assert tuple(expanded.event_shape) == LAWS[name][3]
    assert tuple(drawn.shape) == (5, 4, 2, 3, *LAWS[name][3])
    assert len({z.tobytes() for z in backend.numpy(drawn).reshape(120, -1)}) > 5

    def log_probs(logits):
        site = make(backend, name, logits)
        return site.expand((4, 2, 3)).log_prob(drawn) - site.log_prob(drawn)

    np.testing.assert_allclose(evaluate(backend, log_probs, logits), np.zeros((5, 4, 2, 3)))
    if name in LINEAR:
        divergence = evaluate(
            backend,
            lambda t: kl_divergence(backend, make(backend, name, t).expand((4, 2, 3)), site),
            logits,
        )
        np.testing.assert_allclose(divergence, np.zeros((4, 2, 3)), atol=1e-12)


@every_law
def test_vmap_is_the_batch(backend, name):
    logits = scores(name, np.random.default_rng(0), batch=(3,))
    values = backend.numpy(sample(backend, make(backend, name, logits), ()))

    def log_prob(logits, value):
        return make(backend, name, logits).log_prob(value)

    batched = evaluate(backend, log_prob, logits, values)
    mapped = evaluate(backend, backend.vmap(log_prob), logits, values)
    np.testing.assert_allclose(mapped, batched, atol=1e-12)


# Hard input


@every_law
def test_hard_logits_in_float32(backend, name):
    """+-1000 and ties: finite, the digits of float64, and draws in the support."""
    shape = LAWS[name][3]
    logits = np.resize([1000.0, -1000.0, 0.0, 0.0, 500.0], (3, *shape))
    logits[1] = 1000.0
    logits[2] = np.random.default_rng(0).uniform(-1000, 1000, size=shape)
    if name == "spanning_tree":
        logits = np.triu(logits, k=1) + np.swapaxes(np.triu(logits, k=1), -1, -2)
    logits = logits.astype(np.float32)
    easy = np.zeros((1, *shape), np.float32)
    values = np.stack([value for value, _ in LAWS[name][2](easy[0])])[:, None]

    def log_prob(dtype, logits):
        z = backend.array(values if name == "plackett_luce" else values.astype(dtype))
        return make(backend, name, logits).log_prob(z)

    gradients = []
    for dtype in (np.float32, np.float64):
        (gradient,) = backend.gradients(partial(log_prob, dtype), logits.astype(dtype))
        assert gradient.dtype == dtype
        gradients.append(gradient)
    np.testing.assert_allclose(*gradients, rtol=1e-4, atol=2e-3)

    site = make(backend, name, logits)
    drawn = sample(backend, site, (50,))
    value = evaluate(backend, lambda logits: make(backend, name, logits).log_prob(drawn), logits)
    assert value.dtype == np.float32
    assert np.isfinite(value).all()
    if name in LINEAR:
        mean = evaluate(backend, lambda logits: make(backend, name, logits).mean, logits)
        total = mean.sum(axis=tuple(range(1, logits.ndim)))
        np.testing.assert_allclose(total, values[0].sum(), rtol=1e-4)
        (gradient,) = backend.gradients(lambda t: make(backend, name, t).entropy(), logits)
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("factory", ["KSubset", "PlackettLuceSubset"])
@pytest.mark.parametrize("k", [0, 4])
def test_all_or_none(backend, factory, k):
    logits = np.array([1.0, -1000.0, 0.0, 3.0])
    value = np.full(4, float(k == 4))

    def log_prob(logits):
        return getattr(backend.package, factory)(logits, k).log_prob(backend.array(value))

    site = getattr(backend.package, factory)(backend.array(logits), k)
    np.testing.assert_allclose(evaluate(backend, log_prob, logits), 0, atol=1e-12)
    np.testing.assert_allclose(backend.gradients(log_prob, logits)[0], 0, atol=1e-12)
    np.testing.assert_array_equal(backend.numpy(sample(backend, site, (3,))), [value] * 3)
    assert backend.numpy(site.enumerate_support()).tolist() == [value.tolist()]


@pytest.mark.parametrize("factory", ["KSubset", "PlackettLuceSubset"])
def test_one_is_categorical(backend, factory):
    logits = np.array([1.0, -1000.0, 0.0, 3.0])

    log_prob = evaluate(
        backend,
        lambda logits: getattr(backend.package, factory)(logits, 1).log_prob(
            backend.array(np.eye(4))
        ),
        logits,
    )

    np.testing.assert_allclose(log_prob, logits - np.logaddexp.reduce(logits), rtol=1e-14)


# Errors


def in_support(backend, site, value):
    check = site.support if backend.host == "numpyro" else site.support.check
    return backend.numpy(check(backend.array(value))).tolist()


def test_supports(backend):
    package, zeros = backend.package, backend.array(np.zeros(3))
    path = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    forest = np.zeros((4, 4))
    forest[[0, 0, 1, 1, 2, 2], [1, 2, 0, 2, 0, 1]] = 1  # a triangle and a node alone
    for factory in (package.KSubset, package.PlackettLuceSubset):
        site = factory(zeros, 2)
        assert in_support(
            backend, site, np.array([[1, 0, 1], [1, 1, 1], [0.5, 0.5, 1], [3, -1, 0]])
        ) == [True, False, False, False]
        assert site.support.is_discrete
        assert site.support.event_dim == 1
    site = package.PlackettLuce(zeros)
    assert in_support(backend, site, np.array([[2, 0, 1], [0, 0, 2], [1, 2, 3]])) == [
        True,
        False,
        False,
    ]
    assert site.support.is_discrete
    site = package.SpanningTree(backend.array(np.zeros((3, 3))))
    assert in_support(
        backend, site, 1.0 * np.stack([path, np.triu(path), path + np.eye(3), 0 * path, 2 * path])
    ) == [True, False, False, False, False]
    assert in_support(backend, package.SpanningTree(backend.array(forest)), forest) is False
    assert site.support.event_dim == 2


@every_law
def test_wrong_logits(backend, name):
    factory, options, _, shape = LAWS[name]
    make_site = getattr(backend.package, factory)
    for wrong in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match=f"{factory} needs finite logits, got .*(nan|inf)"):
            make_site(backend.array(np.full(shape, wrong)), **options)
        make_site(backend.array(np.full(shape, wrong)), **options, validate_args=False)
    with pytest.raises(TypeError, match=f"{factory} needs logits .*floating.*int64"):
        make_site(backend.array(np.zeros(shape, np.int64)), **options)
    with pytest.raises(ValueError, match=rf"{factory} needs logits of shape \[\*batch, n.*\(\)"):
        make_site(backend.array(np.zeros(())), **options)
    with pytest.raises(ValueError, match=r"needs a value of shape \[\*batch, .*got \(7,\)"):
        make_site(backend.array(np.zeros(shape)), **options).log_prob(backend.array(np.zeros(7)))


def test_wrong_sizes_and_matrices(backend):
    package, logits = backend.package, backend.array(np.zeros((2, 3)))
    for factory in (package.KSubset, package.PlackettLuceSubset):
        for k in (-1, 4, True):
            with pytest.raises(ValueError, match=rf"k as an integer from 0 to n = 3.*k={k!r}"):
                factory(logits, k)
        with pytest.raises((TypeError, ValueError), match=r"integer from 0 to n|Type-check"):
            factory(logits, 1.5)
    with pytest.raises(ValueError, match=r"\[\*batch, n, n\], got \(2, 3\)"):
        package.SpanningTree(logits)
    with pytest.raises(ValueError, match=r"symmetric logits.*differ by 2\b.*mT"):
        package.SpanningTree(backend.array(np.array([[0.0, 1.0], [-1.0, 0.0]])))


def test_too_many_values_to_enumerate(backend):
    package, many = backend.package, backend.array(np.zeros(50))
    for site, number in (
        (package.KSubset(many, 5), "2,118,760"),
        (package.PlackettLuceSubset(many, 45), "2,118,760"),
        (package.PlackettLuce(backend.array(np.zeros(9))), "362,880"),
        (package.SpanningTree(backend.array(np.zeros((8, 8)))), "262,144"),
    ):
        with pytest.raises(ValueError, match=f"{number} values, more than the 100,000"):
            site.enumerate_support()


def test_divergence_needs_the_same_values(backend):
    logits = backend.array(np.zeros(4))
    two, three = (backend.package.KSubset(logits, k) for k in (2, 3))
    with pytest.raises(ValueError, match=r"same values, got KHot\(k=2\) .* KHot\(k=3\)"):
        kl_divergence(backend, two, three)
