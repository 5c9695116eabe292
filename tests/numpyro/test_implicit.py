"""Implicit sites: the gradient as it is defined, draw for draw, and what is refused.

With a score estimator that is a known function, nothing of ``ImplicitELBO`` is an estimate: at the
noise that was drawn, its loss and gradient can be written out.
"""

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
from numpyro import factor, handlers, param, plate, sample
from numpyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO

from numpyro_gradest import IWAE, Implicit, ImplicitELBO
from tests.conformance.backends import QUICK_TO_COMPILE
from tests.numpyro.definition import as_arrays, evaluate, log_normal
from tests.oracles import score as oracle

K = 5
X = jnp.array([0.9, -0.4, 0.1, 1.7])
quickly = partial(jax.jit, compiler_options=QUICK_TO_COMPILE)


def known_score(samples):
    """No score of anything, but a function whose every entry differs by sample and dim."""
    assert samples.shape[-2] == K
    return jnp.sin(3.0 * samples) - 0.3 * samples.sum(-1, keepdims=True)


def noise(name="noise", shape=()):
    fn = dist.Normal(0.0, 1.0).expand(shape).to_event(len(shape))
    return sample(name, fn, infer={"is_auxiliary": True})


class Case(NamedTuple):
    model: Callable[[], Any]
    guide: Callable[[], Any]
    params: dict[str, Any]
    elbo: Callable[[dict, dict], Any]
    """(params, draws of one particle) -> log p - log q of the explicit sites, with scales."""
    implicit: Callable[[dict, dict], list]
    """(params, draws of one particle) -> [(draw ``[*plates, D]``, weight ``[*plates]``), ...]"""


def global_sites():
    """Two sites, one of them positive: their entropy is joint, in unconstrained space."""

    def model():
        y = sample("y", dist.Normal(0.0, 1.0))
        z = sample("z", dist.Gamma(2.0, 1.0).expand([2]).to_event(1))
        sample("x", dist.Normal(param("slope", 0.8) * y, z.sum()), obs=0.7)

    def guide():
        a, b = param("a", 0.3), param("b", 0.5)
        e = noise(shape=(3,))
        sample("y", Implicit(a + b * e[0] * e[1]))
        sample("z", Implicit(jnp.exp(b * e[1:] + a * e[0]), event_dim=1))

    def latents(params, draws):
        a, b, e = params["a"], params["b"], draws["noise"]
        return a + b * e[0] * e[1], b * e[1:] + a * e[0]

    def elbo(params, draws):
        y, u = latents(params, draws)
        z = jnp.exp(u)
        log_prior = log_normal(y, 0.0, 1.0) + (jnp.log(z) - z).sum()
        # log|dz/du| = u belongs to the entropy of z.
        return log_prior + log_normal(0.7, params["slope"] * y, z.sum()) + u.sum()

    def implicit(params, draws):
        y, u = latents(params, draws)
        return [(jnp.concatenate([y[None], u]), 1.0)]

    return Case(model, guide, {"slope": 0.8, "a": 0.3, "b": 0.5}, elbo, implicit)


def local_sites(wrap=lambda fn: fn, weight=1.0):
    """An entropy for each element of two plates."""

    def model():
        with plate("rows", 2, dim=-2), plate("data", 4, dim=-1):
            z = sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            sample("x", dist.Normal(param("slope", 0.8) * z.sum(-1), 1.0), obs=X)

    def guide():
        a = param("a", jnp.linspace(-1.0, 1.0, 16).reshape(2, 4, 2))
        with plate("rows", 2, dim=-2), plate("data", 4, dim=-1):
            e = noise(shape=(2,))
            sample("z", Implicit(a * e + e**2, event_dim=1))

    def latents(params, draws):
        return params["a"] * draws["noise"] + draws["noise"] ** 2

    def elbo(params, draws):
        z = latents(params, draws)
        log_p = log_normal(z, 0.0, 1.0).sum(-1)
        log_p += log_normal(X, params["slope"] * z.sum(-1), 1.0)
        return (weight * log_p).sum()

    def implicit(params, draws):
        return [(latents(params, draws), jnp.broadcast_to(weight, (2, 4)))]

    params = {"slope": 0.8, "a": np.linspace(-1.0, 1.0, 16).reshape(2, 4, 2)}
    return Case(wrap(model), wrap(guide), params, elbo, implicit)


def scaled():
    return local_sites(lambda fn: handlers.scale(fn, 0.3), 0.3)


