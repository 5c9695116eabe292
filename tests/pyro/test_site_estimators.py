"""Estimators by site in Pyro: modules and autoguides, loops, branches, runs made again."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import sample
from pyro.infer import SVI, Trace_ELBO, autoguide
from pyro.nn import PyroModule, PyroParam

from pyro_gradest import (
    IMLE,
    IWAE,
    OVIS,
    VIMCO,
    AdaptiveIMLE,
    Implicit,
    ImplicitELBO,
    configure_estimators,
)
from pyro_gradest.estimators import (
    ovis_gamma_learning_signal,
    reinforce_leave_one_out_learning_signal,
    vimco_learning_signal,
)

X = torch.tensor(0.6)


def layers():
    y = sample("y", dist.Normal(0.0, 1.0))
    u = sample("u", dist.Normal(0.7 * y, 0.8))
    sample("x", dist.Normal(u + 0.3 * y, 1.5), obs=X)


class Layers(PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = PyroParam(torch.tensor(0.2))
        self.slope = PyroParam(torch.tensor(0.6))

    def forward(self):
        y = sample("y", dist.Normal(self.loc, 0.9))
        sample("u", dist.Normal(self.slope * y, 0.7))


def gradient(loss, model, guide, *, seed=0):
    """By parameter, and the random number that comes after the step."""
    for parameter in pyro.get_param_store().values():
        parameter.grad = None
    pyro.set_rng_seed(seed)
    loss.loss_and_grads(model, guide)
    gradients = {
        name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone()
        for name, leaf in pyro.get_param_store().named_parameters()
    }
    for _, leaf in pyro.get_param_store().named_parameters():
        leaf.grad = None
    return gradients


def assert_same(actual, desired):
    assert actual.keys() == desired.keys()
    for name, value in desired.items():
        torch.testing.assert_close(actual[name], value)
    assert any(value.abs().max() > 1e-3 for value in desired.values())


@pytest.mark.parametrize("reparam", ["dreg", "score"])
@pytest.mark.parametrize("kind", ["module", "normal", "multivariate"])
def test_modules_and_autoguides(kind, reparam):
    guide, sites = {
        "module": lambda: (Layers(), ["y", "u"]),
        "normal": lambda: (autoguide.AutoNormal(layers), ["y_unconstrained", "u_unconstrained"]),
        "multivariate": lambda: (
            autoguide.AutoMultivariateNormal(layers),
            ["_AutoMultivariateNormal_latent"],
        ),
    }[kind]()
    guide()  # autoguides make their parameters
    by_site = configure_estimators(guide, dict.fromkeys(sites, reparam))
    assert {id(p) for p in by_site.parameters()} == {id(p) for p in guide.parameters()}
    desired = gradient(IWAE(3, reparam=reparam), layers, guide)
    assert_same(gradient(IWAE(3), layers, by_site), desired)


FEATURES = torch.tensor([0.5, -1.0])
WEIGHT = torch.tensor([[0.3, 0.1], [-0.2, 0.5], [0.4, -0.6]])
BIAS = torch.tensor([0.2, -0.1, 0.3])


def two_bits_and_a_number():
    a = sample("a", dist.Bernoulli(0.3))
    b = sample("b", dist.Bernoulli(0.4))
    y = sample("y", dist.Normal(a + b, 1.0))
    sample("x", dist.Normal(y + 0.5 * b, 1.0), obs=X)


def guide_by(outputs):
    """Of one layer that all sites share; each has a row of its own."""
    a = sample("a", dist.Bernoulli(logits=outputs[0]))
    b = sample("b", dist.Bernoulli(logits=outputs[1]))
    sample("y", dist.Normal(outputs[2] + a - b, 0.8))


def layer_of(make=torch.nn.Linear):
    layer = make(2, 3)
    layer.load_state_dict({"weight": WEIGHT, "bias": BIAS})
    return layer


class OfModule(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = layer_of(PyroModule[torch.nn.Linear])

    def forward(self):
        guide_by(self.net(FEATURES))


def registered():
    layer = layer_of()
    return lambda: guide_by(pyro.module("net", layer)(FEATURES))


def without_module():
    weight, bias = pyro.param("weight", WEIGHT.clone()), pyro.param("bias", BIAS.clone())
    guide_by(weight @ FEATURES + bias)


CHOICES = {"a": vimco_learning_signal, "b": IMLE(), "y": "dreg"}


@pytest.mark.parametrize("make", [OfModule, registered])
def test_parameters_inside_of_modules(make):
    """Each site's row gets what it gets without a module."""

    def of(guide):
        found = gradient(IWAE(3), two_bits_and_a_number, guide)
        pyro.clear_param_store()
        return {name.split("$")[-1].split(".")[-1]: value for name, value in found.items()}

    actual = of(configure_estimators(make(), CHOICES))
    assert_same(actual, of(configure_estimators(without_module, CHOICES)))
    by_default = of(without_module)
    assert ((actual["weight"] - by_default["weight"]).abs() > 1e-3).all()


