"""``imle`` in NumPyro: gradients against exact enumeration, plates, saved state, refusals."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.contrib.control_flow import cond, scan
from numpyro.distributions import kl_divergence
from numpyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO

from numpyro_gradest import (
    IMLE,
    IWAE,
    RLOO,
    SIMPLE,
    TVO,
    AdaptiveIMLE,
    GumbelSoftmaxST,
    KSubset,
    OneHotCategorical,
    PerturbAndMAP,
    PlackettLuceSubset,
    ReinMax,
    ReweightedWakeSleep,
    SpanningTree,
    StraightThrough,
    adapt_imle,
    imle,
)
from numpyro_gradest.estimators import (
    GaussianNoise,
    GumbelNoise,
    LogisticNoise,
    Noise,
    numpy_solver,
    top_k,
)
from numpyro_gradest.estimators.discrete import trees
from numpyro_gradest.estimators.discrete._subset_sampler import SplitNoise
from tests.conformance.backends import QUICK_TO_COMPILE
from tests.oracles import combinatorial
from tests.oracles import discrete as oracle

# The host warns of discrete latents under its own objectives, which they have no gradient for.
pytestmark = pytest.mark.filterwarnings("ignore:.*does not support models with discrete")

# A plate of many data that are all alike, whose noise fills its space evenly: the sum over data is
# an expectation, and nothing is left to chance.
NUMBER = 2**16
QUANTILES = (np.arange(NUMBER) + 0.5) / NUMBER
LOGISTIC = np.log(QUANTILES) - np.log1p(-QUANTILES)
GUMBEL = oracle.gumbel_points(NUMBER, 3)
THETA = {"bit": np.array(0.4), "one_hot": np.array([0.4, -0.3, 0.1])}
LOSSES = {
    "trace": Trace_ELBO(),
    "trace-particles": Trace_ELBO(2),
    "mean-field": TraceMeanField_ELBO(),
    "iwae": IWAE(1),
}
KEY = jax.random.key(0)
quickly = partial(jax.jit, compiler_options=QUICK_TO_COMPILE)


def trained(svi, num_steps):
    """The parameters after so many steps from the beginning, all of it compiled at once."""

    @quickly
    def train():
        state, _ = jax.lax.scan(lambda state, _: svi.update(state), svi.init(KEY), length=num_steps)
        return svi.get_params(state)

    return train()


class EvenLogistic(LogisticNoise):
    def sample_like(self, key, theta):
        return jnp.broadcast_to(LOGISTIC, theta.shape)


class EvenGumbel(GumbelNoise):
    def sample_like(self, key, theta):
        return jnp.broadcast_to(GUMBEL, theta.shape)


def location(z, kind):
    return 1.5 * z if kind == "bit" else z @ jnp.array([1.5, 0.0, -1.0])


def model(kind, subsample_size=None):
    size = NUMBER * (2 if subsample_size else 1)
    with numpyro.plate("data", size, subsample_size=subsample_size):
        prior = (
            dist.Bernoulli(0.2) if kind == "bit" else OneHotCategorical(jnp.array([0.1, 0.6, 0.3]))
        )
        z = numpyro.sample("z", prior)
        numpyro.sample("x", dist.Normal(location(z, kind), 1.0), obs=jnp.ones(NUMBER))


def guide(kind, subsample_size=None):
    theta = numpyro.param("theta", jnp.array(THETA[kind]))
    size = NUMBER * (2 if subsample_size else 1)
    with numpyro.plate("data", size, subsample_size=subsample_size):
        site = dist.Bernoulli if kind == "bit" else OneHotCategorical
        numpyro.sample("z", site(logits=theta))


def log_likelihood(z, kind):
    mean = 1.5 * z if kind == "bit" else z @ np.array([1.5, 0.0, -1.0])
    return -0.5 * (1.0 - mean) ** 2


def exact_gradient(kind):
    """Derivative of the negative ELBO of one datum, by enumeration."""
    theta = THETA[kind]
    if kind == "bit":
        scores, states, prior = np.array([0.0, theta]), [0.0, 1.0], [0.8, 0.2]
    else:
        scores, states, prior = theta, list(np.eye(3)), [0.1, 0.6, 0.3]
    q = oracle.softmax(scores)
    values = np.array([log_likelihood(z, kind) for z in states]) + np.log(prior) - np.log(q)
    gradient = -oracle.covariance_of(q) @ values
    return gradient[1] if kind == "bit" else gradient


def relative_error(estimator, kind, loss, scale=1.0, **options):
    wrapped = imle(guide, {"z": estimator})

    @quickly
    def gradient(theta):
        return jax.grad(
            lambda theta: loss.loss(KEY, {"theta": theta}, model, wrapped, kind, **options)
        )(theta)

    exact = exact_gradient(kind)
    actual = gradient(jnp.array(THETA[kind])) / NUMBER / scale
    return np.linalg.norm(actual - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("kind", THETA)
def test_gradient_equals_enumeration(kind, loss):
    noise = EvenLogistic() if kind == "bit" else EvenGumbel()
    assert relative_error(IMLE(step_size=0.05, noise=noise), kind, loss) < 0.04
    # A bias that the test would see: that of the first order.
    assert relative_error(StraightThrough(noise=noise), kind, loss) > 0.1


def test_subsampled_plate_multiplies_the_gradient():
    estimator = IMLE(step_size=0.05, noise=EvenLogistic())
    error = relative_error(estimator, "bit", Trace_ELBO(), scale=2.0, subsample_size=NUMBER)
    assert error < 0.04


@pytest.mark.parametrize(
    "estimator", [IMLE(step_size=0.2), AdaptiveIMLE(), ReinMax(), GumbelSoftmaxST(), SIMPLE()]
)
def test_guide_finds_the_posterior(estimator):
    """Bits in rows, under a mask and in a plate; values stay exactly bits."""
    x = jnp.array([[0.0, 3.0], [3.0, 0.0]])

    def model():
        with numpyro.plate("data", 2):
            z = numpyro.sample("z", dist.Bernoulli(jnp.full((2,), 0.5)).to_event(1).mask(True))
            numpyro.deterministic("are_bits", jnp.all((z == 0) | (z == 1)))
            numpyro.sample("x", dist.Normal(3 * z, 1.0).to_event(1), obs=x)

    def guide():
        logits = numpyro.param("logits", jnp.zeros((2, 2)))
        with numpyro.plate("data", 2):
            numpyro.sample("z", dist.Bernoulli(logits=logits).to_event(1).mask(True))

    config = {"z": estimator}
    wrapped = imle(guide, config)
    svi = SVI(model, wrapped, adapt_imle(optax.adam(0.1), config), Trace_ELBO(3))
    params = trained(svi, 60)

    assert ((params["logits"] > 0.5) == (x > 1)).all()
    drawn = numpyro.infer.Predictive(wrapped, params=params, num_samples=4)(KEY)
    assert drawn["z"].shape == (4, 2, 2)
    traced = numpyro.handlers.trace(
        numpyro.handlers.replay(
            model,
            numpyro.handlers.trace(
                numpyro.handlers.seed(numpyro.handlers.substitute(wrapped, params), KEY)
            ).get_trace(),
        )
    ).get_trace()
    assert traced["are_bits"]["value"]


def noisy_guide():
    logits = numpyro.param("logits", jnp.zeros((2, 3)))
    with numpyro.plate("data", 2):
        numpyro.sample("z", OneHotCategorical(logits=logits))


def noisy_model():
    with numpyro.plate("data", 2):
        z = numpyro.sample("z", OneHotCategorical(jnp.ones(3) / 3))
        numpyro.sample("x", dist.Normal(z @ jnp.arange(3.0), 1.0), obs=1.3 * jnp.ones(2))


CONFIG = {"z": AdaptiveIMLE()}


@pytest.mark.parametrize("loss", [Trace_ELBO(3), IWAE(3, vectorize_particles=False)])
def test_training_resumes_bit_for_bit(loss):
    """From the state of SVI alone, through NumPy, under ``jit``."""
    svi = SVI(noisy_model, imle(noisy_guide, CONFIG), adapt_imle(optax.adam(0.1), CONFIG), loss)
    update = quickly(svi.update)
    state = svi.init(KEY)
    for _ in range(5):
        state, _ = update(state)
    before = svi.get_params(state)["z_imle"]
    *rest, key = jax.tree.flatten(state._replace(rng_key=jax.random.key_data(state.rng_key)))
    saved = [np.asarray(leaf) for leaf in rest[0]]
    restored = jax.tree.unflatten(key, [jnp.asarray(leaf) for leaf in saved])
    restored = restored._replace(rng_key=jax.random.wrap_key_data(restored.rng_key))
    for _ in range(5):
        state, loss_value = update(state)
        restored, again = update(restored)
        assert loss_value == again
    params, others = svi.get_params(state), svi.get_params(restored)
    assert params.keys() == {"logits", "z_imle"}
    for name in params:
        np.testing.assert_array_equal(params[name], others[name])
    assert (params["z_imle"][:1] != before[:1]).all()
    np.testing.assert_array_equal(params["z_imle"][3:], 0)


def test_state_follows_the_rule_whatever_the_optimizer():
    """Once a step, however many particles; in a scan as step by step."""
    estimator = AdaptiveIMLE(rate=0.25, initial_step=4.0)
    config = {"z": estimator}
    optimizer = adapt_imle(optax.chain(optax.clip(1e-6), optax.sgd(0.0)), config)
    svi = SVI(noisy_model, imle(noisy_guide, config), optimizer, Trace_ELBO(4))
    first = svi.init(KEY)
    start = [4.0, estimator.target, 0.0, 0.0, 0.0, 0.0]
    np.testing.assert_allclose(svi.get_params(first)["z_imle"], start)
    update_state = quickly(svi.update)
    state, _ = update_state(first)
    step, _, update, *_ = svi.get_params(state)["z_imle"]
    assert abs(np.log(step / 4.0)) == pytest.approx(0.25)
    assert abs(update) == 0.25

    for _ in range(3):
        state, _ = update_state(state)
    result = svi.run(KEY, 4, progress_bar=False, init_state=first)
    np.testing.assert_allclose(result.params["z_imle"], svi.get_params(state)["z_imle"], rtol=1e-12)


def test_an_optimizer_that_knows_nothing_of_the_state_is_refused():
    svi = SVI(noisy_model, imle(noisy_guide, CONFIG), optax.adam(0.1), Trace_ELBO(4))
    state = svi.init(KEY)
    state, _ = quickly(svi.update)(state)
    with pytest.raises(Exception, match=r"adapt_imle\(optimizer, config\)"):
        svi.loss.loss(KEY, svi.get_params(state), noisy_model, svi.guide)
    with pytest.raises(Exception, match=r"adapt_imle\(optimizer, config\)"):
        svi.run(KEY, 3, progress_bar=False)
    with pytest.raises(TypeError, match="optax optimizer"):
        adapt_imle(numpyro.optim.Adam(0.1), CONFIG)


def test_clipping_around_is_as_clipping_inside():
    """Neither the counts nor what the norm is made of are changed by it."""

    def params_of(optimizer):
        loss = Trace_ELBO(4)
        return trained(SVI(noisy_model, imle(noisy_guide, CONFIG), optimizer, loss), 10)

    for clip in (optax.clip(0.02), optax.clip_by_global_norm(0.02)):
        inside = params_of(adapt_imle(optax.chain(clip, optax.sgd(0.1)), CONFIG))
        around = params_of(optax.chain(clip, adapt_imle(optax.sgd(0.1), CONFIG)))
        assert (inside["logits"] != 0).any()
        for name in inside:
            np.testing.assert_allclose(around[name], inside[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "around",
    [
        lambda inner: optax.chain(inner, optax.add_decayed_weights(-0.01)),
        lambda inner: optax.chain(optax.scale_by_adam(), inner),
        lambda inner: optax.chain(optax.clip(1e-9), inner),
    ],
    ids=["decay", "adam", "clip"],
)
def test_what_would_change_the_state_is_refused(around):
    optimizer = around(adapt_imle(optax.sgd(0.1), CONFIG))
    svi = SVI(noisy_model, imle(noisy_guide, CONFIG), optimizer, Trace_ELBO(4))
    with pytest.raises(Exception, match=r"site 'z'[^$]*inside[^$]*optax.chain"):
        jax.block_until_ready(trained(svi, 4))


def test_states_are_named_after_sites_under_scope():
    under = partial(numpyro.handlers.scope, prefix="a")
    config = {"a/z": AdaptiveIMLE()}
    for guide in (imle(under(noisy_guide), config), under(imle(noisy_guide, CONFIG))):
        svi = SVI(under(noisy_model), guide, adapt_imle(optax.sgd(0.1), config), Trace_ELBO(4))
        state = trained(svi, 3)["a/z_imle"]
        assert state[0] != config["a/z"].initial_step
    unaware = SVI(under(noisy_model), guide, adapt_imle(optax.sgd(0.1), CONFIG), Trace_ELBO(4))
    with pytest.raises(ValueError, match=r"'a/z_imle'.*for site 'a/z'.*scope"):
        unaware.init(KEY)


def test_decorator_context_manager_and_function():
    def derivative(fn):
        def first(theta):
            with numpyro.handlers.seed(rng_seed=0):
                return fn(theta)

        return jax.grad(first)(0.3)

    @imle(config=lambda name: StraightThrough() if name == "z" else None)
    def decorated(theta):
        other = numpyro.sample("other", dist.Bernoulli(logits=theta))
        return numpyro.sample("z", dist.Bernoulli(logits=theta)) + 0 * other

    def within(theta):
        with imle(config={"z": StraightThrough()}):
            return numpyro.sample("z", dist.Bernoulli(logits=theta))

    expected = jax.grad(jax.nn.sigmoid)(0.3)
    np.testing.assert_allclose(derivative(decorated), expected)
    np.testing.assert_allclose(derivative(within), expected)
    with pytest.raises(ValueError, match=r"sites \['y'\].*only \['z'\]"):
        with imle(config={"y": StraightThrough()}), numpyro.handlers.seed(rng_seed=0):
            noisy_guide()


class Own(Noise):
    def sample_like(self, key, theta):
        return jnp.zeros_like(theta)


@pytest.mark.parametrize(
    ("fn", "options", "estimator", "message"),
    [
        (lambda: dist.Categorical(jnp.ones(3) / 3), {}, IMLE(), "draws integers.*OneHotCateg"),
        (lambda: dist.Multinomial(1, jnp.ones(3) / 3), {}, IMLE(), "draws integers.*OneHotCateg"),
        (lambda: dist.Poisson(2.0), {}, IMLE(), "discrete, but its states are integers.*RLOO"),
        (lambda: dist.Normal(0.0, 1.0), {}, IMLE(), "Normal. Leave it out"),
        (lambda: dist.Bernoulli(0.5), {"obs": 1.0}, IMLE(), "'z', which is observed"),
        (
            lambda: dist.Bernoulli(0.5),
            {"infer": {"enumerate": "parallel"}},
            IMLE(),
            "both enumerated and under imle",
        ),
        (lambda: dist.Bernoulli(0.5), {}, IMLE(noise=GaussianNoise()), "wrong entropy"),
        (lambda: dist.Bernoulli(0.5), {}, AdaptiveIMLE(temperature=0.5), "wrong entropy"),
        (lambda: OneHotCategorical(jnp.ones(3) / 3), {}, StraightThrough(Own()), "GumbelNoise"),
    ],
)
def test_refusals(fn, options, estimator, message):
    program = imle(lambda: numpyro.sample("z", fn(), **options), {"z": estimator})
    with pytest.raises(ValueError, match=message):
        numpyro.handlers.seed(program, 0)()


@pytest.mark.parametrize(
    ("loss", "named"),
    [
        (TVO(3), "TVO"),
        (ReweightedWakeSleep(3), "ReweightedWakeSleep"),
        (ReweightedWakeSleep(3, reparam="dreg"), "ReweightedWakeSleep"),
        (IWAE(3, reparam="score"), 'IWAE.*reparam="score"'),
        (RLOO(3, reparam="score"), 'RLOO.*reparam="score"'),
    ],
)
def test_losses_that_would_not_use_the_gradient_refuse_it(loss, named):
    guide, params = imle(noisy_guide, {"z": IMLE()}), {"logits": jnp.zeros((2, 3))}
    with pytest.raises(ValueError, match=f"'z' carries a gradient by IMLE.*{named}.*ImplicitELBO"):
        loss.loss(KEY, params, noisy_model, guide)


def test_wrong_config():
    with pytest.raises(TypeError, match="site 'z'"):
        imle(noisy_guide, {"z": "imle"})
    with pytest.raises(TypeError, match="by site name"):
        imle(noisy_guide, 3)
    for wrong in (True, IMLE):
        with pytest.raises(TypeError, match=r"site 'z', such as.*not the class\)"):
            numpyro.handlers.seed(imle(noisy_guide, lambda name, wrong=wrong: wrong), 0)()
    with pytest.raises(TypeError, match="by site name"):
        imle(noisy_guide, IMLE)
    with pytest.raises(ValueError, match="given no estimators"):
        numpyro.handlers.seed(imle(noisy_guide), 0)()


class Unsaid(dist.Distribution):
    """States no support."""

    def sample(self, key, sample_shape=()):
        return jnp.zeros(sample_shape)


def test_one_estimator_for_all_leaves_others_alone():
    def program(theta):
        numpyro.sample("u", Unsaid())
        numpyro.sample("x", dist.Normal(0.0, 1.0))
        numpyro.sample("v", dist.Delta(1.0))
        numpyro.sample("y", dist.Bernoulli(0.5), obs=1.0)
        return numpyro.sample("z", dist.Bernoulli(logits=theta))

    wrapped = numpyro.handlers.seed(imle(program, StraightThrough()), 0)
    assert jax.grad(wrapped)(0.0) == 0.25


@pytest.mark.parametrize(
    "site",
    [
        dist.Poisson(2.0),
        dist.Binomial(3, 0.5),
        dist.Geometric(0.5),
        dist.DiscreteUniform(0, 3),
        dist.OrderedLogistic(0.0, jnp.array([0.0, 1.0])),
        dist.Categorical(jnp.ones(3) / 3).expand([2]).to_event(1),
    ],
    ids=lambda site: type(site).__name__,
)
def test_one_estimator_for_all_refuses_integers(site):
    with pytest.raises(ValueError, match=r"'z' draws.*integers"):
        numpyro.handlers.seed(imle(lambda: numpyro.sample("z", site), IMLE()), 0)()


def test_log_probability_of_one_hot_values():
    """Linear in the value, normalised, also expanded; impossible classes stay finite."""
    logits = jnp.array([0.0, 1.0, -jnp.inf])
    site, value = OneHotCategorical(logits=logits), jnp.array([0.0, 1.0, 0.0])
    gradient = jax.grad(lambda value: site.expand([1]).log_prob(value).sum())(value)
    np.testing.assert_allclose(site.log_prob(value), jax.nn.log_softmax(logits[:2])[1])
    np.testing.assert_allclose(gradient[:2], jax.nn.log_softmax(logits[:2]))
    assert gradient[2] == -1e30
    assert OneHotCategorical(jnp.array([0.5, 0.0])).probs.sum() == 1
    np.testing.assert_array_equal(site.sample(KEY, (5,)).sum(-1), 1)
    with pytest.raises(ValueError, match="either probs or logits"):
        OneHotCategorical()


# Sites without a density


def divergence(q, p, **options):
    laws = (PerturbAndMAP(jnp.array(theta), top_k(2), **options) for theta in (q, p))
    return kl_divergence(*laws)


def test_bound_of_the_divergence_holds():
    """Against the divergence of the states by enumeration; equal where nothing is lost."""
    rng, states = np.random.default_rng(0), oracle.subsets(4, 2)
    for _ in range(5):
        q, p = rng.normal(size=(2, 4))
        law_q, law_p = ([oracle.plackett_luce_subset(t, z) for z in states] for t in (q, p))
        exact = np.sum(law_q * np.log(np.divide(law_q, law_p)))
        bound = divergence(q, p)
        np.testing.assert_allclose(bound, np.sum(q - p + np.exp(p - q) - 1))
        assert bound > exact
    np.testing.assert_allclose(divergence(2 * q, 2 * p, temperature=2.0), bound)
    gaussian = divergence(q, p, noise=GaussianNoise(), temperature=0.5)
    np.testing.assert_allclose(gaussian, 2 * np.sum((q - p) ** 2))
    with pytest.raises(ValueError, match="same temperature and either Gumbel or Gaussian"):
        divergence(q, p, noise=LogisticNoise())


DATA = jnp.array([[0.0, 3.0, 0.0, 3.0], [3.0, 3.0, 0.0, 0.0]])


def subset_model():
    with numpyro.plate("data", 2):
        z = numpyro.sample("z", PerturbAndMAP(jnp.zeros(4), top_k(2)))
        numpyro.sample("x", dist.Normal(3 * z, 1.0).to_event(1), obs=DATA)


def subset_guide(solver=None):
    theta = numpyro.param("theta", jnp.zeros((2, 4)))
    with numpyro.plate("data", 2):
        numpyro.sample("z", PerturbAndMAP(theta, solver or top_k(2)))


@pytest.mark.parametrize("estimator", [IMLE(step_size=0.3), AdaptiveIMLE()])
def test_any_solver_trains_with_the_bound(estimator):
    config = {"z": estimator}
    optimizer = adapt_imle(optax.adam(0.1), config)
    svi = SVI(subset_model, imle(subset_guide, config), optimizer, TraceMeanField_ELBO(4))
    assert ((trained(svi, 60)["theta"] > 0.2) == (DATA > 1)).all()


def exploding(theta):
    raise RuntimeError("exploded")


def halves(theta):
    return 0.0 * theta + 0.5


def gradient_at_site(solver, theta):
    def value(theta):
        program = imle(lambda: numpyro.sample("s", PerturbAndMAP(theta, solver)), {"s": IMLE()})
        return jnp.sum(numpyro.handlers.seed(program, 0)() ** 2)

    return jax.grad(value)(theta)


@pytest.mark.parametrize("solve", [exploding, halves, lambda theta: theta[:1]])
def test_errors_of_solvers_name_the_site(solve):
    calls = []

    def later(theta):
        calls.append(theta)
        return theta == theta.max() if len(calls) == 1 else solve(theta)

    theta = jnp.array([0.0, 1.0, 2.0])
    for solver in (solve, later):  # forwards, and backwards
        with pytest.raises((ValueError, RuntimeError)) as caught:
            gradient_at_site(solver, theta)
        assert "At site 's', under imle." in caught.value.__notes__
        calls.clear()
    for solver in (solve, later):
        compiled = quickly(partial(gradient_at_site, numpy_solver(solver)))
        with pytest.raises(Exception, match="At site 's', under imle"):
            jax.block_until_ready(compiled(theta))
        calls.clear()


def test_errors_of_theta_name_the_site():
    with pytest.raises(ValueError, match="finite theta") as caught:
        gradient_at_site(top_k(1), jnp.array([0.0, jnp.nan, 1.0]))
    assert "At site 's', under imle." in caught.value.__notes__


def test_sites_without_a_density_are_refused_elsewhere():
    guide, params = imle(subset_guide, {"z": IMLE()}), {"theta": jnp.zeros((2, 4))}
    for loss in (Trace_ELBO(), IWAE(1)):
        with pytest.raises(NotImplementedError, match="TraceMeanField_ELBO"):
            loss.loss(KEY, params, subset_model, guide)
    with pytest.raises(ValueError, match="same solver"):
        other = imle(lambda: subset_guide(top_k(1)), {"z": IMLE()})
        TraceMeanField_ELBO().loss(KEY, params, subset_model, other)
    with pytest.raises(ValueError, match="IMLE, AdaptiveIMLE and StraightThrough take over"):
        numpyro.handlers.seed(imle(subset_guide, {"z": SIMPLE()}), 0)()
    with pytest.raises(ValueError, match="temperature > 0"):
        PerturbAndMAP(jnp.zeros(3), top_k(2), temperature=0.0)
    with pytest.raises(ValueError, match="1 event axes"):
        PerturbAndMAP(jnp.array(0.0), top_k(2))


# Subsets


SUBSETS = oracle.subsets(4, 2)
SUBSET_THETA, SUBSET_PRIOR = np.array([0.5, -0.5, 0.2, 0.0]), np.array([0.3, -0.2, 0.0, 0.1])
WEIGHTS = np.array([1.0, -1.0, 0.5, 2.0])


class EvenSplits(SplitNoise):
    def sample_like(self, key, theta):
        uniform = jnp.asarray(oracle.uniform_points(NUMBER, 3))
        return jnp.concatenate([jnp.zeros_like(theta[..., :4]), uniform], axis=-1)


# With k of n = 4 items three uniform numbers make a draw.
EVEN_SPLITS = EvenSplits(4)
LOG_LIKELIHOODS = {
    "none": lambda z: 0.0 * (z @ jnp.asarray(WEIGHTS)),
    "linear": lambda z: z @ jnp.asarray(WEIGHTS),
    "quadratic": lambda z: -0.5 * (1 - z @ jnp.asarray(WEIGHTS)) ** 2,
}


def k_subset_model(likelihood):
    with numpyro.plate("data", NUMBER):
        z = numpyro.sample("z", KSubset(jnp.asarray(SUBSET_PRIOR), 2))
        numpyro.factor("x", LOG_LIKELIHOODS[likelihood](z))


def k_subset_guide(likelihood):
    theta = numpyro.param("theta", jnp.asarray(SUBSET_THETA))
    with numpyro.plate("data", NUMBER):
        numpyro.sample("z", KSubset(theta, 2))


def k_subset_error(estimator, likelihood, loss):
    """Of the gradient of the negative ELBO, against that by enumeration, relative to it."""
    q, p = (oracle.exponential_family(SUBSETS, t) for t in (SUBSET_THETA, SUBSET_PRIOR))
    values = np.log(q) - np.log(p)
    values -= [LOG_LIKELIHOODS[likelihood](jnp.asarray(z)).item() for z in SUBSETS]
    mean = oracle.mean(SUBSETS, SUBSET_THETA)
    exact = sum(q[i] * values[i] * (z - mean) for i, z in enumerate(SUBSETS))
    wrapped = imle(k_subset_guide, {"z": estimator})

    @quickly
    def gradient(theta):
        params = {"theta": theta}
        return jax.grad(lambda params: loss.loss(KEY, params, k_subset_model, wrapped, likelihood))(
            params
        )["theta"]

    actual = gradient(jnp.array(SUBSET_THETA)) / NUMBER
    return np.linalg.norm(actual - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("likelihood", ["none", "linear"])
def test_subsets_are_unbiased_for_what_is_linear(likelihood):
    """Under the exact divergence each draw has the exact gradient by itself."""
    for estimator in (SIMPLE(), StraightThrough(noise=EVEN_SPLITS)):
        assert k_subset_error(estimator, likelihood, TraceMeanField_ELBO()) < 1e-10
    even = IMLE(step_size=0.1, noise=EVEN_SPLITS)
    error = k_subset_error(even, likelihood, TraceMeanField_ELBO())
    assert error < (1e-10 if likelihood == "none" else 0.03)


@pytest.mark.parametrize("loss", [Trace_ELBO(), IWAE(1)], ids=["trace", "iwae"])
def test_subsets_keep_their_exact_log_probability(loss):
    even = {"noise": EVEN_SPLITS}
    assert k_subset_error(IMLE(step_size=0.1, **even), "linear", loss) < 0.03
    assert k_subset_error(StraightThrough(**even), "linear", loss) < 0.01


def test_bias_of_subsets_beyond_what_is_linear():
    """Biased by design, and the mean's gradient alone much more so; not so a second order."""
    even, loss = {"noise": EVEN_SPLITS}, TraceMeanField_ELBO()
    assert 0.1 < k_subset_error(IMLE(step_size=0.1, **even), "quadratic", loss) < 0.3
    assert k_subset_error(StraightThrough(**even), "quadratic", loss) > 0.6
    assert k_subset_error(ReinMax(), "quadratic", loss) < 0.03  # of 65,536 random draws


