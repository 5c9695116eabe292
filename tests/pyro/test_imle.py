"""``imle`` in Pyro: gradients against exact enumeration, plates, saved state, refusals."""

import io
from itertools import chain

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    SVI,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.nn import PyroModule, PyroParam
from torch.distributions import kl_divergence
from torch.distributions.transforms import ExpTransform

from pyro_gradest import (
    IMLE,
    IWAE,
    SIMPLE,
    TVO,
    AdaptiveIMLE,
    GumbelSoftmaxST,
    ImplicitELBO,
    KSubset,
    OneHotCategorical,
    PerturbAndMAP,
    PlackettLuceSubset,
    ReinMax,
    ReweightedWakeSleep,
    SpanningTree,
    StraightThrough,
    imle,
)
from pyro_gradest.estimators import (
    GaussianNoise,
    GumbelNoise,
    LogisticNoise,
    Noise,
    numpy_solver,
    top_k,
)
from pyro_gradest.estimators.discrete import trees
from pyro_gradest.estimators.discrete._subset_sampler import SplitNoise
from tests.oracles import combinatorial
from tests.oracles import discrete as oracle

# A plate of many data that are all alike, whose noise fills its space evenly: the sum over data is
# an expectation, and nothing is left to chance.
NUMBER = 2**16
QUANTILES = (np.arange(NUMBER) + 0.5) / NUMBER
LOGISTIC = torch.tensor(np.log(QUANTILES) - np.log1p(-QUANTILES))
GUMBEL = torch.tensor(oracle.gumbel_points(NUMBER, 3))
THETA = {"bit": np.array(0.4), "one_hot": np.array([0.4, -0.3, 0.1])}
LOSSES = {
    "trace": Trace_ELBO(),
    "trace-vectorized": Trace_ELBO(2, vectorize_particles=True, max_plate_nesting=1),
    "mean-field": TraceMeanField_ELBO(),
    "iwae": IWAE(1),
}


class EvenLogistic(LogisticNoise):
    def sample_like(self, theta, *, generator=None):
        return LOGISTIC.expand(theta.shape)


class EvenGumbel(GumbelNoise):
    def sample_like(self, theta, *, generator=None):
        return GUMBEL.expand(theta.shape)


def location(z, kind):
    return 1.5 * z if kind == "bit" else z @ torch.tensor([1.5, 0.0, -1.0])


def model(kind, subsample_size=None):
    size = NUMBER * (2 if subsample_size else 1)
    with pyro.plate("data", size, subsample_size=subsample_size):
        prior = (
            dist.Bernoulli(torch.tensor(0.2))
            if kind == "bit"
            else OneHotCategorical(torch.tensor([0.1, 0.6, 0.3]))
        )
        z = pyro.sample("z", prior)
        pyro.sample("x", dist.Normal(location(z, kind), 1.0), obs=torch.ones(NUMBER))


def guide(kind, subsample_size=None):
    theta = pyro.param("theta", torch.tensor(THETA[kind]))
    size = NUMBER * (2 if subsample_size else 1)
    with pyro.plate("data", size, subsample_size=subsample_size):
        site = dist.Bernoulli if kind == "bit" else dist.OneHotCategorical
        pyro.sample("z", site(logits=theta))


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


def gradient_of(estimator, kind, loss, **options):
    pyro.clear_param_store()
    wrapped = imle(guide, {"z": estimator})
    loss.loss_and_grads(model, wrapped, kind, **options)
    return pyro.param("theta").grad.numpy() / NUMBER


def relative_error(estimator, kind, loss, scale=1.0, **options):
    exact = exact_gradient(kind)
    actual = gradient_of(estimator, kind, loss, **options) / scale
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
    x = torch.tensor([[0.0, 3.0], [3.0, 0.0]])
    met = []

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1).mask(True))
            met.append(z)
            pyro.sample("x", dist.Normal(3 * z, 1.0).to_event(1), obs=x)

    def guide():
        logits = pyro.param("logits", torch.zeros(2, 2))
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1).mask(True))

    svi = SVI(model, imle(guide, estimator), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(3))
    for _ in range(60):
        svi.step()

    assert ((pyro.param("logits") > 0.5) == (x > 1)).all()
    assert all(((z == 0) | (z == 1)).all() for z in met)


