"""Semi-implicit guides: the bound as it is defined, draw for draw, and by enumeration."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from jax.scipy.special import logsumexp
from numpyro import factor, handlers, param, plate, sample
from numpyro.infer import SVI, Predictive
from numpyro.infer.autoguide import AutoDiagonalNormal
from numpyro.primitives import Messenger

from numpyro_gradest import Implicit, SemiImplicitELBO
from tests.conformance.backends import QUICK_TO_COMPILE
from tests.numpyro.definition import as_arrays, evaluate, log_bernoulli, log_normal

K, J = 3, 2
X = jnp.array([0.9, -0.4, 0.1, 1.7])
quickly = partial(jax.jit, compiler_options=QUICK_TO_COMPILE)


def noise(name="noise", fn=None):
    return sample(name, fn or dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})


class Case(NamedTuple):
    model: Callable[[], Any]
    guide: Callable[[], Any]
    params: dict[str, Any]
    replay: Callable[[dict, dict], dict]
    """(params, draws) -> the same draws as functions of the parameters, where reparameterised."""
    log_p: Callable[[dict, dict], Any]
    """(params, draws) -> ``[*batch]``, with scale."""
    log_q: Callable[[dict, dict, dict], Any]
    """(params, draws of the latents, draws of the noise) -> ``[*plates]``, without scale."""
    scale: Any = 1.0
    sum_mixtures: Callable[[Any], Any] = lambda log_q: log_q
    """``[*plates]`` -> ``[*batch]``"""
    log_latents: Callable[[dict, dict], Any] = lambda params, draws: 0.0
    """Log-density of score-function draws among the latents, ``[*batch]``."""
    log_noise: Callable[[dict, dict], Any] = lambda params, draws: 0.0


def global_sites():
    """Learnable noise under two latents, the second given the first; one is positive."""

    def model():
        y = sample("y", dist.Normal(0.0, 1.0))
        z = sample("z", dist.LogNormal(0.0, 1.0).expand([2]).to_event(1))
        sample("x", dist.Normal(y, z.sum()), obs=0.7)

    def guide():
        a, b = param("a", 0.3), param("b", 0.5)
        e = noise(fn=dist.Normal(a, jnp.exp(b)))
        y = sample("y", dist.Normal(jnp.sinh(e), 0.5))
        sample("z", dist.LogNormal(b * e + a * y, jnp.exp(a)).expand([2]).to_event(1))

    def replay(params, draws):
        a, b = params["a"], params["b"]
        e = a + jnp.exp(b) * (draws["noise"] - 0.3) / math.exp(0.5)
        y = jnp.sinh(e) + draws["y"] - jnp.sinh(draws["noise"])
        before = jnp.log(draws["z"]) - 0.5 * draws["noise"] - 0.3 * draws["y"]
        z = jnp.exp(b * e + a * y + jnp.exp(a) * before / math.exp(0.3))
        return {"noise": e, "y": y, "z": z}

    def log_p(params, z):
        log_prior = log_normal(z["y"], 0.0, 1.0) + dist.LogNormal(0.0, 1.0).log_prob(z["z"]).sum()
        return log_prior + log_normal(0.7, z["y"], z["z"].sum())

    def log_q(params, z, e):
        a, b, e = params["a"], params["b"], e["noise"]
        log_q = log_normal(z["y"], jnp.sinh(e), 0.5)
        return log_q + dist.LogNormal(b * e + a * z["y"], jnp.exp(a)).log_prob(z["z"]).sum()

    return Case(model, guide, {"a": 0.3, "b": 0.5}, replay, log_p, log_q)


A = np.linspace(-1.0, 1.0, 8).reshape(2, 4)


def local_sites(wrap=lambda fn: fn, scale=1.0, mask=True):
    """A mixture for each element of two plates."""

    def model():
        with plate("rows", 2, dim=-2), plate("data", 4, dim=-1):
            z = sample("z", dist.Normal(0.0, 1.0))
            sample("x", dist.Normal(param("slope", 0.8) * z, 1.0), obs=X)

    def guide():
        a = param("a", A)
        with plate("rows", 2, dim=-2), plate("data", 4, dim=-1):
            e = noise()
            sample("z", dist.Normal(a * e + e**2, 0.5))

    def replay(params, draws):
        e = draws["noise"]
        return {"noise": e, "z": (params["a"] - A) * e + draws["z"]}

    def log_p(params, z):
        log_p = log_normal(z["z"], 0.0, 1.0) + log_normal(X, params["slope"] * z["z"], 1.0)
        return scale * mask * log_p

    def log_q(params, z, e):
        return mask * log_normal(z["z"], params["a"] * e["noise"] + e["noise"] ** 2, 0.5)

    params = {"slope": 0.8, "a": A}
    return Case(wrap(model), wrap(guide), params, replay, log_p, log_q, scale)


def scaled():
    return local_sites(lambda fn: handlers.scale(fn, 0.3), 0.3)


def scaled_by_element():
    scale = jnp.array([0.5, 2.0, 1.0, 0.1])
    return local_sites(lambda fn: handlers.scale(fn, scale), scale)


def masked():
    mask = jnp.array([True, False, True, True])
    return local_sites(lambda fn: handlers.mask(fn, mask=mask), mask=mask)


def subsampled():
    def model():
        with plate("data", 4, subsample_size=2) as rows:
            z = sample("z", dist.Normal(0.0, 1.0))
            sample("x", dist.Normal(z, 1.0), obs=X[rows])

    def guide():
        b = param("b", X)
        with plate("data", 4, subsample_size=2) as rows:
            sample("z", dist.Normal(b[rows] * noise(), 0.5))

    def replay(params, draws):
        b = params["b"] - X
        return draws | {"z": b[draws["data"]] * draws["noise"] + draws["z"]}

    def log_p(params, z):
        return 2.0 * (log_normal(z["z"], 0.0, 1.0) + log_normal(X[z["data"]], z["z"], 1.0))

    def log_q(params, z, e):
        return log_normal(z["z"], params["b"][z["data"]] * e["noise"], 0.5)

    return Case(model, guide, {"b": np.asarray(X)}, replay, log_p, log_q, 2.0)


def shared_noise():
    """Noise outside of the plate of the latents: one mixture over all of them."""

    def model():
        with plate("data", 4):
            z = sample("z", dist.Normal(0.0, 1.0))
            sample("x", dist.Normal(z, 1.0), obs=X)

    def guide():
        b, e = param("b", X), noise()
        with plate("data", 4):
            sample("z", dist.Normal(b * e, 0.5))

    def replay(params, draws):
        return draws | {"z": (params["b"] - X) * draws["noise"] + draws["z"]}

    def log_p(params, z):
        return (log_normal(z["z"], 0.0, 1.0) + log_normal(X, z["z"], 1.0)).sum()

    def log_q(params, z, e):
        return log_normal(z["z"], params["b"] * e["noise"], 0.5).sum()

    return Case(model, guide, {"b": np.asarray(X)}, replay, log_p, log_q)


def discrete_latents():
    """Each element has a learning signal of its own; the noise moves the reparameterised site."""

    def model():
        with plate("data", 4):
            b = sample("b", dist.Bernoulli(0.3))
            z = sample("z", dist.Normal(b, 1.0))
            sample("x", dist.Normal(z, 1.0), obs=X)

    def guide():
        a = param("a", X)
        with plate("data", 4):
            e = noise()
            sample("b", dist.Bernoulli(logits=a * e + 0.2))
            sample("z", dist.Normal(a + e, 0.5))

    def replay(params, draws):
        return draws | {"z": params["a"] - X + draws["z"]}

    def log_p(params, z):
        log_p = log_bernoulli(math.log(0.3 / 0.7), z["b"]) + log_normal(z["z"], z["b"], 1.0)
        return log_p + log_normal(X, z["z"], 1.0)

    def log_b(params, z, e):
        return log_bernoulli(params["a"] * e["noise"] + 0.2, z["b"])

    def log_q(params, z, e):
        return log_b(params, z, e) + log_normal(z["z"], params["a"] + e["noise"], 0.5)

    return Case(
        model,
        guide,
        {"a": np.asarray(X)},
        replay,
        log_p,
        log_q,
        log_latents=lambda params, draws: log_b(params, draws, draws),
    )


def discrete_noise():
    """The model couples what the guide draws apart: mixtures by element, one learning signal."""

    def model():
        with plate("data", 4):
            z = sample("z", dist.Normal(0.0, 1.0))
        sample("x", dist.Normal(z.sum(), 1.0), obs=0.7)

    def guide():
        a, b = param("a", X), param("b", 0.5)
        with plate("data", 4):
            e = noise(fn=dist.Bernoulli(logits=a))
            sample("z", dist.Normal(b * e, 0.5))

    def replay(params, draws):
        return draws | {"z": (params["b"] - 0.5) * draws["noise"] + draws["z"]}

    def log_p(params, z):
        return log_normal(z["z"], 0.0, 1.0).sum() + log_normal(0.7, z["z"].sum(), 1.0)

    def log_q(params, z, e):
        return log_normal(z["z"], params["b"] * e["noise"], 0.5)

    return Case(
        model,
        guide,
        {"a": np.asarray(X), "b": 0.5},
        replay,
        log_p,
        log_q,
        sum_mixtures=jnp.sum,
        log_noise=lambda params, draws: log_bernoulli(params["a"], draws["noise"]).sum(),
    )


CASES = [
    global_sites,
    local_sites,
    scaled,
    scaled_by_element,
    masked,
    subsampled,
    shared_noise,
    discrete_latents,
    discrete_noise,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_loss_and_gradient_follow_the_definition(case):
    case = case()
    build = partial(SemiImplicitELBO, K, num_mixing=J)
    actual = evaluate(build, case.model, case.guide, case.params)
    # Each particle, then the J runs of the guide at its latents.
    runs = [{name: value[i] for name, value in actual.draws.items()} for i in range(K * (1 + J))]

    def terms(params):
        """The ELBO and the log-density of the score-function draws, ``[K, *batch]``."""
        elbo, log_drawn = [], []
        for own, *others in (runs[k * (1 + J) : (k + 1) * (1 + J)] for k in range(K)):
            z, *redrawn = (case.replay(params, draws) for draws in (own, *others))
            log_q = jnp.stack([case.log_q(params, z, e) for e in (z, *redrawn)])
            mixture = case.sum_mixtures(case.scale * (logsumexp(log_q, axis=0) - math.log(1 + J)))
            elbo.append(case.log_p(params, z) - mixture)
            log_drawn.append(case.log_latents(params, own) + 0.0 * elbo[-1])
            log_drawn[-1] += sum(case.log_noise(params, draws) for draws in (own, *others))
        return jnp.stack(elbo), jnp.stack(log_drawn)

    @quickly
    def value_and_ascent(params):
        (elbo, _), pull_back = jax.vjp(terms, params)
        signal = elbo - (elbo.sum(0) - elbo) / (K - 1)
        return elbo, pull_back((jnp.full_like(elbo, 1 / K), signal / K))[0]

    elbo, ascent = value_and_ascent(as_arrays(case.params))
    np.testing.assert_allclose(actual.loss, -elbo.mean(0).sum(), rtol=1e-10)
    for name, gradient in ascent.items():
        np.testing.assert_allclose(actual.gradient[name], -gradient, rtol=1e-9, atol=1e-12)


# --- by enumeration ------------------------------------------------------------------------------

LOG_JOINT = jnp.log(jnp.array([0.3, 0.1]))


def two_values():
    z = sample("z", dist.Bernoulli(0.25))
    sample("x", dist.Bernoulli(jnp.array([0.4, 0.4])[z]), obs=1)


def two_components():
    e = noise(fn=dist.Bernoulli(logits=param("mix", 0.4)))
    sample("z", dist.Bernoulli(logits=param("logits", jnp.array([-0.7, 1.1]))[e]))


class Force(Messenger):
    """Gives the guide's sites the values it holds, in the order in which they are drawn."""

    def __init__(self, values):
        super().__init__()
        self.values = {name: list(value) for name, value in values.items()}

    def process_message(self, msg):
        if msg["type"] == "sample" and msg["value"] is None:
            msg["value"] = self.values[msg["name"]].pop(0)