@pytest.mark.parametrize("estimator", [AdaptiveIMLE(), SIMPLE()])
def test_groups_of_subsets_find_the_posterior(estimator):
    """Two groups to a datum, under a mask and in a plate; values stay exactly subsets."""
    x = jnp.array([[[0.0, 3.0, 3.0], [3.0, 0.0, 3.0]], [[3.0, 3.0, 0.0], [0.0, 3.0, 3.0]]])

    def model():
        with numpyro.plate("data", 2):
            z = numpyro.sample("z", KSubset(jnp.zeros((2, 3)), 2).to_event(1).mask(True))
            numpyro.sample("x", dist.Normal(3 * z, 1.0).to_event(2), obs=x)

    def guide():
        logits = numpyro.param("logits", jnp.zeros((2, 2, 3)))
        with numpyro.plate("data", 2):
            return numpyro.sample("z", KSubset(logits, 2).to_event(1).mask(True))

    config = {"z": estimator}
    wrapped = imle(guide, config)
    svi = SVI(model, wrapped, adapt_imle(optax.adam(0.1), config), TraceMeanField_ELBO(3))
    params = trained(svi, 60)

    means = quickly(lambda logits: KSubset(logits, 2).mean)(params["logits"])
    assert ((means > 0.7) == (x > 1)).all()
    z = quickly(numpyro.handlers.seed(numpyro.handlers.substitute(wrapped, params), KEY))()
    assert jnp.all((z == 0) | (z == 1))
    assert jnp.all(z.sum(-1) == 2)


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (GumbelSoftmaxST(), "SIMPLE and StraightThrough, got GumbelSoftmaxST"),
        (IMLE(noise=GumbelNoise()), "wrong entropy"),
        (AdaptiveIMLE(temperature=0.5), "wrong entropy"),
    ],
)
def test_refusals_at_subsets(estimator, message):
    program = imle(lambda: numpyro.sample("z", KSubset(jnp.zeros(4), 2)), {"z": estimator})
    with pytest.raises(ValueError, match=message):
        numpyro.handlers.seed(program, 0)()