def noisy_guide():
    logits = pyro.param("logits", torch.zeros(2, 3))
    with pyro.plate("data", 2):
        pyro.sample("z", dist.OneHotCategorical(logits=logits))


def noisy_model():
    with pyro.plate("data", 2):
        z = pyro.sample("z", OneHotCategorical(torch.ones(3) / 3))
        pyro.sample(
            "x", dist.Normal(z @ torch.arange(3.0, dtype=z.dtype), 1.0), obs=1.3 * torch.ones(2)
        )


@pytest.mark.parametrize(
    "loss", [Trace_ELBO(2), IWAE(3, vectorize_particles=True, max_plate_nesting=1)]
)
def test_training_resumes_bit_for_bit(loss):
    def build():
        optimizer = pyro.optim.Adam({"lr": 0.1})
        guide = imle(noisy_guide, {"z": AdaptiveIMLE()})
        return SVI(noisy_model, guide, optimizer, loss), optimizer

    svi, optimizer = build()
    for _ in range(5):
        svi.step()
    saved = io.BytesIO()
    torch.save(
        (pyro.get_param_store().get_state(), optimizer.get_state(), torch.get_rng_state()), saved
    )
    before = pyro.param("z_imle").clone()
    losses = [svi.step() for _ in range(5)]
    expected = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}

    pyro.clear_param_store()
    saved.seek(0)
    parameters, state, seed = torch.load(saved, weights_only=False)
    svi, optimizer = build()
    pyro.get_param_store().set_state(parameters)
    optimizer.set_state(state)
    torch.set_rng_state(seed)
    again = [svi.step() for _ in range(5)]

    assert again == losses
    assert expected.keys() == set(pyro.get_param_store()) == {"logits", "z_imle"}
    for name, value in pyro.get_param_store().items():
        assert torch.equal(value, expected[name])
    assert not torch.equal(expected["z_imle"], before)


def test_state_is_updated_once_in_a_backward_pass():
    """Whatever the number of particles in it; and not at all without one."""
    estimator = AdaptiveIMLE(rate=0.25, initial_step=4.0)
    svi = SVI(noisy_model, imle(noisy_guide, estimator), pyro.optim.SGD({"lr": 0.0}), IWAE(4))
    svi.evaluate_loss()
    step, density, update = pyro.param("z_imle").tolist()
    assert (step, density, update) == (4.0, estimator.target, 0.0)
    svi.step()
    step, density, update = pyro.param("z_imle").tolist()
    assert abs(np.log(step / 4.0)) == pytest.approx(0.25)
    assert abs(update) == 0.25


def test_state_is_the_same_in_chunks():
    """The counts of all chunks make one update, whatever the loss is scaled by."""
    states = []
    for chunk_size in (None, 2, 3):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = imle(noisy_guide, AdaptiveIMLE(initial_step=2.0))
        loss = IWAE(6, chunk_size=chunk_size)
        svi = SVI(noisy_model, guide, pyro.optim.Adam({"lr": 0.1}), loss)
        for _ in range(3):
            svi.step()
        states.append(pyro.param("z_imle").clone())
    assert states[0][1] != AdaptiveIMLE().target
    torch.testing.assert_close(torch.stack(states), states[0].expand(3, 3))


def test_prior_that_would_be_lost_is_refused():
    def host_model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.OneHotCategorical(torch.ones(3) / 3))
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=torch.ones(2))

    guide = imle(noisy_guide, {"z": IMLE()})
    with pytest.raises(ValueError, match="prior of site 'z' would count for nothing"):
        Trace_ELBO().loss_and_grads(host_model, guide)
    Trace_ELBO().loss_and_grads(imle(host_model, {"z": IMLE()}), guide)