def one_by_one(fn, keys):
    results = [fn(keys[i]) for i in range(len(keys))]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)


@pytest.mark.parametrize(("num_particles", "num_mixing"), [(1, 1), (1, 2), (2, 1)])
def test_gradient_is_that_of_the_exact_bound(num_particles, num_mixing):
    """All that is drawn is discrete: the expectation of the estimator is a sum."""
    params = as_arrays({"mix": 0.4, "logits": jnp.array([-0.7, 1.1])})
    elbo = SemiImplicitELBO(num_particles, num_mixing=num_mixing, vectorize_particles=one_by_one)
    size = num_particles * (1 + num_mixing)
    tuples = jnp.array(list(itertools.product([0, 1], repeat=size + num_particles)))
    all_e, all_z = tuples[:, :size], tuples[:, size:]

    def log_probability(params, e, z):
        own = e[:: 1 + num_mixing]
        log_z = log_bernoulli(params["logits"][own], z)
        return log_bernoulli(params["mix"], e).sum() + log_z.sum()

    def estimate(e, z):
        def loss(params):
            with Force({"noise": e, "z": z}):
                return elbo.loss(random.key(0), params, two_values, two_components)

        return jax.value_and_grad(loss)(params)

    def exact(params):
        """The expectation of the loss, written out."""

        def loss(e, z):
            log_q = log_bernoulli(params["logits"][e.reshape(-1, 1 + num_mixing)], z[:, None])
            mixture = logsumexp(log_q, axis=1) - math.log(1 + num_mixing)
            return -(LOG_JOINT[z] - mixture).mean()

        weights = jnp.exp(jax.vmap(partial(log_probability, params))(all_e, all_z))
        return (weights * jax.vmap(loss)(all_e, all_z)).sum()

    values, gradients = quickly(jax.vmap(estimate))(all_e, all_z)
    weights = jnp.exp(jax.vmap(partial(log_probability, params))(all_e, all_z))
    value, gradient = quickly(jax.value_and_grad(exact))(params)
    np.testing.assert_allclose(weights.sum(), 1.0)
    np.testing.assert_allclose(weights @ values, value, rtol=1e-10)
    assert value > -math.log(0.4)
    for name, expected in gradient.items():
        np.testing.assert_allclose(jnp.tensordot(weights, gradients[name], 1), expected, atol=1e-10)