def test_draws_without_replacement_are_refused():
    """In the guide, also under an estimator for all sites, and as the prior of a subset."""

    def guide():
        theta = numpyro.param("theta", jnp.zeros(4))
        numpyro.sample("z", PlackettLuceSubset(theta, 2))

    for config in ({"z": SIMPLE()}, SIMPLE()):
        with pytest.raises(ValueError, match="PlackettLuceSubset, for which imle knows no"):
            numpyro.handlers.seed(imle(guide, config), 0)()

    def model(k, prior):
        numpyro.sample("z", prior(jnp.zeros(4), k))

    def subset_guide(k, prior):
        numpyro.sample("z", KSubset(numpyro.param("theta", jnp.zeros(4)), k))

    def loss(theta, *options):
        wrapped = imle(subset_guide, SIMPLE())
        return Trace_ELBO().loss(KEY, {"theta": theta}, model, wrapped, *options)

    with pytest.raises(ValueError, match=r"prior would count for nothing\. Sample KSubset"):
        jax.jit(jax.grad(loss), static_argnums=(1, 2))(jnp.zeros(4), 2, PlackettLuceSubset)
    quickly = {"static_argnums": (1, 2), "compiler_options": QUICK_TO_COMPILE}
    gradient = jax.jit(jax.grad(loss), **quickly)
    gradients = [gradient(jnp.arange(4.0), 1, prior) for prior in (PlackettLuceSubset, KSubset)]
    np.testing.assert_allclose(*gradients, atol=1e-12)
    # Without a gradient in the value there is nothing to refuse.
    site, z = PlackettLuceSubset(jnp.zeros(4), 2), jnp.array([1.0, 1.0, 0.0, 0.0])
    np.testing.assert_allclose(site.log_prob(z), -np.log(6))


