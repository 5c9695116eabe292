"""Every kind of site: which part of the gradient it gets, and what its log-probability is."""

from functools import partial
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import plate, sample
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.distributions.testing.rejection_gamma import ShapeAugmentedGamma
from torch.distributions import AffineTransform, constraints

from pyro_gradest import IWAE, OVIS, VIMCO, ReweightedWakeSleep
from tests.oracles import multisample as oracle
from tests.pyro.definition import Case, assert_follows_definition

X = torch.tensor([0.9, -0.4, 0.1])
MASK = torch.tensor([True, False, True])


def param(name, value, **options):
    return pyro.param(name, torch.as_tensor(value), **options)


def around(latent, observe=lambda z: dist.Normal(z, 0.7)):
    """A model whose data lie around a latent; its plate is common."""

    def model():
        with plate("data", 3):
            z = sample("z", latent())
            sample("x", observe(param("weight", 0.8) * z), obs=X)

    return model


def drawn_from(proposal):
    def guide():
        with plate("data", 3):
            sample("z", proposal())

    return guide


def elementwise(latent, proposal, **fields):
    return Case(around(latent), drawn_from(proposal), common_dims=(-1,), **fields)


def loc():
    return param("loc", [0.3, -0.2, 0.5])


def scale():
    return param("scale", 1.2, constraint=constraints.positive)


standard_normal = partial(dist.Normal, 0.0, 1.0)

# --- one latent of each kind ---------------------------------------------------------------------


class Triangle(dist.TorchDistribution):
    """A distribution that does not know how to expand, so that the host wraps it."""

    arg_constraints: ClassVar = {}
    support = constraints.real
    has_rsample = True

    def __init__(self, width):
        self.width = width
        super().__init__(width.shape)

    def rsample(self, sample_shape=()):
        noise = torch.rand((*sample_shape, 2, *self.batch_shape)).sum(-1 - len(self.batch_shape))
        return self.width * (noise - 1)

    def log_prob(self, value):
        return torch.log1p(-abs(value) / self.width) - self.width.log()


PATHWISE = {
    "normal": elementwise(standard_normal, lambda: dist.Normal(loc(), scale())),
    "gamma": elementwise(
        lambda: dist.Gamma(2.0, 1.0), lambda: dist.Gamma(scale() + 1.0, loc().exp())
    ),
    "transformed": elementwise(
        lambda: dist.LogNormal(0.0, 1.0),
        lambda: dist.TransformedDistribution(
            dist.Normal(loc(), 1.0),
            [AffineTransform(0.1, scale(), cache_size=1), torch.distributions.ExpTransform()],
        ),
    ),
    "expanded": elementwise(standard_normal, lambda: Triangle(scale()).expand([3])),
    "masked": elementwise(
        lambda: standard_normal().mask(MASK),
        lambda: dist.Normal(loc(), scale()).mask(MASK),
    ),
    "mixture": Case(
        around(
            lambda: standard_normal().expand([1]).to_event(1), lambda z: dist.Normal(z[..., 0], 0.7)
        ),
        drawn_from(
            lambda: dist.MixtureOfDiagNormals(
                torch.stack([loc(), loc() - 1.0], dim=-1)[..., None],
                torch.ones(3, 2, 1),
                torch.zeros(3, 2),
            )
        ),
        common_dims=(-1,),
    ),
    "independent": Case(
        around(
            lambda: standard_normal().expand([3, 2]).to_event(1),
            lambda z: dist.Normal(z.sum(-1), 0.7),
        ),
        drawn_from(lambda: dist.Normal(loc()[:, None], scale()).expand([3, 2]).to_event(1)),
        common_dims=(-1,),
    ),
    "multivariate": Case(
        around(
            lambda: dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
            lambda z: dist.Normal(z.sum(-1), 0.7),
        ),
        drawn_from(lambda: dist.MultivariateNormal(loc()[:, None] * torch.ones(2), torch.eye(2))),
        common_dims=(-1,),
    ),
    "has_rsample-on": elementwise(
        standard_normal, lambda: dist.Normal(loc(), scale()).has_rsample_(True)
    ),
}