# --- in SVI --------------------------------------------------------------------------------------


def conjugate():
    with plate("data", 4):
        z = sample("z", dist.Normal(0.0, 1.0))
        sample("x", dist.Normal(z, 1.0), obs=X)


def conjugate_guide():
    """With these initial values the mixture is the posterior, Normal(x / 2, 1/2)."""
    loc, width = param("loc", X / 2), param("width", jnp.full(4, 0.6))
    with plate("data", 4):
        sample("z", dist.Normal(loc + width * noise(), math.sqrt(0.5 - 0.36)))


PROGRAMS = conjugate, conjugate_guide
EVIDENCE = dist.Normal(0.0, math.sqrt(2)).log_prob(X).sum()
AT_POSTERIOR = {"loc": X / 2, "width": jnp.full(4, 0.6)}


def test_bound_tightens_up_to_the_evidence():
    bounds, errors = [], []
    for num_mixing in (1, 4, 16, 64):
        elbo = SemiImplicitELBO(200, num_mixing=num_mixing)

        def bound(key, elbo=elbo):
            return -elbo.loss(key, AT_POSTERIOR, *PROGRAMS)

        keys = random.split(random.key(num_mixing), 64)
        values = quickly(partial(jax.lax.map, bound))(keys)
        bounds.append(values.mean())
        errors.append(values.std() / 8)
    assert max(errors) < 0.02, "uninformative"
    for (low, low_error), (high, high_error) in itertools.pairwise(
        zip([*bounds, EVIDENCE], [*errors, 0.0], strict=True)
    ):
        assert high - low > -4 * math.hypot(low_error, high_error)
    assert bounds[1] - bounds[0] > 4 * math.hypot(*errors[:2])
    assert EVIDENCE - bounds[-1] < 0.1