# Spanning trees


TREE_LOGITS, TREE_PRIOR, TREE_WEIGHTS = np.random.default_rng(0).normal(size=(3, 4, 4))
TREE_LOGITS, TREE_PRIOR = TREE_LOGITS + TREE_LOGITS.T, TREE_PRIOR + TREE_PRIOR.T
TREES = np.array([tree for tree, _ in combinatorial.spanning_tree(TREE_LOGITS)])
PROBABILITIES, PRIOR_PROBABILITIES = (
    np.array([p for _, p in combinatorial.spanning_tree(logits)])
    for logits in (TREE_LOGITS, TREE_PRIOR)
)
# Factors of the linear and the quadratic part of a log-likelihood.
TREE_LIKELIHOODS = {"none": (0.0, 0.0), "linear": (1.0, 0.0), "quadratic": (0.5, 1.0)}


def tree_log_likelihood(z, weights, linear, quadratic):
    along = (z * weights).sum((-2, -1))
    return linear * along - quadratic * (1 - along) ** 2 / 2


def tree_model(likelihood):
    scale = numpyro.handlers.scale(scale=jnp.asarray(PROBABILITIES))
    with numpyro.plate("data", len(TREES)), scale:
        z = numpyro.sample("z", SpanningTree(jnp.asarray(TREE_PRIOR)))
        numpyro.factor("x", tree_log_likelihood(z, jnp.asarray(TREE_WEIGHTS), *likelihood))


