"""Whether a fit can be trusted: the model's score by its definition, verdicts, what is refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro import handlers, param, plate, sample
from numpyro.infer import SVI

from numpyro_gradest import (
    AutoImplicit,
    Implicit,
    ImplicitELBO,
    check_implicit_fit,
    estimators,
)
from numpyro_gradest.infer._model_score import score_draws
from numpyro_gradest.infer._site_estimators import SiteEstimators
from numpyro_gradest.infer._trace import Program

X = jnp.array([0.9, -0.4, 0.1, 1.7])
INF = float("inf")
MASK = jnp.array([True, False, True, True])


def noise(name="noise", shape=()):
    fn = dist.Normal(0.0, 1.0).expand(shape).to_event(len(shape))
    return sample(name, fn, infer={"is_auxiliary": True})


def drawn(model, guide, reference=None, params=None):
    programs = model, guide, params or {}
    estimators = SiteEstimators("pathwise")
    program = Program(*programs, (), {}, estimators, is_weighted=False, takes_implicit=True)
    return score_draws(program, random.key(0), 3, reference)


# --- the model's score ---------------------------------------------------------------------------


def positive_model():
    y = sample("y", dist.Normal(1.0, 2.0))
    z = sample("z", dist.Gamma(2.0, 1.0).expand([2]).to_event(1))
    sample("x", dist.Normal(y, z.sum()), obs=0.7)


def positive_guide():
    e = noise(shape=(3,))
    sample("z", Implicit(jnp.exp(e[:2]), event_dim=1))
    sample("y", Implicit(e.sum()))


def test_score_in_unconstrained_space():
    """Of Gamma(2, 1) and its Jacobian in u = log z, 2 u - e^u."""
    reference = {"z": jnp.full((4, 2), 3.0), "y": jnp.arange(4.0)}
    (group,) = drawn(positive_model, positive_guide, reference)

    def log_density(u):
        s = jnp.exp(u[:2]).sum()
        log_prior = (2 * u[:2] - jnp.exp(u[:2])).sum() - (u[2] - 1) ** 2 / 8
        return log_prior - jnp.log(s) - (0.7 - u[2]) ** 2 / (2 * s**2)

    assert group.sites == ("z", "y")
    assert group.samples.shape == (1, 3, 3)
    desired = jax.vmap(jax.grad(log_density))(group.samples[0])
    np.testing.assert_allclose(group.model_scores[0], desired, rtol=1e-10)
    np.testing.assert_allclose(group.reference[0, :, :2], np.log(3.0))
    np.testing.assert_allclose(group.reference[0, :, 2], np.arange(4.0))


def test_score_through_an_autoguide():
    """Its implicit site is in no model: the latents are point masses computed from it."""
    guide = AutoImplicit(positive_model)
    svi = SVI(positive_model, guide, optax.adam(1e-3), loss=ImplicitELBO(2))
    (group,) = drawn(positive_model, guide, params=svi.get_params(svi.init(random.key(0))))

    def log_density(u):
        log_prior = (2 * u[1:] - jnp.exp(u[1:])).sum() - (u[0] - 1) ** 2 / 8
        s = jnp.exp(u[1:]).sum()
        return log_prior - jnp.log(s) - (0.7 - u[0]) ** 2 / (2 * s**2)

    assert group.sites == ("_auto_latent",)
    desired = jax.vmap(jax.grad(log_density))(group.samples[0])
    np.testing.assert_allclose(group.model_scores[0], desired, rtol=1e-10)


def joined_model():
    sample("y", dist.Normal(1.0, 2.0))
    with plate("rows", 2, dim=-2):
        sample("w", dist.Dirichlet(jnp.ones(3)))


def joined_draws():
    """Of the guide: its implicit site, and the latents as they come out."""
    guide = AutoImplicit(joined_model, init_scale=1.0)
    svi = SVI(joined_model, guide, optax.adam(1e-3), loss=ImplicitELBO(2))
    params = svi.get_params(svi.init(random.key(0)))
    seeded = handlers.substitute(guide, data=params)

    def draw(key):
        trace = handlers.trace(handlers.seed(seeded, key)).get_trace()
        return {name: trace[name]["value"] for name in ("_auto_latent", "w", "y")}

    return guide, params, jax.vmap(draw)(random.split(random.key(1), 6))


def test_reference_draws_at_the_latents_that_an_autoguide_joins():
    """As MCMC returns them, some with fewer dimensions in unconstrained space."""
    guide, params, draws = joined_draws()
    latent = draws.pop("_auto_latent")
    assert draws["w"].shape == (6, 2, 1, 3)
    (group,) = drawn(joined_model, guide, draws | {"sum": jnp.ones(6)}, params)
    np.testing.assert_allclose(group.reference[0], latent, rtol=1e-10)
    (group,) = drawn(joined_model, guide, {"_auto_latent": latent}, params)
    np.testing.assert_array_equal(group.reference[0], latent)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda draws: {"w": draws["w"]}, r"every latent that one joins, but 'y' is not .*\['w'\]"),
        (lambda draws: draws | {"y": draws["y"][1:]}, "same number R at every site.*'y': 5"),
        (
            lambda draws: draws | {"w": draws["w"][:, 0]},
            r"'w' need the shape \[R >= 2, \*\(2, 1, 3",
        ),
        (lambda draws: draws | {"y": draws["y"] * INF}, "reference draw.*not finite"),
    ],
    ids=["missing", "number", "shape", "infinite"],
)
def test_reference_draws_that_do_not_fit_are_refused(change, match):
    guide, params, draws = joined_draws()
    del draws["_auto_latent"]
    with pytest.raises(ValueError, match=match):
        drawn(joined_model, guide, change(draws), params)


@pytest.mark.parametrize(
    ("wrap", "rows"),
    [
        (lambda fn: fn, slice(None)),
        (lambda fn: handlers.scale(fn, 0.3), slice(None)),
        (lambda fn: handlers.mask(fn, mask=MASK[:, None]), MASK),
    ],
    ids=["plain", "scaled", "masked"],
)
def test_score_of_each_element_of_a_plate(wrap, rows):
    """Beside an explicit site, which is held; what a mask hides is left out."""

    def model():
        with plate("data", 4, dim=-2):
            g = sample("g", dist.Normal(0.0, 1.0))
            z = sample("z", dist.Normal(g[..., None] * jnp.ones(2), 1.0).to_event(1))
            sample("x", dist.Normal(z.sum(-1), 0.5), obs=X[:, None])

    def guide():
        with plate("data", 4, dim=-2):
            sample("g", dist.Normal(0.0, 0.0001))
            sample("z", Implicit(noise(shape=(2,)) + X[:, None, None], event_dim=1))

    reference = {"z": jnp.arange(40.0).reshape(5, 4, 1, 2)}
    (group,) = drawn(wrap(model), wrap(guide), reference)

    z = group.samples
    assert z.shape == (len(X[rows]), 3, 2)
    desired = -z + 4 * (X[rows][:, None] - z.sum(-1))[..., None]
    np.testing.assert_allclose(group.model_scores, desired, atol=1e-3)
    np.testing.assert_array_equal(
        group.reference, jnp.moveaxis(reference["z"][:, :, 0], 0, 1)[rows]
    )


# --- verdicts ------------------------------------------------------------------------------------


def check(model, guide, reference=None, **options):
    options = {"num_particles": 50} | options
    return check_implicit_fit(random.key(0), model, guide, {}, reference=reference, **options)


def gaussian():
    with plate("data", 3):
        sample("z", dist.Normal(X[:3], 2.0))


def gaussian_guide(scale=2.0, offset=0.0):
    def guide():
        with plate("data", 3):
            sample("z", Implicit(X[:3] + offset + scale * noise()))

    return guide


def test_an_exact_guide_is_trusted():
    reference = {"z": X[:3] + 2.0 * random.normal(random.key(1), (1000, 3))}
    report = check(gaussian, gaussian_guide(), reference)
    assert report.is_trusted, str(report)
    (figures,) = report.checks
    assert (figures.sites, figures.num_elements, figures.dim) == (("z",), 3, 1)
    assert (figures.num_samples, figures.num_reference) == (1000, 1000)
    assert figures.equivalent_draws > 100


def test_a_guide_that_is_too_narrow_is_caught():
    report = check(gaussian, gaussian_guide(scale=1.0))
    np.testing.assert_allclose(report.checks[0].narrowest, 0.25, rtol=0.2)
    assert "target's variance: too narrow" in str(report)


def test_a_guide_that_is_too_wide_is_caught():
    report = check(gaussian, gaussian_guide(scale=4.0))
    np.testing.assert_allclose(report.checks[0].widest, 4.0, rtol=0.2)
    assert "target's variance: too wide" in str(report)


def test_a_guide_in_the_wrong_place_is_caught():
    report = check(gaussian, gaussian_guide(offset=1.0))
    assert "the guide lies elsewhere" in str(report)
    assert report.checks[0].narrowest > 0.8


def test_an_estimator_that_shrinks_is_caught():
    estimator = partial(estimators.stein_score, ridge=10.0)
    report = check(gaussian, gaussian_guide(), score_estimator=estimator)
    assert report.checks[0].shrinkage < 0.8
    assert "the score estimate is" in str(report)


@pytest.mark.parametrize("score_estimator", [None, lambda draws: -draws], ids=["default", "true"])
def test_few_particles_do_not_look_like_a_wrong_width(score_estimator):
    """Of the mean of K = 4 draws the true score would be at 3/4, and the default at 4/3 of that."""

    def guide():
        sample("z", Implicit(noise()))

    def model():
        sample("z", dist.Normal(0.0, 1.0))

    report = check(model, guide, num_particles=4, score_estimator=score_estimator)
    assert abs(report.checks[0].shrinkage - 1) < 0.1
    assert report.is_trusted, str(report)


def test_a_missing_mode_is_caught_by_reference_draws_alone():
    def model():
        weights, locs = dist.Categorical(jnp.ones(2) / 2), jnp.array([-4.0, 4.0])
        sample("z", dist.MixtureSameFamily(weights, dist.Normal(locs, 1.0)))

    def guide():
        sample("z", Implicit(4.0 + noise()))

    report = check(model, guide)
    assert report.is_trusted
    assert "a mode that the guide misses altogether does not show" in str(report)
    side = jnp.where(jnp.arange(1000) % 2, 4.0, -4.0)
    reference = {"z": side + random.normal(random.key(1), (1000,))}
    report = check(model, guide, reference)
    assert "Nothing else shows it: it is likely to miss a mode" in str(report)


# --- bad input -----------------------------------------------------------------------------------


def subsampled():
    with plate("data", 4, subsample_size=2):
        sample("z", dist.Normal(0.0, 1.0))


def subsampled_guide():
    with plate("data", 4, subsample_size=2):
        sample("z", Implicit(noise()))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (partial(check, gaussian, lambda: gaussian()), "needs a guide with Implicit sites"),
        (partial(check, subsampled, subsampled_guide), "'data' is subsampled.*all of the data"),
        (partial(check, gaussian, gaussian_guide(), {}), "'z' is not among"),
        (partial(check, gaussian, gaussian_guide(scale=INF)), r"sites \['z'\] is not finite"),
        (
            partial(check, gaussian, gaussian_guide(), {"z": jnp.zeros((5, 2))}),
            r"site 'z' need the shape \[R >= 2, \*\(3,\)\], got \(5, 2\)",
        ),
        (partial(check, gaussian, gaussian_guide(), num_samples=0), "num_samples >= 1, got 0"),
        (partial(check, gaussian, gaussian_guide(), num_particles=1), "num_particles >= 2"),
    ],
)
def test_what_can_not_be_checked_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_parameters_are_those_of_the_fit():
    def guide():
        with plate("data", 3):
            sample("z", Implicit(X[:3] + param("scale", 1.0) * noise()))

    report = check_implicit_fit(
        random.key(0), gaussian, guide, {"scale": 2.0}, num_particles=50, num_samples=501
    )
    assert report.is_trusted
    assert report.checks[0].num_samples == 550