def annealed():
    """The model alone is scaled: log p counts less, the entropy does not."""
    case = local_sites()
    return case._replace(
        model=handlers.scale(case.model, 0.3), elbo=lambda *args: 0.3 * case.elbo(*args)
    )


def masked():
    mask = jnp.array([True, False, True, True])
    return local_sites(lambda fn: handlers.mask(fn, mask=mask), mask)


def subsampled():
    """A global implicit site beside local ones, of which each step sees half."""

    def model():
        y = sample("y", dist.Normal(0.0, 1.0))
        with plate("data", 4, subsample_size=2) as rows:
            z = sample("z", dist.Normal(y, 1.0))
            sample("x", dist.Normal(z, 1.0), obs=X[rows])

    def guide():
        a, b = param("a", 0.3), param("b", X)
        sample("y", Implicit(a * noise("e") ** 2))
        with plate("data", 4, subsample_size=2) as rows:
            sample("z", Implicit(b[rows] + a * noise("f")))

    def latents(params, draws):
        rows = draws["data"]
        return params["a"] * draws["e"] ** 2, params["b"][rows] + params["a"] * draws["f"]

    def elbo(params, draws):
        y, z = latents(params, draws)
        log_local = log_normal(z, y, 1.0) + log_normal(X[draws["data"]], z, 1.0)
        return log_normal(y, 0.0, 1.0) + 2.0 * log_local.sum()

    def implicit(params, draws):
        y, z = latents(params, draws)
        return [(y[None], 1.0), (z[:, None], jnp.full(2, 2.0))]

    return Case(model, guide, {"a": 0.3, "b": np.asarray(X)}, elbo, implicit)


def explicit_given_implicit():
    """A site with a density may depend on one without; learnable noise is no latent."""

    def model():
        z = sample("z", dist.Normal(0.0, 1.0))
        y = sample("y", dist.Normal(z, 1.0))
        sample("x", dist.Normal(y, 1.0), obs=0.7)

    def guide():
        a = param("a", 0.3)
        e = sample("e", dist.Normal(a, jnp.exp(a)), infer={"is_auxiliary": True})
        z = sample("z", Implicit(jnp.sinh(e)))
        sample("y", dist.Normal(a * z, 0.5))

    def latents(params, draws):
        # Standardised, the draws are noise that no parameter moves.
        a = params["a"]
        z = jnp.sinh(a + jnp.exp(a) * (draws["e"] - 0.3) / jnp.exp(0.3))
        return z, a * z + draws["y"] - 0.3 * jnp.sinh(draws["e"])

    def elbo(params, draws):
        z, y = latents(params, draws)
        log_p = log_normal(z, 0.0, 1.0) + log_normal(y, z, 1.0) + log_normal(0.7, y, 1.0)
        return log_p - log_normal(y, params["a"] * z, 0.5)

    def implicit(params, draws):
        return [(latents(params, draws)[0][None], 1.0)]

    return Case(model, guide, {"a": 0.3}, elbo, implicit)


CASES = [global_sites, local_sites, scaled, annealed, masked, subsampled, explicit_given_implicit]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_loss_and_gradient_follow_the_definition(case):
    case = case()
    build = partial(ImplicitELBO, K, score_estimator=known_score)
    actual = evaluate(build, case.model, case.guide, case.params)
    draws = [{name: value[k] for name, value in actual.draws.items()} for k in range(K)]

    def surrogate(params):
        total = sum(case.elbo(params, each) for each in draws) / K
        for group in zip(*(case.implicit(params, each) for each in draws), strict=True):
            samples = jnp.stack([u for u, _ in group], axis=-2)
            score = known_score(jax.lax.stop_gradient(samples))
            total -= (group[0][1] * (score * samples).sum(-1).mean(-1)).sum()
        return -total

    params = as_arrays(case.params)
    gradient = quickly(jax.grad(surrogate))(params)
    for name in case.params:
        np.testing.assert_allclose(actual.gradient[name], gradient[name], rtol=1e-9, atol=1e-12)

    elbo = np.mean([case.elbo(params, each) for each in draws])
    for group in zip(*(case.implicit(params, each) for each in draws), strict=True):
        samples = np.stack([u for u, _ in group], axis=-2)
        entropies = oracle.per_batch_element(oracle.knn_entropy, samples)
        elbo += (group[0][1] * entropies).sum()
    np.testing.assert_allclose(actual.loss, -elbo, rtol=1e-10)