def tree_guide(likelihood):
    logits = numpyro.param("logits", jnp.asarray(TREE_LOGITS))
    scale = numpyro.handlers.scale(scale=jnp.asarray(PROBABILITIES))
    with numpyro.plate("data", len(TREES)), scale:
        numpyro.sample("z", SpanningTree(logits))


def all_trees(key, logits):
    """Each of the trees once, in the place of draws."""
    return jnp.where(jnp.allclose(logits, jnp.asarray(TREE_LOGITS)), jnp.asarray(TREES), jnp.nan)


def tree_errors(estimator, loss):
    """Of the expected gradient of the negative ELBO, summed over all trees, by likelihood."""
    wrapped = imle(tree_guide, {"z": estimator})

    @quickly
    def gradient(logits, likelihood):
        return jax.grad(
            lambda logits: loss.loss(KEY, {"logits": logits}, tree_model, wrapped, likelihood)
        )(logits)

    return {
        name: tree_error(gradient(jnp.asarray(TREE_LOGITS), likelihood), likelihood)
        for name, likelihood in TREE_LIKELIHOODS.items()
    }


def tree_error(actual, likelihood):
    """Against the exact gradient, relative to it; log-probabilities are half of <z, logits>."""
    values = np.log(PROBABILITIES) - np.log(PRIOR_PROBABILITIES)
    values -= tree_log_likelihood(TREES, TREE_WEIGHTS, *likelihood)
    mean = np.tensordot(PROBABILITIES, TREES, axes=1)
    exact = np.tensordot(PROBABILITIES * values, (TREES - mean) / 2, axes=1)
    return np.linalg.norm(actual - exact) / np.linalg.norm(exact)