def test_the_point_masses_of_an_autoguide_say_where_its_draws_are():
    guide = configure_estimators(autoguide.AutoNormal(layers), {"y": "dreg"})
    with pytest.raises(ValueError, match=r"'y' is a point mass.*'y_unconstrained'"):
        IWAE(2).loss_and_grads(layers, guide)


@pytest.mark.parametrize("options", [{}, {"chunk_size": 1}])
def test_a_guide_that_is_run_again(options):
    """ "dreg" after "pathwise": with the draws of the second run, as if cut from the start."""
    guide = Layers()
    by_site = configure_estimators(guide, {"y": "pathwise", "u": "dreg"})
    actual = gradient(IWAE(1, **options), layers, by_site)
    pyro.set_rng_seed(0)
    assert IWAE(1).loss(layers, by_site) == pytest.approx(
        IWAE(1).loss(layers, _from_second_run(guide)), abs=1e-6
    )
    cut_from_start = _from_second_run(configure_estimators(guide, {"y": "pathwise"}))
    assert_same(actual, gradient(IWAE(1, reparam="dreg"), layers, cut_from_start))


def _from_second_run(guide):
    """The guide with the random numbers that it would draw after one run from seed 0."""
    pyro.set_rng_seed(0)
    guide()
    state = torch.get_rng_state()

    def resumed():
        torch.set_rng_state(state)
        return guide()

    return resumed


def bits():
    for i in range(3):
        z = sample(f"z_{i}", dist.Bernoulli(0.3))
        sample(f"x_{i}", dist.Normal(z, 1.0), obs=X)


def bits_guide(estimator_of=lambda i, first: None):
    logits = pyro.param("logits", torch.tensor([0.2, -0.4, 0.1]))
    first = sample("z_0", dist.Bernoulli(logits=logits[0]))
    for i in (1, 2):
        infer = {"estimator": estimator_of(i, first)}
        sample(f"z_{i}", dist.Bernoulli(logits=logits[i]), infer=infer)


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}])
def test_sites_of_a_loop_with_a_signal_made_anew(options):
    def estimator_of(i, first):
        return partial(ovis_gamma_learning_signal, gamma=0.1 * i)

    actual = gradient(IWAE(4, **options), bits, partial(bits_guide, estimator_of))["logits"]
    plain, first, second = (
        gradient(loss, bits, bits_guide)["logits"]
        for loss in (IWAE(4), OVIS(4, gamma=0.1), OVIS(4, gamma=0.2))
    )
    torch.testing.assert_close(actual, torch.stack([plain[0], first[1], second[2]]))


def test_another_signal_at_another_particle_is_refused():
    def estimator_of(i, first):
        half = partial(ovis_gamma_learning_signal, gamma=0.5)
        return vimco_learning_signal if first > 0 else half

    with pytest.raises(ValueError, match=r"'z_1' has the learning signal.*at another particle"):
        gradient(IWAE(8), bits, partial(bits_guide, estimator_of))