def test_training_finds_the_posterior():
    svi = SVI(*PROGRAMS, optax.adam(0.05), loss=SemiImplicitELBO(10, num_mixing=30))
    start = {"loc": jnp.zeros(4), "width": jnp.full(4, 0.2)}
    result = svi.run(random.key(0), 300, progress_bar=False, init_params=start)
    np.testing.assert_allclose(result.params["loc"], X / 2, atol=0.1)
    np.testing.assert_allclose(abs(result.params["width"]), 0.6, atol=0.1)
    np.testing.assert_allclose(result.losses[-50:].mean(), -EVIDENCE, atol=0.2)
    draws = Predictive(conjugate_guide, params=result.params, num_samples=1000)(random.key(1))
    np.testing.assert_allclose(draws["z"].mean(0), X / 2, atol=0.15)


@pytest.mark.parametrize("vectorize", [False, one_by_one])
def test_every_way_to_run_particles_gives_the_same(vectorize):
    def run(objective):
        loss = partial(objective.loss, random.key(0))
        return quickly(jax.value_and_grad(lambda p: loss(p, *PROGRAMS)))(AT_POSTERIOR)

    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12),
        run(SemiImplicitELBO(3, num_mixing=4, vectorize_particles=vectorize)),
        run(SemiImplicitELBO(3, num_mixing=4)),
    )