def test_expected_gradients_of_trees(monkeypatch):
    """Without bias for what is linear, and with a second order for what is quadratic."""
    monkeypatch.setattr(trees, "draw", all_trees)
    for estimator in (SIMPLE(), StraightThrough()):
        errors = tree_errors(estimator, TraceMeanField_ELBO())
        assert max(errors["none"], errors["linear"]) < 1e-10
        assert errors["quadratic"] > 0.1
    for loss in (TraceMeanField_ELBO(), Trace_ELBO()):
        assert max(tree_errors(ReinMax(), loss).values()) < 1e-10


def test_groups_of_trees_find_the_posterior():
    """Two groups to a datum, under a mask and in a plate; values stay exactly trees."""
    truth = np.ones((2, 2, 3, 3)) - np.eye(3)
    for index, (i, j) in zip(np.ndindex(2, 2), [(0, 1), (0, 2), (1, 2), (0, 1)], strict=True):
        truth[*index, i, j] = truth[*index, j, i] = 0

    def model():
        with numpyro.plate("data", 2):
            z = numpyro.sample("z", SpanningTree(jnp.zeros((2, 3, 3))).to_event(1).mask(True))
            numpyro.sample("x", dist.Normal(2 * z, 1.0).to_event(3), obs=2 * jnp.asarray(truth))

    def guide():
        scores = numpyro.param("scores", jnp.zeros((2, 2, 3, 3)))
        with numpyro.plate("data", 2):
            site = SpanningTree(scores + scores.mT).to_event(1)
            return numpyro.sample("z", site.mask(True))

    wrapped = imle(guide, ReinMax())
    svi = SVI(model, wrapped, optax.adam(0.1), TraceMeanField_ELBO(3))
    params = trained(svi, 60)

    means = quickly(lambda t: SpanningTree(t + t.mT).mean)(params["scores"])
    assert ((means > 0.7) == (truth == 1)).all()
    z = quickly(numpyro.handlers.seed(numpyro.handlers.substitute(wrapped, params), KEY))()
    assert SpanningTree.support(z).all()