SCORE = {
    "bernoulli": elementwise(lambda: dist.Bernoulli(0.4), lambda: dist.Bernoulli(logits=loc())),
    "poisson": elementwise(lambda: dist.Poisson(1.0), lambda: dist.Poisson(scale())),
    "categorical": elementwise(
        lambda: dist.Categorical(torch.ones(3)),
        lambda: dist.Categorical(logits=loc()[:, None] * torch.arange(3.0)),
    ),
    "one-hot": Case(
        around(
            lambda: dist.OneHotCategorical(torch.ones(3)),
            lambda z: dist.Normal((z * torch.arange(3.0)).sum(-1), 0.7),
        ),
        drawn_from(lambda: dist.OneHotCategorical(logits=loc()[:, None] * torch.arange(3.0))),
        common_dims=(-1,),
    ),
    "has_rsample-off": elementwise(
        standard_normal, lambda: dist.Normal(loc(), scale()).has_rsample_(False)
    ),
    # The transform remembers its input, of which its own parameter is no part.
    "transformed": elementwise(
        standard_normal,
        lambda: dist.TransformedDistribution(
            NonreparameterizedNormal(loc(), 1.0), [AffineTransform(0.1, scale(), cache_size=1)]
        ),
    ),
    # x depends on what the masks hide: nothing but its log-probability is left out.
    "masked": elementwise(
        lambda: dist.Bernoulli(0.4).mask(MASK), lambda: dist.Bernoulli(logits=loc()).mask(MASK)
    ),
    "masked-below-the-event": Case(
        around(
            lambda: dist.Bernoulli(0.4).expand([3, 2]).to_event(1),
            lambda z: dist.Normal(z.sum(-1), 0.7),
        ),
        drawn_from(
            lambda: (
                dist.Bernoulli(logits=loc()[:, None])
                .expand([3, 2])
                .mask(torch.tensor([True, False]))
                .to_event(1)
            )
        ),
        common_dims=(-1,),
    ),
}


@pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vectorized"])
@pytest.mark.parametrize("case", PATHWISE.values(), ids=PATHWISE)
def test_gradients_flow_through_reparameterised_sites(case, vectorize):
    assert_follows_definition(case._replace(latents=()), vectorize=vectorize)


@pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vectorized"])
@pytest.mark.parametrize("case", SCORE.values(), ids=SCORE)
def test_other_sites_get_the_score_function(case, vectorize):
    assert_follows_definition(case, vectorize=vectorize)


@pytest.mark.parametrize("case", PATHWISE.values(), ids=PATHWISE)
def test_any_site_can_have_the_score_function(case):
    assert_follows_definition(
        case, build=partial(OVIS, reparam="score"), signal=oracle.ovis_gamma_learning_signal
    )


# --- sites that are not draws, and programs without some ------------------------------------------


def discrete_then_reparameterised():
    def model():
        with plate("data", 3):
            z = sample("z", dist.Bernoulli(0.4))
            y = sample("y", dist.Normal(z, 1.0))
            sample("x", dist.Normal(param("weight", 0.8) * y, 0.7), obs=X)

    def guide():
        with plate("data", 3):
            z = sample("z", dist.Bernoulli(logits=loc()))
            sample("y", dist.Normal(loc() * z, scale()))

    return Case(model, guide, common_dims=(-1,))


def reparameterised_then_discrete():
    """The discrete site's log-probability carries the path of the site above it."""

    def model():
        with plate("data", 3):
            y = sample("y", dist.Normal(0.0, 1.0))
            z = sample("z", dist.Bernoulli(logits=param("weight", 0.8) * y))
            sample("x", dist.Normal(y + z, 0.7), obs=X)

    def guide():
        with plate("data", 3):
            y = sample("y", dist.Normal(loc(), scale()))
            sample("z", dist.Bernoulli(logits=y - 0.2))

    return Case(model, guide, common_dims=(-1,))


def points():
    """A point mass has a path and no score; its log-density counts in log q."""

    def guide():
        with plate("data", 3):
            y = sample("y", dist.Normal(loc(), 1.0), infer={"is_auxiliary": True})
            sample("z", dist.Delta(y.exp(), log_density=-y))

    return Case(around(lambda: dist.LogNormal(0.0, 1.0)), guide, common_dims=(-1,), latents=())


def point_of_a_parameter():
    def guide():
        with plate("data", 3):
            sample("z", dist.Delta(loc()).mask(False))

    return Case(around(standard_normal), guide, common_dims=(-1,), latents=())


def factor_in_the_model():
    def model():
        with plate("data", 3):
            z = sample("z", dist.Bernoulli(0.4))
            pyro.factor("likelihood", dist.Normal(param("weight", 0.8) * z, 0.7).log_prob(X))

    return Case(model, SCORE["bernoulli"].guide, common_dims=(-1,))


def factor_outside_the_plate():
    """A site like any other: with it outside, the plate is not common to all."""

    def model():
        around(lambda: dist.Bernoulli(0.4))()
        pyro.factor("extra", param("weight", 0.8) ** 2)

    return Case(model, SCORE["bernoulli"].guide)


def factor_of_a_reparameterised_draw():
    def guide():
        with plate("data", 3):
            y = sample("y", dist.Normal(loc(), 1.0), infer={"is_auxiliary": True})
            pyro.factor("jacobian", -y, has_rsample=True)
            sample("z", dist.Delta(y.exp()))

    return Case(around(lambda: dist.LogNormal(0.0, 1.0)), guide, common_dims=(-1,), latents=())


