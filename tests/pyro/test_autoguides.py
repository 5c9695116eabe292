"""Autoguides: joint ones have one weight, and no bound exceeds the evidence."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import plate, poutine, sample
from pyro.infer import autoguide
from torch.distributions import constraints

from pyro_gradest import IWAE, VIMCO, ReweightedWakeSleep
from tests.oracles import multisample as oracle
from tests.pyro.definition import Case, assert_follows_definition

X = torch.tensor([0.9, -0.4, 0.1, 1.7])


def local():
    """One latent for each datum; it is constrained."""
    with plate("data", 4):
        z = sample("z", dist.LogNormal(0.0, 1.0))
        sample("x", dist.Normal(z.log(), 1.0), obs=X)


EVIDENCE = dist.Normal(0.0, math.sqrt(2)).log_prob(X).sum().item()


def local_and_global():
    g = sample("g", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with plate("data", 4):
        z = sample("z", dist.Normal(g.sum(-1), 1.0))
        sample("x", dist.Normal(z, 1.0), obs=X)


class Amortised(autoguide.AutoNormalMessenger):
    """A messenger whose posterior at one site is its own."""

    def get_posterior(self, name, prior):
        slope = pyro.param("slope", torch.tensor(0.4))
        width = pyro.param("width", torch.tensor(0.8), constraint=constraints.positive)
        return dist.LogNormal(slope * X, width)


def guide_list(model):
    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoNormal(model))
    return guide


structured = partial(autoguide.AutoStructured, conditionals="normal", dependencies="linear")

ELEMENTWISE = {
    "AutoNormal": autoguide.AutoNormal,
    "AutoDelta": autoguide.AutoDelta,
    "AutoGuideList": guide_list,
    "AutoNormalMessenger": autoguide.AutoNormalMessenger,
    "AutoHierarchicalNormalMessenger": autoguide.AutoHierarchicalNormalMessenger,
    "AutoRegressiveMessenger": autoguide.AutoRegressiveMessenger,
}
OWN = {"own-messenger": Amortised}
JOINT = {
    "AutoDiagonalNormal": autoguide.AutoDiagonalNormal,
    "AutoMultivariateNormal": autoguide.AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": autoguide.AutoLowRankMultivariateNormal,
    "AutoIAFNormal": partial(autoguide.AutoIAFNormal, num_transforms=1),
    "AutoStructured": structured,
    "AutoGaussian": autoguide.AutoGaussian,
}
# A point mass has no density: its objective is no bound.
BOUNDED = {
    name: guide for name, guide in (ELEMENTWISE | JOINT | OWN).items() if name != "AutoDelta"
}
each_run = pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vectorized"])


@each_run
@pytest.mark.parametrize("build", (ELEMENTWISE | OWN).values(), ids=ELEMENTWISE | OWN)
def test_guides_with_a_site_in_the_plate_have_weights_per_datum(build, vectorize):
    case = Case(local, build(local), common_dims=(-1,), latents=())
    assert_follows_definition(case, vectorize=vectorize)


@each_run
@pytest.mark.parametrize("build", JOINT.values(), ids=JOINT)
def test_joint_guides_have_one_weight(build, vectorize):
    assert_follows_definition(Case(local, build(local), latents=()), vectorize=vectorize)


@each_run
@pytest.mark.parametrize("build", (ELEMENTWISE | JOINT).values(), ids=ELEMENTWISE | JOINT)
def test_global_and_local_latents_share_one_weight(build, vectorize):
    case = Case(local_and_global, build(local_and_global), latents=())
    assert_follows_definition(case, vectorize=vectorize)


@pytest.mark.parametrize("build", BOUNDED.values(), ids=BOUNDED)
def test_the_bound_stays_below_the_evidence(build):
    elbo = IWAE(3, num_replicates=300, vectorize_particles=True, max_plate_nesting=1)
    guide = build(local)
    elbo.loss(local, guide)
    bounds = torch.tensor([-elbo.loss(local, guide) for _ in range(12)])
    standard_error = bounds.std() / math.sqrt(len(bounds))
    assert bounds.mean() < EVIDENCE + 4.5 * standard_error
    # A joint guide counted once per datum exceeds the evidence by nats.
    assert standard_error < 0.5, "uninformative"


@pytest.mark.parametrize(
    "build",
    [autoguide.AutoDiagonalNormal, autoguide.AutoMultivariateNormal, Amortised],
    ids=["AutoDiagonalNormal", "AutoMultivariateNormal", "own-messenger"],
)
def test_wake_sleep_takes_the_score_of_autoguides(build):
    guide = build(local)
    is_joint = build is not Amortised
    assert_follows_definition(
        Case(
            local,
            guide,
            common_dims=() if is_joint else (-1,),
            latents=(f"_{type(guide).__name__}_latent",) if is_joint else ("z",),
        ),
        build=ReweightedWakeSleep,
        signal=oracle.wake_phi_learning_signal,
    )


def test_discrete_latents_beside_an_autoguide():
    def model():
        with plate("data", 4):
            b = sample("b", dist.Bernoulli(0.4))
            z = sample("z", dist.Normal(2.0 * b, 1.0))
            sample("x", dist.Normal(z, 1.0), obs=X)

    def discrete_part():
        logits = pyro.param("logits", torch.linspace(-1.0, 1.0, 4))
        with guide.plates["data"]:
            return {"b": sample("b", dist.Bernoulli(logits=logits))}

    guide = autoguide.AutoGuideList(model)
    guide.append(discrete_part)
    guide.append(autoguide.AutoNormal(poutine.block(model, hide=["b"])))
    gradients = assert_follows_definition(Case(model, guide, common_dims=(-1,), latents=("b",)))
    assert gradients["logits"].abs().min() > 0


def test_enumerated_discrete_sites_are_sampled_on_request():
    def model():
        with plate("data", 4):
            b = sample("b", dist.Categorical(torch.ones(3)))
            sample("x", dist.Normal(b.to(X), 1.0), obs=X)

    guide = autoguide.AutoDiscreteParallel(model)
    with pytest.raises(ValueError, match="'b' is configured for enumeration"):
        VIMCO(3).loss(model, guide)
    case = Case(model, guide, common_dims=(-1,), latents=("b",))
    assert_follows_definition(case, build=partial(VIMCO, strict_enumeration_warning=False))


@pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vectorized"])
def test_autoguides_that_subsample_with_the_model(vectorize):
    def model():
        with plate("data", 4, subsample_size=2) as rows:
            z = sample("z", dist.Normal(0.0, 1.0))
            sample("x", dist.Normal(z, 1.0), obs=X[rows])

    def create_plates():
        return plate("data", 4, subsample_size=2)

    guide = autoguide.AutoNormal(model, create_plates=create_plates)
    case = Case(model, guide, common_dims=(-1,), bound_scale=2.0, latents=())
    assert_follows_definition(case, vectorize=vectorize)