def gradient_at_noisy_guide(loss, site_of_model):
    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", site_of_model(torch.tensor([0.2, 0.3, 0.5])))
            pyro.sample("x", dist.Normal(z @ torch.arange(3.0), 1.0), obs=torch.ones(2))

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    loss.loss_and_grads(model, imle(noisy_guide, {"z": IMLE()}))
    return pyro.param("logits").grad


def test_prior_that_counts_is_not_refused():
    """In the analytic KL divergence, or where the host wraps the value to track it."""
    by_mean_field = [
        gradient_at_noisy_guide(TraceMeanField_ELBO(), site)
        for site in (dist.OneHotCategorical, OneHotCategorical)
    ]
    torch.testing.assert_close(*by_mean_field)
    by_trace = [
        gradient_at_noisy_guide(loss, OneHotCategorical)
        for loss in (Trace_ELBO(), TraceGraph_ELBO())
    ]
    torch.testing.assert_close(*by_trace)
    assert by_trace[0].abs().max() > 0


def test_decorator_context_manager_and_function():
    @imle(config=lambda name: StraightThrough() if name == "z" else None)
    def decorated():
        other = pyro.sample("other", dist.Bernoulli(logits=pyro.param("theta", torch.zeros(()))))
        return other, pyro.sample("z", dist.Bernoulli(logits=pyro.param("theta")))

    other, z = decorated()
    assert z.requires_grad
    assert not other.requires_grad
    with imle(config={"z": StraightThrough()}):
        assert noisy_guide() is None
    with pytest.raises(ValueError, match=r"sites \['y'\].*only \['z'\]"):
        with imle(config={"y": StraightThrough()}):
            noisy_guide()


class Own(Noise):
    def sample_like(self, theta, *, generator=None):
        return torch.zeros_like(theta)


@pytest.mark.parametrize(
    ("fn", "options", "estimator", "message"),
    [
        (dist.Categorical(torch.ones(3) / 3), {}, IMLE(), "draws integers.*OneHotCategorical"),
        (dist.Normal(0.0, 1.0), {}, IMLE(), "Normal. Leave it out"),
        (dist.Bernoulli(0.5), {"obs": torch.tensor(1.0)}, IMLE(), "'z', which is observed"),
        (
            dist.Bernoulli(0.5),
            {"infer": {"enumerate": "parallel"}},
            IMLE(),
            "both enumerated and under imle",
        ),
        (dist.Bernoulli(0.5), {}, IMLE(noise=GaussianNoise()), "wrong entropy"),
        (dist.Bernoulli(0.5), {}, AdaptiveIMLE(temperature=0.5), "wrong entropy"),
        (dist.OneHotCategorical(torch.ones(3) / 3), {}, StraightThrough(Own()), "GumbelNoise"),
    ],
)
def test_refusals(fn, options, estimator, message):
    with pytest.raises(ValueError, match=message):
        imle(lambda: pyro.sample("z", fn, **options), {"z": estimator})()


@pytest.mark.parametrize(
    "fn",
    [
        dist.Poisson(2.0),
        dist.Binomial(3, torch.tensor(0.5)),
        dist.Geometric(torch.ones(3) / 2).to_event(1),
        dist.Multinomial(2, torch.ones(3) / 3),
    ],
)
def test_integers_are_refused_by_name_and_among_all(fn):
    for config in ({"z": IMLE()}, IMLE()):
        with pytest.raises(ValueError, match=r"'z' draws from .* integers.*one-hot.*VIMCO or OVIS"):
            imle(lambda: pyro.sample("z", fn), config)()