@pytest.mark.parametrize(
    "estimator",
    [
        IMLE(),
        AdaptiveIMLE(),
        GumbelSoftmaxST(),
        StraightThrough(noise=GumbelNoise()),
        StraightThrough(temperature=0.5),
    ],
)
def test_refusals_at_trees(estimator):
    program = imle(lambda: numpyro.sample("z", SpanningTree(jnp.zeros((3, 3)))), {"z": estimator})
    with pytest.raises(ValueError, match=r"without noise .* PerturbAndMAP\(logits / 2, spanning"):
        numpyro.handlers.seed(program, 0)()


# --- within scan and cond ------------------------------------------------------------------------


LIKELY = jnp.array([3.0, -3.0])
STEP = IMLE(step_size=0.2)


def draw(logit, estimator=None):
    if estimator is None:
        return numpyro.sample("z", dist.Bernoulli(logits=logit))
    with imle(config={"z": estimator}):
        return numpyro.sample("z", dist.Bernoulli(logits=logit))


def bits_of_plate(estimator=None):
    with numpyro.plate("data", 2):
        draw(numpyro.param("logit", jnp.zeros(2)), estimator)


def bits_of_scan(estimator=None):
    scan(lambda _, logit: (0.0, draw(logit, estimator)), 0.0, numpyro.param("logit", jnp.zeros(2)))


