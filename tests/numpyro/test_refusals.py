"""Bad input: a clear error that names the culprit, before anything changes."""

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
from numpyro import factor, param, plate, sample
from numpyro.distributions.distribution import validation_enabled
from numpyro.infer import SVI

from numpyro_gradest import IWAE, OVIS, VIMCO, ReweightedWakeSleep

X = jnp.array([0.9, -0.4, 0.1, 1.7])

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
        (
            lambda: IWAE(2, chunk_size=1, vectorize_particles=jax.vmap),
            ValueError,
            "both chunk_size=1 and a callable vectorize_particles",
        ),
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


def loc():
    return param("loc", 0.3)


def model():
    z = sample("z", dist.Normal(0.0, 1.0))
    with plate("data", 4):
        sample("x", dist.Normal(z, 1.0), obs=X)


def guide():
    sample("z", dist.Normal(loc(), 1.0))


def model_with(
    *,
    prior: Callable[[], Any] = lambda: dist.Normal(0.0, 1.0),
    likelihood: Callable[[Any], Any] = lambda z: dist.Normal(z, 1.0),
    data: Any = X,
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
    """A distribution whose log-probability is NaN, whatever its parameters."""

    def log_prob(self, value):
        return super().log_prob(value) * math.nan


class NowhereNormal(dist.Normal):
    """A distribution that has no density where it draws."""

    def log_prob(self, value):
        return super().log_prob(value) - math.inf


def factor_model(log_factor: Any) -> Callable[[], None]:
    def model():
        sample("z", dist.Normal(0.0, 1.0))
        factor("likelihood", log_factor)

    return model


class Refusal(NamedTuple):
    model: Callable[[], None]
    guide: Callable[[], None]
    match: str
    error: type[Exception] = ValueError


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
    "value-of-another-size-than-the-plate": Refusal(
        model_with(data=X[:3]),
        guide,
        r"site 'x': its value has shape \(3,\), its distribution batch shape \(4,\)",
    ),
    "distribution-of-another-size-than-the-plate": Refusal(
        model_with(likelihood=lambda z: dist.Normal(jnp.broadcast_to(z, 3), 1.0)),
        guide,
        "site 'x'|broadcast",
    ),
    "dim-without-a-plate": Refusal(
        model_with(likelihood=lambda z: dist.Normal(jnp.broadcast_to(z, (2, 4)), 1.0)),
        guide,
        r"site 'x' has shape \(2, 4\): at dim -2 no plate is declared.*to_event",
    ),
    "plate-of-another-size-in-the-guide": Refusal(
        two_in_a_plate(2), two_in_a_plate(3), "'data' has size 2 in the model but 3 in the guide"
    ),
    "subsampled-plate-that-is-not-common": Refusal(
        model_with(subsample_size=2),
        guide,
        r"'data' is subsampled \(2 of 4\) but model site 'z' lies outside .* model site 'x' lies "
        "inside.*num_replicates",
    ),
}

EAGER_REFUSALS = {
    "nan-in-the-model": Refusal(
        model_with(likelihood=lambda z: Broken(z, 1.0)), guide, "model site 'x' is NaN"
    ),
    "nan-in-the-guide": Refusal(
        model, guide_with(proposal=lambda: Broken(loc(), 1.0)), "guide site 'z' is NaN"
    ),
    "pole-in-the-model": Refusal(
        factor_model(jnp.inf), guide, "model site 'likelihood' is infinite"
    ),
    "draw-outside-of-the-guides-support": Refusal(
        model,
        guide_with(proposal=lambda: NowhereNormal(loc(), 1.0)),
        "guide site 'z' is infinite.*support",
    ),
}

each_way = pytest.mark.parametrize(
    "options",
    [{}, {"vectorize_particles": False}, {"chunk_size": 2}],
    ids=["vmap", "lax.map", "chunks"],
)


@each_way
@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_programs_are_refused_while_they_are_traced(refusal, options):
    """In compiled steps as well; the state that went in is as it was."""
    svi = SVI(model, guide, optax.adam(0.1), loss=VIMCO(3, **options))
    state = svi.init(random.key(0))
    before = jax.tree.map(np.asarray, (svi.get_params(state), state.optim_state))
    svi.model, svi.guide = refusal.model, refusal.guide
    for step in (svi.evaluate, svi.update, jax.jit(svi.update)):
        with pytest.raises(refusal.error, match=refusal.match):
            step(state)
    after = (svi.get_params(state), state.optim_state)
    jax.tree.map(np.testing.assert_array_equal, after, before)


@each_way
@pytest.mark.parametrize("refusal", EAGER_REFUSALS.values(), ids=EAGER_REFUSALS)
def test_log_weights_are_refused_where_they_can_be_seen(refusal, options):
    params = {"loc": jnp.array(0.3)}
    with pytest.raises(refusal.error, match=refusal.match):
        VIMCO(3, **options).loss(random.key(0), params, refusal.model, refusal.guide)


def test_nan_in_the_data_is_named():
    """With validation the host itself warns, and takes such data for impossible (-inf)."""
    model = model_with(data=X.at[1].set(jnp.nan))
    loss = partial(VIMCO(3).loss, random.key(0), {"loc": jnp.array(0.3)}, model, guide)
    with validation_enabled(False), pytest.raises(ValueError, match="model site 'x' is NaN"):
        loss()
    with pytest.warns(UserWarning, match="Out-of-support"), pytest.warns(match="zero weight"):
        assert loss() == jnp.inf


def test_auxiliary_draws_are_checked_as_well():
    likelihoods = iter([dist.Normal, Broken])
    model = model_with(likelihood=lambda z: next(likelihoods)(z, 1.0))
    with pytest.raises(ValueError, match="site 'x' is NaN"):
        OVIS(3, num_auxiliary=2).loss(random.key(0), {"loc": jnp.array(0.3)}, model, guide)


# --- sleep-phi -----------------------------------------------------------------------------------


def sleep(model, guide, **options):
    elbo = ReweightedWakeSleep(2, **({"insomnia": 0.5} | options))
    return elbo.loss(random.key(0), {"loc": jnp.array(0.3)}, model, guide)


def test_sleep_needs_to_show_the_guide_its_dreams():
    with pytest.raises(ValueError, match=r"dreamt at \['x'\].*dream_inputs"):
        sleep(model, guide)


def test_sleep_refuses_auxiliary_sites():
    def with_auxiliary():
        sample("a", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        guide()

    with pytest.raises(ValueError, match=r"guide site 'a' is not in the model.*insomnia=1\.0"):
        sleep(model, with_auxiliary, dream_inputs=lambda dream: ())


def test_sleep_refuses_point_masses():
    with pytest.raises(ValueError, match=r"guide site 'z' is a point mass.*insomnia=1\.0"):
        sleep(model, guide_with(proposal=lambda: dist.Delta(loc())), dream_inputs=lambda dream: ())
