"""Bad input: a clear error that names the culprit, before anything changes."""

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import plate, sample
from pyro.infer import SVI
from pyro.poutine.plate_messenger import block_plate
from torch import Tensor

from pyro_gradest import IWAE, OVIS, VIMCO, ReweightedWakeSleep

X = torch.tensor([0.9, -0.4, 0.1, 1.7])

# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: VIMCO(1), ValueError, r"num_particles >= 2, got 1.*IWAE\(1\)"),
        (lambda: OVIS(1), ValueError, r"num_particles >= 2, got 1.*IWAE\(1\)"),
        (lambda: IWAE(0), ValueError, "num_particles >= 1, got 0"),
        (lambda: IWAE(-3), ValueError, "num_particles >= 1, got -3"),
        (lambda: IWAE(2.0), TypeError, r"(?s)num_particles.*2\.0"),
        (lambda: IWAE("2"), TypeError, "(?s)num_particles.*'2'"),
        (lambda: IWAE(True), TypeError, "num_particles as a positive integer, got True"),
        (lambda: IWAE(2, chunk_size=0), ValueError, "chunk_size >= 1, got 0"),
        (lambda: IWAE(2, chunk_size=1.5), TypeError, r"(?s)chunk_size.*1\.5"),
        (lambda: IWAE(2, num_replicates=0), ValueError, "num_replicates >= 1, got 0"),
        (lambda: IWAE(2, num_replicates=True), TypeError, "num_replicates"),
        (lambda: IWAE(2, reparam="reinmax"), ValueError, 'reparam="pathwise" or "dreg" or'),
        (lambda: IWAE(2, nonsense=1), TypeError, "nonsense"),
        (lambda: IWAE(2, "score"), TypeError, "positional"),
        (lambda: VIMCO(2, leave_one_out="harmonic"), ValueError, "harmonic"),
        (lambda: OVIS(2, gamma=1.5), ValueError, r"0 <= gamma <= 1, got 1\.5"),
        (lambda: OVIS(2, gamma=math.nan), ValueError, "0 <= gamma <= 1, got nan"),
        (lambda: OVIS(2, num_auxiliary=-1), ValueError, "num_auxiliary >= 1, got -1"),
        (lambda: OVIS(2, gamma=0.5, num_auxiliary=1), ValueError, "Set one of them to 0"),
        (lambda: ReweightedWakeSleep(2, insomnia=-1), ValueError, "0 <= insomnia <= 1, got -1"),
        (lambda: ReweightedWakeSleep(2, num_sleep_particles=0), ValueError, "num_sleep_particles"),
        (lambda: ReweightedWakeSleep(2, reparam="stl"), ValueError, 'reparam="score" or "dreg"'),
        (lambda: ReweightedWakeSleep(2, alpha=0.5), TypeError, "alpha"),
        (lambda: VIMCO(2, alpha=1.5), ValueError, r"0 <= alpha <= 1, got 1\.5"),
        (lambda: IWAE(2, alpha=math.nan), ValueError, "0 <= alpha <= 1, got nan"),
        (lambda: OVIS(2, alpha=0.5, gamma=1.0), ValueError, "alpha=0.5 with gamma=1.0"),
        (lambda: OVIS(2, alpha=1.5, num_auxiliary=1), ValueError, "0 <= alpha <= 1"),
    ],
)
def test_options_are_checked_when_the_objective_is_made(build, error, match):
    with pytest.raises(error, match=match):
        build()


# --- programs ------------------------------------------------------------------------------------


def loc() -> Tensor:
    return pyro.param("loc", torch.tensor(0.3))


def model() -> None:
    z = sample("z", dist.Normal(0.0, 1.0))
    with plate("data", 4):
        sample("x", dist.Normal(z, 1.0), obs=X)


def guide() -> None:
    sample("z", dist.Normal(loc(), 1.0))


def model_with(
    *,
    prior: Callable[[], Any] = lambda: dist.Normal(0.0, 1.0),
    likelihood: Callable[[Tensor], Any] = lambda z: dist.Normal(z, 1.0),
    data: Tensor = X,
    **data_plate: Any,
) -> Callable[[], None]:
    def model():
        z = sample("z", prior())
        with plate("data", **({"size": 4} | data_plate)) as rows:
            sample("x", likelihood(z), obs=data[rows] if data is X else data)

    return model