def test_discrete_sites_beside_implicit_ones():
    """The others' mean is the baseline; the implicit entropy is no part of the signal."""

    def model():
        b = sample("b", dist.Bernoulli(0.3))
        z = sample("z", dist.Normal(0.0, 1.0))
        sample("x", dist.Normal(b + z, 1.0), obs=0.7)

    def guide():
        sample("b", dist.Bernoulli(logits=param("logit", 0.4)))
        sample("z", Implicit(param("a", 0.3) * noise()))

    params = as_arrays({"logit": 0.4, "a": 0.3})
    build = partial(ImplicitELBO, K, score_estimator=known_score)
    actual = evaluate(build, model, guide, params)
    b, z = actual.draws["b"], 0.3 * actual.draws["noise"]
    log_q = jnp.where(b == 1, jax.nn.log_sigmoid(0.4), jax.nn.log_sigmoid(-0.4))
    f = jnp.where(b == 1, jnp.log(0.3), jnp.log(0.7)) + log_normal(z, 0.0, 1.0)
    f += log_normal(0.7, b + z, 1.0) - log_q
    baseline = (f.sum() - f) / (K - 1)
    expected = -((f - baseline) * (b - jax.nn.sigmoid(0.4))).mean()
    np.testing.assert_allclose(actual.gradient["logit"], expected, rtol=1e-9)


@pytest.mark.parametrize("shape", [(9, 1), (2, 12, 3)], ids=str)
def test_the_default_score_estimator_equals_the_oracle(shape):
    """Stein's at 0.7 times the median distance of the whitened samples, calibrated."""

    def desired(samples):
        mean, factor = oracle.whitening(samples)
        whitened = np.linalg.solve(factor, (samples - mean).T).T
        bandwidth = 0.7 * oracle.median_bandwidth(whitened)
        return oracle.calibrate(samples, oracle.stein(samples, bandwidth=bandwidth))

    samples = np.random.default_rng(0).gamma(2.0, size=shape)
    actual = ImplicitELBO(shape[-2]).score_estimator(jnp.asarray(samples))
    np.testing.assert_allclose(actual, oracle.per_batch_element(desired, samples), rtol=1e-7)


# --- in SVI --------------------------------------------------------------------------------------


def conjugate():
    with plate("data", 4):
        z = sample("z", dist.Normal(0.0, 1.0))
        sample("x", dist.Normal(z, 1.0), obs=X)


def conjugate_guide():
    loc, scale = param("loc", jnp.zeros(4)), param("scale", jnp.ones(4))
    with plate("data", 4):
        sample("z", Implicit(loc + scale * noise()))


