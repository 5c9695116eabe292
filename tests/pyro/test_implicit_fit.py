"""Whether a fit can be trusted: the model's score by its definition, verdicts, what is refused."""

from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import plate, poutine, sample

from pyro_gradest import AutoImplicit, Implicit, ImplicitELBO, check_implicit_fit, estimators
from pyro_gradest.infer._implicit import implicit_parents
from pyro_gradest.infer._model_score import score_draws
from pyro_gradest.infer.multisample_elbo import program_of

X = torch.tensor([0.9, -0.4, 0.1, 1.7])
INF = float("inf")
MASK = torch.tensor([True, False, True, True])
each_run = pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vectorized"])


def noise(name="noise", shape=()):
    fn = dist.Normal(0.0, 1.0).expand(shape).to_event(len(shape))
    return sample(name, fn, infer={"is_auxiliary": True})


def drawn(model, guide, vectorize, reference=None):
    elbo = ImplicitELBO(3, vectorize_particles=vectorize)
    program = program_of(elbo, model, guide, (), {})
    parents = implicit_parents(guide, (), {})
    return score_draws(program._replace(parents=parents, is_weighted=False), 3, reference)


# --- the model's score ---------------------------------------------------------------------------


def positive_model():
    y = sample("y", dist.Normal(1.0, 2.0))
    z = sample("z", dist.Gamma(2.0, 1.0).expand([2]).to_event(1))
    sample("x", dist.Normal(y, z.sum(-1)), obs=torch.tensor(0.7))


def positive_guide():
    e = noise(shape=(3,))
    sample("z", Implicit(e[..., :2].exp(), event_dim=1))
    sample("y", Implicit(e.sum(-1)))


@each_run
def test_score_in_unconstrained_space(vectorize):
    """Of Gamma(2, 1) and its Jacobian in u = log z, 2 u - e^u."""
    reference = {"z": torch.full((4, 2), 3.0), "y": torch.arange(4.0)}
    (group,) = drawn(positive_model, positive_guide, vectorize, reference)

    u = group.samples[0].requires_grad_()
    s = u[:, :2].exp().sum(-1)
    log_density = (2 * u[:, :2] - u[:, :2].exp()).sum(-1) - (u[:, 2] - 1) ** 2 / 8
    log_density = log_density - s.log() - (0.7 - u[:, 2]) ** 2 / (2 * s**2)
    (desired,) = torch.autograd.grad(log_density.sum(), u)

    assert group.sites == ("z", "y")
    assert group.samples.shape == (1, 3, 3)
    np.testing.assert_allclose(group.model_scores[0], desired, rtol=1e-10)
    np.testing.assert_allclose(group.reference[0, :, :2], np.log(3.0))
    np.testing.assert_allclose(group.reference[0, :, 2], np.arange(4.0))


@each_run
def test_score_through_an_autoguide(vectorize):
    """Its implicit site is in no model: the latents are point masses computed from it."""
    guide = AutoImplicit(positive_model)
    guide()
    (group,) = drawn(positive_model, guide, vectorize)

    u = group.samples[0].requires_grad_()
    s = u[:, 1:].exp().sum(-1)
    log_density = (2 * u[:, 1:] - u[:, 1:].exp()).sum(-1) - (u[:, 0] - 1) ** 2 / 8
    log_density = log_density - s.log() - (0.7 - u[:, 0]) ** 2 / (2 * s**2)
    (desired,) = torch.autograd.grad(log_density.sum(), u)

    np.testing.assert_allclose(group.model_scores[0], desired, rtol=1e-10)


def joined_model():
    sample("y", dist.Normal(1.0, 2.0))
    with plate("rows", 2, dim=-2):
        sample("w", dist.Dirichlet(torch.ones(3)))


def joined_draws():
    """Of the guide: its implicit site, and the latents as they come out."""
    guide = AutoImplicit(joined_model, init_scale=1.0)
    traces = [poutine.trace(guide).get_trace() for _ in range(6)]
    names = "_AutoImplicit_latent", "w", "y"
    return guide, {
        name: torch.stack([trace.nodes[name]["value"].detach() for trace in traces])
        for name in names
    }