@pytest.mark.parametrize("default", ["parallel", "sequential"])
def test_enumeration_from_outside_is_refused(default):
    wrapped = config_enumerate(imle(noisy_guide, IMLE()), default=default)
    with pytest.raises(ValueError, match="'z' is both enumerated and under imle"):
        TraceEnum_ELBO(max_plate_nesting=1).loss_and_grads(noisy_model, wrapped)


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (TVO(2), r'TVO gives its sites "score" alone.*Use IWAE, ImplicitELBO.*out of imle'),
        (ReweightedWakeSleep(2, reparam="dreg"), 'ReweightedWakeSleep gives its sites "score"'),
        (IWAE(2, reparam="score"), r"IWAE takes the score function at all sites"),
        (ImplicitELBO(2, reparam="score"), "ImplicitELBO takes the score function at all"),
    ],
)
def test_losses_that_would_not_look_at_the_gradient_refuse_it(loss, match):
    with pytest.raises(ValueError, match=f"'z' carries a gradient by IMLE.*{match}"):
        loss.loss_and_grads(noisy_model, imle(noisy_guide, {"z": IMLE()}))


class Explosive:
    """A solver that fails at a given call."""

    def __init__(self, fails_at):
        self.calls_left = fails_at

    def __call__(self, theta):
        self.calls_left -= 1
        if not self.calls_left:
            raise RuntimeError("exploded")
        return (theta >= theta.max(-1, keepdims=True)[0]).to(theta.dtype)


@pytest.mark.parametrize(
    ("solver", "error", "message"),
    [
        (Explosive(1), RuntimeError, "exploded"),
        (Explosive(2), RuntimeError, "exploded"),  # the first call of the backward pass
        (lambda theta: theta, ValueError, "other than 0 and 1"),
        (numpy_solver(lambda theta: theta[1:]), ValueError, "of the shape of theta"),
    ],
)
def test_errors_of_a_solver_name_the_site(solver, error, message):
    def guide():
        pyro.sample("z", PerturbAndMAP(pyro.param("theta", torch.ones(3)), solver))

    trace = pyro.poutine.trace(imle(guide, {"z": IMLE()}))
    with pytest.raises(error, match=message) as caught:
        (trace.get_trace().nodes["z"]["value"] @ torch.arange(3.0)).backward()
    # The host adds the shapes of a trace to an error by raising another from it.
    notes = [getattr(one, "__notes__", []) for one in (caught.value, caught.value.__cause__)]
    assert list(chain(*notes)) == ["At site 'z', under imle."]


def test_adaptive_state_under_torch_func_is_refused():
    def loss(logits, estimator):
        program = imle(lambda: pyro.sample("z", OneHotCategorical(logits=logits)), estimator)
        return program() @ torch.arange(3.0)

    torch.func.grad(loss)(torch.zeros(3), IMLE())
    with pytest.raises(RuntimeError, match=r"torch.func .* there is no backward.*Use IMLE\(\)"):
        torch.func.grad(loss)(torch.zeros(3), AdaptiveIMLE())


def test_scores_that_are_not_finite_name_the_site():
    program = imle(lambda: pyro.sample("z", PerturbAndMAP(torch.ones(3) / 0, top_k(1))), IMLE())
    with pytest.raises(ValueError, match="finite theta") as caught:
        program()
    assert caught.value.__notes__ == ["At site 'z', under imle."]


def test_wrong_config():
    with pytest.raises(TypeError, match="site 'z'"):
        imle(noisy_guide, {"z": "imle"})
    with pytest.raises(TypeError, match="by site name"):
        imle(noisy_guide, 3)
    for wrong in (True, IMLE, "imle"):
        with pytest.raises(TypeError, match=r"'z', such as IMLE.*not the class.*got"):
            imle(noisy_guide, lambda name, wrong=wrong: wrong)()
    with pytest.raises(ValueError, match="given no estimators"):
        imle(noisy_guide)()


@pytest.mark.parametrize("wrap", [imle, lambda fn, config: imle(config=config)(fn)])
def test_a_module_stays_one_with_its_parameters(wrap):
    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.logits = PyroParam(torch.zeros(2, 3))

        def forward(self):
            with pyro.plate("data", 2):
                pyro.sample("z", dist.OneHotCategorical(logits=self.logits))

    guide = Guide()
    loss = Trace_ELBO()(noisy_model, wrap(guide, {"z": IMLE(step_size=100.0)}))
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    loss().backward()
    optimizer.step()
    assert [parameter is guide.logits for parameter in loss.parameters()] == [True]
    assert guide.logits.abs().max() > 0