def test_score_gradient_has_the_pathwise_mean():
    """The same expectation by the other estimator, in units of its standard error."""

    def gradients(reparam, seed):
        elbo = SemiImplicitELBO(100, num_mixing=2, reparam=reparam)

        def gradient(key):
            def at(params):
                return elbo.loss(key, params, *PROGRAMS)

            return jax.grad(at)(AT_POSTERIOR | {"loc": jnp.zeros(4)})

        values = quickly(lambda keys: jax.lax.map(gradient, keys))(
            random.split(random.key(seed), 100)
        )
        return {name: (value.mean(0), value.std(0) / 10) for name, value in values.items()}

    pathwise, score = gradients("pathwise", 0), gradients("score", 1)
    for name, (mean, error) in score.items():
        other, other_error = pathwise[name]
        total = jnp.hypot(error, other_error)
        assert (total < 0.1).all(), "uninformative"
        assert (abs(mean - other) < 5 * total).all()


# --- bad input -----------------------------------------------------------------------------------


def without_noise():
    with plate("data", 4):
        sample("z", dist.Normal(0.0, 1.0))


def point_masses():
    with plate("data", 4):
        sample("z", dist.Delta(noise()))


def implicit():
    with plate("data", 4):
        sample("z", Implicit(noise()))


def marked_latents():
    with plate("data", 4):
        sample("z", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})


def two_scales():
    with plate("data", 4):
        e = noise()
        with handlers.scale(scale=0.5):
            sample("z", dist.Normal(e, 1.0))
        sample("factor", dist.Normal(e, 1.0), obs=jnp.zeros(4))


def scale_within_a_mixture():
    e = noise()
    with plate("data", 4), handlers.scale(scale=jnp.arange(1.0, 5.0)):
        sample("z", dist.Normal(e, 1.0))


@pytest.mark.parametrize(
    ("guide", "error", "match"),
    [
        (without_noise, ValueError, "needs a guide with noise.*is_auxiliary.*Trace_ELBO"),
        (AutoDiagonalNormal(conjugate), ValueError, "'z' is a point mass.*some width"),
        (point_masses, ValueError, "'z' is a point mass.*ImplicitELBO"),
        (implicit, NotImplementedError, "no density"),
        (marked_latents, ValueError, "'z' is marked auxiliary, but the model has it"),
        (two_scales, ValueError, "'z' and 'factor' differ in scale"),
        (scale_within_a_mixture, ValueError, r"'z' has shape \(4,\).*within one mixture"),
    ],
)
@pytest.mark.filterwarnings("ignore:Found auxiliary vars in the model")
def test_guides_that_are_no_mixtures_are_refused(guide, error, match):
    svi = SVI(conjugate, guide, optax.adam(0.1), loss=SemiImplicitELBO(2, num_mixing=2))
    # Traced only: what is refused need not be computed.
    with pytest.raises(error, match=f"(?s){match}"):
        jax.eval_shape(lambda: svi.update(svi.init(random.key(0))))


def test_subsampling_within_a_mixture_is_refused():
    def model():
        with plate("data", 4, subsample_size=2) as rows:
            z = sample("z", dist.Normal(0.0, 1.0))
            sample("x", dist.Normal(z, 1.0), obs=X[rows])

    def guide():
        e = noise()
        with plate("data", 4, subsample_size=2):
            sample("z", dist.Normal(e, 1.0))

    elbo = SemiImplicitELBO(2, num_mixing=2)
    with pytest.raises(ValueError, match=r"'data' is subsampled \(2 of 4\).*'noise' lies outside"):
        jax.eval_shape(lambda: elbo.loss(random.key(0), {}, model, guide))


def test_a_nan_names_its_site():
    def model():
        conjugate()
        factor("fault", jnp.nan)

    elbo = SemiImplicitELBO(2, num_mixing=2, vectorize_particles=one_by_one)
    with pytest.raises(ValueError, match="site 'fault' is NaN"):
        elbo.loss(random.key(0), AT_POSTERIOR, model, conjugate_guide)


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: SemiImplicitELBO(0, num_mixing=3), ValueError, "num_particles >= 1, got 0"),
        (lambda: SemiImplicitELBO(3, num_mixing=0), ValueError, "num_mixing >= 1, got 0"),
        (lambda: SemiImplicitELBO(3, num_mixing=2.0), TypeError, r"num_mixing.*2\.0"),
        (lambda: SemiImplicitELBO(3, num_mixing=2, reparam="stl"), ValueError, "reparam="),
    ],
)
def test_options_are_checked(build, error, match):
    with pytest.raises(error, match=match):
        build()