def factor_of_a_draw():
    """The guide draws by itself and hands log q over as a factor."""

    def guide():
        with plate("data", 3):
            own = dist.Bernoulli(logits=loc())
            shape = sample("like", dist.Delta(torch.zeros(3)), infer={"is_auxiliary": True}).shape
            z = own.expand(shape).sample()
            pyro.factor("log_q", own.log_prob(z), has_rsample=False)
            sample("z", dist.Delta(z))

    def model():
        with plate("data", 3):
            z = sample("z", dist.Bernoulli(0.4))
            sample("x", dist.Normal(param("weight", 0.8) * z, 0.7), obs=X)

    return Case(model, guide, common_dims=(-1,), latents=("log_q",))


def deterministic_sites():
    def model():
        with plate("data", 3):
            z = sample("z", dist.Bernoulli(0.4))
            mean = pyro.deterministic("mean", param("weight", 0.8) * z)
            sample("x", dist.Normal(mean, 0.7), obs=X)
        pyro.deterministic("elsewhere", z.sum(-1))

    return Case(model, SCORE["bernoulli"].guide, common_dims=(-1,))


def no_latents():
    def model():
        with plate("data", 3):
            sample("x", dist.Normal(param("weight", 0.8), 0.7), obs=X)

    return Case(model, lambda: None, common_dims=(-1,))


def no_parameters_in_the_guide():
    guide = drawn_from(lambda: dist.Bernoulli(0.3))
    return Case(around(lambda: dist.Bernoulli(0.4)), guide, common_dims=(-1,))


def no_parameters_in_the_model():
    def model():
        with plate("data", 3):
            z = sample("z", dist.Bernoulli(0.4))
            sample("x", dist.Normal(z, 0.7), obs=X)

    return Case(model, SCORE["bernoulli"].guide, common_dims=(-1,))


def no_parameters():
    guide = no_parameters_in_the_guide().guide
    return no_parameters_in_the_model()._replace(guide=guide)


def no_plates():
    def model():
        z = sample("z", dist.Bernoulli(0.4))
        sample("x", dist.Normal(param("weight", 0.8) * z, 0.7).expand([3]).to_event(1), obs=X)

    def guide():
        sample("z", dist.Bernoulli(logits=loc()[0]))

    return Case(model, guide, nesting=0)


def observation_in_the_guide():
    """It counts in log q, but it is no draw that a score function could be taken of."""

    def guide():
        with plate("data", 3):
            sample("z", dist.Bernoulli(logits=loc()))
            seen = dist.Bernoulli(logits=loc())
            sample("seen", seen, obs=torch.ones(3), infer={"is_auxiliary": True})

    return Case(around(lambda: dist.Bernoulli(0.4)), guide, common_dims=(-1,))


PROGRAMS = {
    case.__name__: case()
    for case in (
        discrete_then_reparameterised,
        reparameterised_then_discrete,
        points,
        point_of_a_parameter,
        factor_in_the_model,
        factor_outside_the_plate,
        factor_of_a_reparameterised_draw,
        factor_of_a_draw,
        deterministic_sites,
        no_latents,
        no_parameters_in_the_guide,
        no_parameters_in_the_model,
        no_parameters,
        no_plates,
        observation_in_the_guide,
    )
}


@pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vectorized"])
@pytest.mark.parametrize("case", PROGRAMS.values(), ids=PROGRAMS)
def test_programs_of_several_sites(case, vectorize):
    assert_follows_definition(case, vectorize=vectorize)


@pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vectorized"])
def test_programs_without_sites_have_no_loss(vectorize):
    assert IWAE(3, vectorize_particles=vectorize).loss_and_grads(lambda: None, lambda: None) == 0


def test_one_particle_is_the_elbo():
    assert_follows_definition(
        SCORE["bernoulli"], build=IWAE, signal=oracle.reinforce_learning_signal, num_particles=1
    )


# --- rejection samplers --------------------------------------------------------------------------


def rejection():
    # A boosted shape makes few rejections; the draw's density is that of the gamma all the same.
    return ShapeAugmentedGamma(param("shape", [2.0, 1.5, 3.0]), torch.ones(3))


def test_rejection_samplers_are_refused_with_the_remedy():
    case = Case(around(lambda: dist.Gamma(2.0, 1.0)), drawn_from(rejection), common_dims=(-1,))
    with pytest.raises(NotImplementedError, match=r'z.*ShapeAugmentedGamma.*reparam="score"'):
        VIMCO(3).loss_and_grads(case.model, case.guide)
    assert_follows_definition(case, build=partial(VIMCO, reparam="score"))
    assert_follows_definition(
        case, build=ReweightedWakeSleep, signal=oracle.wake_phi_learning_signal
    )