def bits_of_plate_model():
    with numpyro.plate("data", 2):
        numpyro.sample("x", dist.Normal(3.0 * draw(0.0), 1.0), obs=LIKELY)


def bits_of_scan_model():
    def step(_, x):
        return 0.0, numpyro.sample("x", dist.Normal(3.0 * draw(0.0), 1.0), obs=x)

    scan(step, 0.0, LIKELY)


def bit(estimator=None):
    logit = numpyro.param("logit", jnp.zeros(2)).sum()
    cond(logit < 1, lambda _: draw(logit, estimator), lambda _: draw(2 * logit, estimator), None)


def bit_model():
    numpyro.sample("x", dist.Normal(3.0 * draw(0.0), 1.0), obs=3.0)


def mean_gradient(model, guide, number=600):
    def loss(logit, key):
        return Trace_ELBO().loss(key, {"logit": logit}, model, guide)

    at = jax.vmap(jax.grad(loss), (None, 0))
    return quickly(lambda: at(jnp.full(2, 0.1), jax.random.split(KEY, number)).mean(axis=0))()


def test_sites_of_scan_carry_the_gradient():
    desired = mean_gradient(bits_of_plate_model, imle(bits_of_plate, {"z": STEP}), number=4000)
    assert (jnp.abs(desired) > 0.5).all()
    around, within = imle(bits_of_scan, {"z": STEP}), partial(bits_of_scan, STEP)
    actual = mean_gradient(bits_of_scan_model, around, number=4000)
    np.testing.assert_allclose(actual, desired, atol=0.15)
    for other in (within, imle(bits_of_scan, STEP), imle(within, STEP)):
        same = mean_gradient(bits_of_scan_model, other, number=4000)
        np.testing.assert_allclose(same, actual, rtol=1e-5)


def test_sites_of_cond_carry_the_gradient():
    around = mean_gradient(bit_model, imle(bit, {"z": STEP}))
    assert (jnp.abs(around) > 0.5).all()
    within = mean_gradient(bit_model, partial(bit, STEP))
    np.testing.assert_allclose(within, around, rtol=1e-5)


def test_what_scan_can_not_keep_is_refused():
    adaptive = AdaptiveIMLE()
    for guide in (imle(bits_of_scan, {"z": adaptive}), partial(bit, adaptive)):
        with pytest.raises(ValueError, match=r"'z' is drawn within scan or cond.*IMLE"):
            numpyro.handlers.seed(guide, 0)()
    scoped = imle(numpyro.handlers.scope(bits_of_scan, "a"), {"a/z": STEP})
    with pytest.raises(ValueError, match=r"'a/z' was drawn.*imle within handlers.scope"):
        numpyro.handlers.seed(scoped, 0)()


def test_values_that_are_given_need_no_gradient():
    """As in a model replayed by a guide."""
    given = numpyro.handlers.trace(numpyro.handlers.seed(bits_of_scan, 0)).get_trace()
    replayed = numpyro.handlers.replay(imle(bits_of_scan_model, {"z": STEP}), trace=given)
    ran = numpyro.handlers.trace(numpyro.handlers.seed(replayed, 1)).get_trace()
    np.testing.assert_array_equal(ran["z"]["value"], given["z"]["value"])
    fixed = numpyro.handlers.substitute(imle(bits_of_scan, {"z": STEP}), {"z": jnp.ones(2)})
    ran = numpyro.handlers.trace(numpyro.handlers.seed(fixed, 1)).get_trace()
    np.testing.assert_array_equal(ran["z"]["value"], 1.0)