def guide_with(
    name: str = "z", proposal: Callable[[], Any] = lambda: dist.Normal(loc(), 1.0), **options: Any
) -> Callable[[], None]:
    def guide():
        sample(name, proposal(), **options)

    return guide


def two_in_a_plate(size: int) -> Callable[[], None]:
    def program():
        with plate("data", size):
            sample("z", dist.Normal(loc(), 1.0))

    return program


def both(program: Callable[[], None]) -> Callable[[], None]:
    def both_sites():
        program()
        sample("extra", dist.Normal(loc(), 1.0))

    return both_sites


class Broken(dist.Normal):
    """A distribution whose log-probability is NaN, which the host's validation can't foresee."""

    def log_prob(self, value):
        return super().log_prob(value) * math.nan


def factor_model(log_factor: Any) -> Callable[[], None]:
    def model():
        sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("likelihood", log_factor)

    return model


class Refusal(NamedTuple):
    model: Callable[[], None]
    guide: Callable[[], None]
    match: str
    error: type[Exception] = ValueError
    options: dict[str, Any] = {}  # noqa: RUF012


REFUSALS = {
    "latent-not-in-the-guide": Refusal(
        both(model), guide, r"Model site 'extra' is neither observed nor .*\['z'\]"
    ),
    "guide-site-not-in-the-model": Refusal(
        model, both(guide), "Guide site 'extra' is not a latent site of the model"
    ),
    "observed-in-the-model-only": Refusal(
        model_with(), guide_with("x"), "Model site 'z' is neither observed"
    ),
    "enumerated-in-the-guide": Refusal(
        model_with(prior=lambda: dist.Bernoulli(0.5)),
        guide_with(proposal=lambda: dist.Bernoulli(logits=loc()), infer={"enumerate": "parallel"}),
        "'z' is configured for enumeration.*TraceEnum_ELBO",
    ),
    "nan-in-the-data": Refusal(
        model_with(data=torch.tensor([0.9, math.nan, 0.1, 1.7])), guide, "(?s)site 'x'.*nan"
    ),
    "nan-in-the-model": Refusal(
        model_with(likelihood=lambda z: Broken(z, 1.0)), guide, "site 'x' is NaN"
    ),
    "nan-in-the-guide": Refusal(
        model, guide_with(proposal=lambda: Broken(loc(), 1.0)), "site 'z' is NaN"
    ),
    "pole-in-the-model": Refusal(
        factor_model(torch.tensor(math.inf)), guide, "model site 'likelihood' is infinite"
    ),
    "draw-outside-of-the-guides-support": Refusal(
        model,
        guide_with(proposal=lambda: dist.Delta(loc(), log_density=torch.tensor(-math.inf))),
        "guide site 'z' is infinite.*support",
    ),
    "integer-log-probability": Refusal(
        factor_model(torch.tensor(3)),
        guide,
        r"'likelihood' has dtype torch\.int64.*\.float\(\)",
        TypeError,
    ),
    "value-of-another-size-than-the-plate": Refusal(
        model_with(data=X[:3]), guide, "(?s)site 'x'.*broadcastable"
    ),
    "distribution-of-another-size-than-the-plate": Refusal(
        model_with(likelihood=lambda z: dist.Normal(z.expand(3), 1.0)),
        guide,
        r"Shape mismatch inside plate\('data'\) at site x",
    ),
    "dim-without-a-plate": Refusal(
        model_with(likelihood=lambda z: dist.Normal(z.expand(2, 4), 1.0)),
        guide,
        r"(?s)site \"x\".*actual \[2, 4\].*to_event",
    ),
    "latent-of-another-shape-in-the-guide": Refusal(
        model, guide_with(proposal=lambda: dist.Normal(loc().expand(2), 1.0)), "(?s)z.*2"
    ),
    "plate-of-another-size-in-the-guide": Refusal(
        two_in_a_plate(2), two_in_a_plate(3), "'data' has size 3 of 2 .* but 3 of 3"
    ),
    "subsampled-plate-that-is-not-common": Refusal(
        model_with(subsample_size=2),
        guide,
        r"'data' is subsampled \(2 of 4\) but model site 'z' lies outside .* model site 'x' lies "
        "inside.*num_replicates",
    ),
    "plates-left-of-the-particles": Refusal(
        model, guide, "(?s)site 'x'", options={"vectorize_particles": True, "max_plate_nesting": 0}
    ),
}


