"""Distributions over subsets, rankings and trees at NumPyro's sites, and as pytrees."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers, plate, sample
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI
from numpyro.optim import Adam

from numpyro_gradest import (
    VIMCO,
    KSubset,
    OneHotCategorical,
    PlackettLuce,
    PlackettLuceSubset,
    SpanningTree,
)

WEIGHTS = jnp.array([1.0, -2.0, 0.5, 3.0])
X = jnp.array([3.7, -0.9, 1.2])
PRIOR = jnp.array([0.3, -0.2, 0.0, 0.5])
SITES = [
    KSubset(jnp.zeros((3, 4)), 2),
    PlackettLuceSubset(jnp.zeros((3, 4)), 2),
    PlackettLuce(jnp.zeros((3, 4))),
    SpanningTree(jnp.zeros((3, 4, 4))),
]
every_site = pytest.mark.parametrize("site", SITES, ids=lambda site: type(site).__name__)


def model():
    with plate("data", 3):
        z = sample("z", KSubset(PRIOR, 2))
        sample("x", dist.Normal((z * WEIGHTS).sum(-1), 1.0), obs=X)


def guide():
    logits = numpyro.param("logits", jnp.zeros((3, 4)))
    with plate("data", 3):
        sample("z", KSubset(logits, 2))


@jax.jit
def exact_bound(logits):
    """The ELBO and the evidence, by summing over all values."""
    p, q = KSubset(PRIOR, 2), KSubset(logits, 2)
    z = q.enumerate_support()
    log_q = q.log_prob(z)
    log_joint = p.log_prob(z) + dist.Normal((z * WEIGHTS).sum(-1), 1.0).log_prob(X)
    evidence = jax.nn.logsumexp(log_joint, axis=0).sum()
    return (jnp.exp(log_q) * (log_joint - log_q)).sum(), evidence


def test_training():
    """The exact bound comes most of the way to the evidence."""
    svi = SVI(model, guide, Adam(0.1), VIMCO(num_particles=4))

    params = svi.run(jax.random.key(0), 100, progress_bar=False).params

    (bound, evidence), (first, _) = map(exact_bound, (params["logits"], jnp.zeros((3, 4))))
    assert first + 0.6 * (evidence - first) < bound <= evidence + 1e-9


@every_site
def test_pytree(site):
    """A site goes into and out of compiled and mapped functions, its size staying static."""

    @jax.jit
    def draw(site, key):
        value = site.sample(key)
        return site, value, site.log_prob(value)

    returned, value, log_prob = draw(site, jax.random.key(0))
    mapped = jax.vmap(lambda logits: jax.tree.map(lambda _: logits, site).logits)(site.logits)

    assert returned.batch_shape == (3,)
    assert repr(returned.support) == repr(site.support)
    np.testing.assert_allclose(returned.log_prob(value), log_prob, rtol=1e-12)
    assert value.shape == site.shape()
    assert mapped.shape == site.logits.shape


@pytest.mark.parametrize("site", [SITES[0], SITES[3]], ids=["subset", "tree"])
def test_sites_in_plates_and_scan(site):
    def step(carry, _):
        with plate("rows", 2, dim=-2), plate("data", 3, dim=-1):
            return carry, sample("z", site)

    def program():
        return scan(step, 0.0, None, length=4)[1]

    trace = handlers.trace(handlers.seed(program, 0)).get_trace()

    value = trace["z"]["value"]
    assert value.shape == (4, 2, 3, *site.event_shape)
    assert np.isfinite(trace["z"]["fn"].log_prob(value)).all()


def test_values_outside_of_the_support_have_probability_zero():
    for site, value in (
        (KSubset(PRIOR, 2), jnp.ones(4)),
        (PlackettLuce(PRIOR), jnp.array([0, 1, 2, 2])),
        (SpanningTree(jnp.zeros((3, 3))), jnp.ones((3, 3))),
        (OneHotCategorical(logits=PRIOR), jnp.ones(4)),
    ):
        with pytest.warns(UserWarning, match="Out-of-support"):
            assert site.log_prob(value) == -jnp.inf


def test_one_hot_values_are_enumerated():
    site = OneHotCategorical(logits=jnp.stack([PRIOR, WEIGHTS]))
    values = site.enumerate_support()
    assert site.has_enumerate_support
    np.testing.assert_array_equal(values, np.broadcast_to(np.eye(4)[:, None], (4, 2, 4)))
    np.testing.assert_allclose(site.log_prob(values).T, site.logits, rtol=1e-12)
    assert site.enumerate_support(expand=False).shape == (4, 1, 4)


def test_supports_compare_by_what_they_hold():
    assert KSubset(PRIOR, 2).support == KSubset(WEIGHTS, 2).support
    assert KSubset(PRIOR, 2).support != KSubset(PRIOR, 3).support
    assert jax.tree.unflatten(*jax.tree.flatten(KSubset(PRIOR, 2).support)[::-1]).k == 2


def test_compiled_once():
    """Other logits and keys do not trace again."""
    traces = []

    @jax.jit
    def draw(key, logits):
        traces.append(0)
        return SpanningTree(logits + logits.mT).sample(key)

    for i in range(3):
        draw(jax.random.key(i), jnp.full((4, 4), 1.0 * i))
    assert len(traces) == 1