def test_training_finds_the_posterior():
    """Normal(x / 2, 1/2); a guide without the entropy's gradient would shrink to a point."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, 300))
    svi = SVI(conjugate, conjugate_guide, optimizer, loss=ImplicitELBO(50))
    result = svi.run(random.key(0), 300, progress_bar=False)
    np.testing.assert_allclose(result.params["loc"], X / 2, atol=0.1)
    np.testing.assert_allclose(abs(result.params["scale"]), np.sqrt(0.5), atol=0.05)
    evidence = dist.Normal(0.0, np.sqrt(2)).log_prob(X).sum()
    np.testing.assert_allclose(result.losses[-50:].mean(), -evidence, atol=0.3)
    draws = Predictive(conjugate_guide, params=result.params, num_samples=1000)(random.key(1))
    np.testing.assert_allclose(draws["z"].mean(0), X / 2, atol=0.15)


def test_a_step_is_traced_once():
    traces = []

    def counted():
        traces.append(None)
        conjugate()

    svi = SVI(counted, conjugate_guide, optax.adam(0.1), loss=ImplicitELBO(5))
    state = svi.init(random.key(0))
    update = quickly(svi.update)
    state, _ = update(state)
    before = len(traces)
    update(state)
    assert len(traces) == before


@pytest.mark.parametrize("vectorize", [False, lambda fn, keys: jax.vmap(fn)(keys)])
def test_every_way_to_run_particles_gives_the_same(vectorize):
    params = {"loc": jnp.zeros(4), "scale": jnp.ones(4)}

    def run(objective):
        loss = partial(objective.loss, random.key(0))
        return quickly(jax.value_and_grad(lambda p: loss(p, conjugate, conjugate_guide)))(params)

    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-9),
        run(ImplicitELBO(5, vectorize_particles=vectorize)),
        run(ImplicitELBO(5)),
    )


def test_too_few_particles_give_one_warning():
    def model():
        sample("z", dist.Normal(0.0, 1.0).expand([4]).to_event(1))

    def guide():
        sample("z", Implicit(param("scale", 1.0) * noise(shape=(4,)), event_dim=1))

    svi = SVI(model, guide, optax.adam(1e-3), loss=ImplicitELBO(3))
    with pytest.warns(UserWarning, match="3 samples in 4 dimensions") as warned:
        svi.run(random.key(0), 2, progress_bar=False)
    assert len(warned) == 1


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [Trace_ELBO(), TraceMeanField_ELBO(), IWAE(3)])
def test_other_losses_refuse_implicit_sites(loss):
    svi = SVI(conjugate, conjugate_guide, optax.adam(0.1), loss=loss)
    # Traced only: what is refused need not be computed.
    with pytest.raises(NotImplementedError, match=r"ImplicitELBO\(num_particles"):
        jax.eval_shape(lambda: svi.update(svi.init(random.key(0))))


def depends_on_a_latent():
    z = sample("z", Implicit(param("a", 0.3) * noise("e")))
    with plate("data", 4):
        sample("y", Implicit(z + noise("f")))


def depends_on_a_discrete_latent():
    b = sample("z", dist.Categorical(jnp.ones(3) / 3))
    with plate("data", 4):
        sample("y", Implicit(param("a", X[:3])[b] + noise("f")))


def without_noise():
    sample("z", Implicit(param("a", 0.3)))
    with plate("data", 4):
        sample("y", Implicit(noise("f")))


def discrete_noise():
    e = sample("e", dist.Bernoulli(0.5), infer={"is_auxiliary": True})
    sample("z", Implicit(param("a", 0.3) * e))
    with plate("data", 4):
        sample("y", Implicit(noise("f")))


def shared_noise():
    e = noise("e")
    sample("z", Implicit(param("a", 0.3) * e))
    with plate("data", 4):
        sample("y", Implicit(e + noise("f")))


def observed():
    sample("z", Implicit(param("a", 0.3) * noise("e")))
    with plate("data", 4):
        sample("y", Implicit(noise("f")), obs=X)


def infinite():
    sample("z", Implicit(param("a", 0.3) * noise("e") + jnp.inf))
    with plate("data", 4):
        sample("y", Implicit(noise("f")))


@pytest.mark.parametrize(
    ("guide", "match"),
    [
        (depends_on_a_latent, "site 'y' depends on the draw of site 'z'"),
        (depends_on_a_discrete_latent, "site 'y' depends on the draw of site 'z'"),
        (without_noise, "site 'z' is computed from no noise.*is_auxiliary"),
        (discrete_noise, "'z' is computed from 'e'.*no gradient passes"),
        (shared_noise, "'y' lies in plate 'data' but its noise 'e' outside"),
        (observed, "site 'y' is observed|Model site 'y'"),
        (infinite, r"implicit sites \['z'\] is not finite"),
    ],
)
@pytest.mark.filterwarnings("ignore:Out-of-support")
def test_guides_that_have_no_entropy_to_estimate_are_refused(guide, match):
    def model():
        z = sample("z", dist.Normal(0.0, 1.0))
        with plate("data", 4):
            sample("y", dist.Normal(1.0 * z, 1.0))
        factor("nothing", 0.0)

    params = as_arrays({"a": X[:3] if guide is depends_on_a_discrete_latent else 0.3})
    with pytest.raises(ValueError, match=match):
        ImplicitELBO(3).loss(random.key(0), params, model, guide)


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: ImplicitELBO(1), ValueError, "num_particles >= 2 .*five per dimension.*got 1"),
        (lambda: ImplicitELBO(2.0), TypeError, r"num_particles.*2\.0"),
        (lambda: ImplicitELBO(3, reparam="stl"), ValueError, "reparam="),
        (lambda: ImplicitELBO(3, score_estimator="stein"), TypeError, "score_estimator.*'stein'"),
        (lambda: Implicit(jnp.arange(3)), TypeError, "floating array.*int"),
        (lambda: Implicit(jnp.zeros(3), event_dim=2), ValueError, "event_dim <= 1.*got 2"),
    ],
)
def test_options_are_checked(build, error, match):
    with pytest.raises(error, match=f"(?s){match}"):
        build()


def test_a_score_estimator_that_changes_the_shape_is_refused():
    elbo = ImplicitELBO(3, score_estimator=lambda samples: samples[..., 0])
    params = {"loc": jnp.zeros(4), "scale": jnp.ones(4)}
    with pytest.raises(ValueError, match="score_estimator"):
        jax.eval_shape(lambda: elbo.loss(random.key(0), params, conjugate, conjugate_guide))