def test_one_estimator_for_all_leaves_others_alone():
    def program():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("l", dist.TransformedDistribution(dist.Normal(0.0, 1.0), [ExpTransform()]))
        pyro.sample("v", dist.VonMises(0.0, 1.0))
        pyro.deterministic("d", torch.tensor(1))
        pyro.sample("y", dist.Bernoulli(0.5), obs=torch.tensor(1.0))
        return pyro.sample("z", dist.Bernoulli(logits=pyro.param("theta", torch.zeros(()))))

    assert imle(program, IMLE())().requires_grad


def test_log_probability_of_one_hot_values():
    """Linear in the value, also expanded; impossible classes stay finite in the derivative."""
    site = OneHotCategorical(logits=torch.tensor([0.0, 1.0, -torch.inf]))
    assert type(site.expand([4])) is OneHotCategorical
    value = torch.tensor([0.0, 1.0, 0.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(site.expand([1]).log_prob(value).sum(), value)
    torch.testing.assert_close(
        site.log_prob(value),
        dist.OneHotCategorical(logits=torch.tensor([0.0, 1.0, -torch.inf])).log_prob(
            value.detach()
        ),
    )
    torch.testing.assert_close(gradient[:2], torch.log_softmax(torch.tensor([0.0, 1.0]), 0))
    assert gradient[2] == -1e30


# Sites without a density


def divergence(q, p, **options):
    laws = (PerturbAndMAP(torch.tensor(theta), top_k(2), **options) for theta in (q, p))
    return kl_divergence(*laws).item()


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


def test_shape_of_a_density_that_is_not_known():
    site = PerturbAndMAP(torch.zeros(2, 4), top_k(2)).expand((5, 2))
    for shape in ((), (3,)):
        log_prob = site.log_prob(site.sample(shape))
        assert log_prob.shape == (*shape, 5, 2)
        assert log_prob.isneginf().all()


DATA = torch.tensor([[0.0, 3.0, 0.0, 3.0], [3.0, 3.0, 0.0, 0.0]])


def subset_model():
    with pyro.plate("data", 2):
        z = pyro.sample("z", PerturbAndMAP(torch.zeros(4), top_k(2)))
        pyro.sample("x", dist.Normal(3 * z, 1.0).to_event(1), obs=DATA)


def subset_guide(solver=None):
    theta = pyro.param("theta", torch.zeros(2, 4))
    with pyro.plate("data", 2):
        pyro.sample("z", PerturbAndMAP(theta, solver or top_k(2)))


@pytest.mark.parametrize("estimator", [IMLE(step_size=0.3), AdaptiveIMLE(), StraightThrough()])
def test_any_solver_trains_with_the_bound(estimator):
    guide = imle(subset_guide, {"z": estimator})
    loss = TraceMeanField_ELBO(4, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(subset_model, guide, pyro.optim.Adam({"lr": 0.1}), loss)
    for _ in range(60):
        svi.step()
    assert ((pyro.param("theta") > 0.2) == (DATA > 1)).all()


def test_sites_without_a_density_are_refused_elsewhere():
    guide = imle(subset_guide, {"z": IMLE()})
    for loss in (Trace_ELBO(), IWAE(1)):
        with pytest.raises((NotImplementedError, ValueError), match=r"TraceMeanField|infinite"):
            loss.loss_and_grads(subset_model, guide)
    with pytest.raises(ValueError, match="same solver"):
        TraceMeanField_ELBO().loss_and_grads(
            subset_model, imle(lambda: subset_guide(top_k(1)), {"z": IMLE()})
        )
    with pytest.raises(ValueError, match="IMLE, AdaptiveIMLE and StraightThrough take over"):
        imle(subset_guide, {"z": SIMPLE()})()
    with pytest.raises(ValueError, match="temperature > 0"):
        PerturbAndMAP(torch.zeros(3), top_k(2), temperature=0.0)
    with pytest.raises(ValueError, match="1 event axes"):
        PerturbAndMAP(torch.tensor(0.0), top_k(2))


# Subsets


SUBSETS = oracle.subsets(4, 2)
SUBSET_THETA, SUBSET_PRIOR = np.array([0.5, -0.5, 0.2, 0.0]), np.array([0.3, -0.2, 0.0, 0.1])
WEIGHTS = np.array([1.0, -1.0, 0.5, 2.0])


class EvenSplits(SplitNoise):
    def sample_like(self, theta, *, generator=None):
        uniform = torch.as_tensor(oracle.uniform_points(NUMBER, 3))
        return torch.cat([torch.zeros(NUMBER, 4), uniform], dim=-1)


# With k of n = 4 items three uniform numbers make a draw.
EVEN_SPLITS = EvenSplits(4)
LOG_LIKELIHOODS = {
    "none": lambda z: 0.0 * (z @ torch.as_tensor(WEIGHTS)),
    "linear": lambda z: z @ torch.as_tensor(WEIGHTS),
    "quadratic": lambda z: -0.5 * (1 - z @ torch.as_tensor(WEIGHTS)) ** 2,
}


def k_subset_model(likelihood):
    with pyro.plate("data", NUMBER):
        z = pyro.sample("z", KSubset(torch.as_tensor(SUBSET_PRIOR), 2))
        pyro.factor("x", LOG_LIKELIHOODS[likelihood](z))


def k_subset_guide(likelihood):
    theta = pyro.param("theta", torch.as_tensor(SUBSET_THETA))
    with pyro.plate("data", NUMBER):
        pyro.sample("z", KSubset(theta, 2))


def k_subset_error(estimator, likelihood, loss):
    """Of the gradient of the negative ELBO, against that by enumeration, relative to it."""
    q, p = (oracle.exponential_family(SUBSETS, t) for t in (SUBSET_THETA, SUBSET_PRIOR))
    values = np.log(q) - np.log(p)
    values -= [LOG_LIKELIHOODS[likelihood](torch.as_tensor(z)).item() for z in SUBSETS]
    mean = oracle.mean(SUBSETS, SUBSET_THETA)
    exact = sum(q[i] * values[i] * (z - mean) for i, z in enumerate(SUBSETS))
    wrapped = imle(k_subset_guide, {"z": estimator})
    pyro.clear_param_store()
    loss.loss_and_grads(k_subset_model, wrapped, likelihood)
    actual = pyro.param("theta").grad.numpy() / NUMBER
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
    x = torch.tensor([[[0.0, 3.0, 3.0], [3.0, 0.0, 3.0]], [[3.0, 3.0, 0.0], [0.0, 3.0, 3.0]]])

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", KSubset(torch.zeros(2, 3), 2).to_event(1).mask(True))
            pyro.sample("x", dist.Normal(3 * z, 1.0).to_event(2), obs=x)

    def guide():
        logits = pyro.param("logits", torch.zeros(2, 2, 3))
        with pyro.plate("data", 2):
            return pyro.sample("z", KSubset(logits, 2).to_event(1).mask(True))

    wrapped = imle(guide, {"z": estimator})
    svi = SVI(model, wrapped, pyro.optim.Adam({"lr": 0.1}), TraceMeanField_ELBO(3))
    for _ in range(60):
        svi.step()

    means = KSubset(pyro.param("logits").detach(), 2).mean
    assert ((means > 0.7) == (x > 1)).all()
    z = wrapped()
    assert ((z == 0) | (z == 1)).all()
    assert (z.sum(-1) == 2).all()


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (GumbelSoftmaxST(), "SIMPLE and StraightThrough, got GumbelSoftmaxST"),
        (IMLE(noise=GumbelNoise()), "wrong entropy"),
        (AdaptiveIMLE(temperature=0.5), "wrong entropy"),
    ],
)
def test_refusals_at_subsets(estimator, message):
    with pytest.raises(ValueError, match=message):
        imle(lambda: pyro.sample("z", KSubset(torch.zeros(4), 2)), {"z": estimator})()


def test_draws_without_replacement_are_refused():
    """In the guide, also under an estimator for all sites, and as the prior of a subset."""

    def guide():
        theta = pyro.param("theta", torch.zeros(4))
        pyro.sample("z", PlackettLuceSubset(theta, 2))

    for config in ({"z": SIMPLE()}, SIMPLE()):
        with pytest.raises(ValueError, match="PlackettLuceSubset, for which imle knows no"):
            imle(guide, config)()

    def model(k, prior):
        pyro.sample("z", prior(torch.zeros(4), k))

    def subset_guide(k, prior):
        theta = pyro.param("logits", torch.arange(4.0))
        pyro.sample("z", KSubset(theta, k))

    wrapped = imle(subset_guide, SIMPLE())
    with pytest.raises(ValueError, match=r"prior would count for nothing\. Sample KSubset"):
        Trace_ELBO().loss_and_grads(model, wrapped, 2, PlackettLuceSubset)
    gradients = []
    for prior in (PlackettLuceSubset, KSubset):
        pyro.clear_param_store()
        torch.manual_seed(0)
        Trace_ELBO().loss_and_grads(model, wrapped, 1, prior)
        gradients.append(pyro.param("logits").grad)
    torch.testing.assert_close(*gradients)
    # Without a gradient in the value there is nothing to refuse.
    site, z = PlackettLuceSubset(torch.zeros(4), 2), torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert site.log_prob(z).item() == pytest.approx(-np.log(6))


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
    with pyro.plate("data", len(TREES)), pyro.poutine.scale(scale=torch.as_tensor(PROBABILITIES)):
        z = pyro.sample("z", SpanningTree(torch.as_tensor(TREE_PRIOR)))
        pyro.factor("x", tree_log_likelihood(z, torch.as_tensor(TREE_WEIGHTS), *likelihood))


def tree_guide(likelihood):
    logits = pyro.param("logits", torch.as_tensor(TREE_LOGITS))
    with pyro.plate("data", len(TREES)), pyro.poutine.scale(scale=torch.as_tensor(PROBABILITIES)):
        pyro.sample("z", SpanningTree(logits))


def all_trees(logits, generator):
    """Each of the trees once, in the place of draws."""
    torch.testing.assert_close(logits, torch.as_tensor(TREE_LOGITS).expand_as(logits))
    return torch.as_tensor(TREES)


def tree_errors(estimator, loss):
    """Of the expected gradient of the negative ELBO, summed over all trees, by likelihood."""
    errors = {}
    for name, likelihood in TREE_LIKELIHOODS.items():
        pyro.clear_param_store()
        loss.loss_and_grads(tree_model, imle(tree_guide, {"z": estimator}), likelihood)
        errors[name] = tree_error(pyro.param("logits").grad.numpy(), likelihood)
    return errors


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
        with pyro.plate("data", 2):
            z = pyro.sample("z", SpanningTree(torch.zeros(2, 3, 3)).to_event(1).mask(True))
            pyro.sample("x", dist.Normal(2 * z, 1.0).to_event(3), obs=2 * torch.as_tensor(truth))

    def guide():
        scores = pyro.param("scores", torch.zeros(2, 2, 3, 3))
        with pyro.plate("data", 2):
            site = SpanningTree(scores + scores.mT).to_event(1)
            return pyro.sample("z", site.mask(True))

    wrapped = imle(guide, ReinMax())
    svi = SVI(model, wrapped, pyro.optim.Adam({"lr": 0.1}), TraceMeanField_ELBO(3))
    for _ in range(60):
        svi.step()

    scores = pyro.param("scores").detach()
    means = SpanningTree(scores + scores.mT).mean.numpy()
    assert ((means > 0.7) == (truth == 1)).all()
    assert SpanningTree.support.check(wrapped()).all()


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
    program = imle(lambda: pyro.sample("z", SpanningTree(torch.zeros((3, 3)))), {"z": estimator})
    with pytest.raises(ValueError, match=r"without noise .* PerturbAndMAP\(logits / 2, spanning"):
        program()