def test_reference_draws_at_the_latents_that_an_autoguide_joins():
    """As MCMC returns them, some with fewer dimensions in unconstrained space."""
    guide, draws = joined_draws()
    latent = draws.pop("_AutoImplicit_latent")
    assert draws["w"].shape == (6, 2, 1, 3)
    (group,) = drawn(joined_model, guide, True, draws | {"sum": torch.ones(6)})
    np.testing.assert_allclose(group.reference[0], latent, rtol=1e-10)
    (group,) = drawn(joined_model, guide, True, {"_AutoImplicit_latent": latent})
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
    guide, draws = joined_draws()
    del draws["_AutoImplicit_latent"]
    with pytest.raises(ValueError, match=match):
        drawn(joined_model, guide, True, change(draws))


@each_run
@pytest.mark.parametrize(
    ("wrap", "rows"),
    [
        (lambda fn: fn, slice(None)),
        (lambda fn: poutine.scale(fn, 0.3), slice(None)),
        (lambda fn: poutine.mask(fn, MASK[:, None]), MASK),
    ],
    ids=["plain", "scaled", "masked"],
)
def test_score_of_each_element_of_a_plate(wrap, rows, vectorize):
    """Beside an explicit site, which is held; what a mask hides is left out."""

    def model():
        with plate("data", 4, dim=-2):
            g = sample("g", dist.Normal(0.0, 1.0))
            z = sample("z", dist.Normal(g[..., None] * torch.ones(2), 1.0).to_event(1))
            sample("x", dist.Normal(z.sum(-1), 0.5), obs=X[:, None])

    def guide():
        with plate("data", 4, dim=-2):
            sample("g", dist.Normal(0.0, 0.0001))
            sample("z", Implicit(noise(shape=(2,)) + X[:, None, None], event_dim=1))

    reference = {"z": torch.arange(40.0).reshape(5, 4, 1, 2)}
    (group,) = drawn(wrap(model), wrap(guide), vectorize, reference)

    z = group.samples
    assert z.shape == (len(X[rows]), 3, 2)
    desired = -z + 4 * (X[rows][:, None] - z.sum(-1))[..., None]
    np.testing.assert_allclose(group.model_scores, desired, atol=1e-3)
    np.testing.assert_array_equal(group.reference, reference["z"][:, :, 0].movedim(0, 1)[rows])


# --- verdicts ------------------------------------------------------------------------------------


def check(model, guide, reference=None, **options):
    options = {"num_particles": 50, "vectorize_particles": True} | options
    return check_implicit_fit(model, guide, reference=reference, **options)


def gaussian():
    with plate("data", 3):
        sample("z", dist.Normal(X[:3], 2.0))


def gaussian_guide(scale=2.0, offset=0.0):
    def guide():
        with plate("data", 3):
            sample("z", Implicit(X[:3] + offset + scale * noise()))

    return guide


@each_run
def test_an_exact_guide_is_trusted(vectorize):
    reference = {"z": X[:3] + 2.0 * torch.randn(1000, 3)}
    report = check(gaussian, gaussian_guide(), reference, vectorize_particles=vectorize)
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
    # The host can't transform the support of MixtureSameFamily.
    def model():
        locs = torch.tensor([[-4.0], [4.0]])
        mixture = dist.MixtureOfDiagNormals(locs, torch.ones(2, 1), torch.zeros(2))
        sample("z", mixture)

    def guide():
        sample("z", Implicit(4.0 + noise(shape=(1,)), event_dim=1))

    report = check(model, guide)
    assert report.is_trusted
    assert "a mode that the guide misses altogether does not show" in str(report)
    side = torch.where(torch.arange(1000) % 2 == 0, 4.0, -4.0)
    reference = {"z": (side + torch.randn(1000))[:, None]}
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
            partial(check, gaussian, gaussian_guide(), {"z": torch.zeros(5, 2)}),
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
            sample("z", Implicit(X[:3] + pyro.param("scale", torch.tensor(2.0)) * noise()))

    report = check(gaussian, guide, num_samples=501)
    assert report.is_trusted
    assert report.checks[0].num_samples == 550