def test_a_predicate_chooses_by_site():
    guide = Layers()

    def is_first(site):
        return "score" if site["fn"].mean.dim() == 0 and site["name"] == "y" else None

    by_predicate = configure_estimators(guide, is_first)
    by_name = configure_estimators(guide, {"y": "score"})
    assert_same(gradient(OVIS(3), layers, by_predicate), gradient(OVIS(3), layers, by_name))


def test_the_outermost_choice_counts():
    guide = configure_estimators(Layers(), {"y": "score", "u": "score"})
    outer = configure_estimators(guide, {"y": "stl"})
    both = configure_estimators(guide.module, {"y": "stl", "u": "score"})
    assert_same(gradient(IWAE(3), layers, outer), gradient(IWAE(3), layers, both))


def test_a_step_of_svi_with_adaptive_imle():
    """Its state is kept and moved as by imle itself; the other bit has a signal of its own."""

    def model():
        a = sample("a", dist.Bernoulli(0.3))
        b = sample("b", dist.Bernoulli(0.3))
        sample("x", dist.Normal(a + b, 1.0), obs=X)

    @configure_estimators(config={"a": AdaptiveIMLE(), "b": vimco_learning_signal})
    def guide():
        logits = pyro.param("logits", torch.tensor([0.2, -0.4]))
        sample("a", dist.Bernoulli(logits=logits[0]))
        sample("b", dist.Bernoulli(logits=logits[1]))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=VIMCO(5, vectorize_particles=True))
    losses = [svi.step() for _ in range(3)]
    assert all(loss == loss for loss in losses)
    assert "a_imle" in pyro.get_param_store()
    assert (pyro.param("logits").detach() != torch.tensor([0.2, -0.4])).all()


def test_losses_of_the_host_see_estimators_of_values():
    def model():
        a = sample("a", dist.Bernoulli(0.3))
        sample("x", dist.Normal(a, 1.0), obs=X)

    @configure_estimators(config={"a": IMLE()})
    def guide():
        sample("a", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.2))))

    trace = pyro.poutine.trace(guide).get_trace()
    assert trace.nodes["a"]["value"].requires_grad
    SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=Trace_ELBO()).step()


def implicit_model():
    z = sample("z", dist.Normal(3.0, 0.5))
    y = sample("y", dist.Normal(z, 1.0))
    sample("x", dist.Normal(y, 1.0), obs=X)


def implicit_guide(**of_noise):
    loc = pyro.param("loc", torch.tensor(0.0))
    infer = {"is_auxiliary": True, **of_noise}
    noise = sample("noise", dist.Normal(0.0, 1.0), infer=infer)
    sample("z", Implicit(loc + noise))
    sample("y", dist.Normal(pyro.param("y_loc", torch.tensor(0.3)), 0.7))


def test_implicit_sites_stay_on_the_path_beside_score_sites():
    """reparam="score" is about sites with a density; and so is a site's own choice."""
    pathwise, score = (
        gradient(ImplicitELBO(10, reparam=reparam), implicit_model, implicit_guide)
        for reparam in ("pathwise", "score")
    )
    torch.testing.assert_close(score["loc"], pathwise["loc"])
    assert (score["y_loc"] - pathwise["y_loc"]).abs() > 1e-3
    for estimator in ("score", reinforce_leave_one_out_learning_signal):
        guide = configure_estimators(implicit_guide, {"y": estimator})
        assert_same(gradient(ImplicitELBO(10), implicit_model, guide), score)


def test_implicit_sites_and_their_noise_have_no_estimator():
    loss = ImplicitELBO(10)
    with pytest.raises(ValueError, match=r"'z' is Implicit and has no density.*'score'"):
        loss.loss_and_grads(implicit_model, configure_estimators(implicit_guide, {"z": "score"}))
    with pytest.raises(ValueError, match=r"'z' is computed from 'noise'.*Remove the estimator"):
        loss.loss_and_grads(implicit_model, partial(implicit_guide, estimator="pathwise"))