def state_of(optimizer: pyro.optim.PyroOptim) -> dict[str, Any]:
    return copy.deepcopy(optimizer.get_state())


@pytest.mark.parametrize(
    "options", [{}, {"vectorize_particles": True}, {"chunk_size": 2}], ids=["loop", "all", "chunks"]
)
@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_nothing_changes_when_a_program_is_refused(refusal, options):
    optimizer = pyro.optim.Adam({"lr": 0.1})
    svi = SVI(model, guide, optimizer, loss=VIMCO(3, **(options | refusal.options)))
    SVI(model, guide, optimizer, loss=VIMCO(3)).step()
    parameter = pyro.get_param_store()["loc"].unconstrained()
    parameter.grad = torch.tensor(0.7)
    value, state = parameter.detach().clone(), state_of(optimizer)

    svi.model, svi.guide = refusal.model, refusal.guide
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the host's own, of the same
        with pytest.raises(refusal.error, match=refusal.match):
            svi.step()
    assert torch.equal(parameter, value)
    assert parameter.grad == 0.7
    assert str(state_of(optimizer)) == str(state)


def test_the_site_of_a_nan_is_named_without_the_hosts_validation():
    model, guide = model_with(data=X * math.nan), guide_with()
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="site 'x' is NaN"):
        VIMCO(3).loss_and_grads(model, guide)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_auxiliary_draws_are_checked_as_well():
    likelihoods = iter([dist.Normal] * 3 + [Broken])
    model = model_with(likelihood=lambda z: next(likelihoods)(z, 1.0))
    with pytest.raises(ValueError, match="site 'x' is NaN"):
        OVIS(3, num_auxiliary=1).loss_and_grads(model, guide)


def test_a_site_outside_of_the_particle_plate_is_refused():
    def model():
        sample("z", dist.Normal(0.0, 1.0))
        with block_plate(name="num_particles_vectorized"):
            sample("x", dist.Normal(0.0, 1.0), obs=X[0])

    elbo = VIMCO(3, vectorize_particles=True, max_plate_nesting=0)
    with pytest.raises(ValueError, match="model site 'x' lies outside of the plate"):
        elbo.loss_and_grads(model, guide)


# --- sleep-phi -----------------------------------------------------------------------------------


def test_particles_that_leave_their_dim_are_refused():
    # The matrix product moves them left, where the host takes dims to come from enumeration and
    # sums: with K particles the likelihood counts K times.
    features = torch.arange(12.0).reshape(4, 3) / 12

    def model(product):
        w = sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with plate("data", 4):
            sample("y", dist.Normal(product(w), 1.0), obs=X)

    def guide(product):
        sample("w", dist.Normal(0.0, pyro.param("scale", torch.ones(3))).to_event(1))

    loss = IWAE(5, vectorize_particles=True, max_plate_nesting=1)
    assert math.isfinite(loss.loss(model, guide, lambda w: (w * features).sum(-1)))
    with pytest.raises(ValueError, match=r"(?s)'y'.*\(5, 5, 4\).*num_particles_vectorized at -2"):
        loss.loss(model, guide, lambda w: w @ features.T)


def test_sleep_needs_to_show_the_guide_its_dreams():
    with pytest.raises(ValueError, match=r"dreamt at \['x'\].*dream_inputs"):
        ReweightedWakeSleep(2, insomnia=0.5).loss_and_grads(model, guide)


def test_sleep_refuses_auxiliary_sites():
    def with_auxiliary():
        sample("a", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        guide()

    elbo = ReweightedWakeSleep(2, insomnia=0.5, dream_inputs=lambda dream: ())
    with pytest.raises(ValueError, match=r"guide site 'a' is not in the model.*insomnia=1\.0"):
        elbo.loss_and_grads(model, with_auxiliary)


def test_sleep_refuses_a_guide_that_does_not_cover_the_dreams():
    def narrow_guide():
        with pyro.validation_enabled(False):
            sample("z", dist.Uniform(loc(), loc() + 1e-9))

    elbo = ReweightedWakeSleep(2, insomnia=0.0, dream_inputs=lambda dream: ())
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="at site 'z' is -inf"):
        elbo.loss_and_grads(model, narrow_guide)
