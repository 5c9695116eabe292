"""Which elements share a weight: plates, subsampling, scales and masks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro import handlers, plate, sample

from numpyro_gradest import IWAE, OVIS, VIMCO
from tests.numpyro.definition import (
    Case,
    as_arrays,
    assert_follows_definition,
    evaluate,
    log_bernoulli,
    log_normal,
)
from tests.oracles import multisample as oracle

X = jnp.array([0.9, -0.4, 0.1])
LOGITS = np.array([0.4, -0.9, 0.3])
GRID = jnp.array([[0.9, -0.4, 0.1], [0.3, 1.2, -0.8]])
GRID_LOGITS = np.array([[0.4, -0.9, 0.3], [0.7, 0.1, -0.5]])


def guide_logits(value=LOGITS):
    return numpyro.param("logits", value)


def weight():
    return numpyro.param("weight", 0.8)


# --- common plates -------------------------------------------------------------------------------


def elementwise(model, guide, *, x=X, logits=LOGITS, **fields):
    """A case in which z_i is Bernoulli and x_i Normal around it."""
    return Case(
        model,
        guide,
        lambda params, draws: (
            log_bernoulli(params["weight"], draws["z"]) + log_normal(x, draws["z"], 0.7)
        ),
        lambda params, draws: log_bernoulli(params["logits"], draws["z"]),
        {"weight": 0.8, "logits": logits},
        **fields,
    )


def one_plate():
    def model():
        with plate("data", 3):
            z = sample("z", dist.Bernoulli(logits=weight()))
            sample("x", dist.Normal(z, 0.7), obs=X)

    def guide():
        with plate("data", 3):
            sample("z", dist.Bernoulli(logits=guide_logits()))

    return elementwise(model, guide)


def two_common_plates():
    def model():
        with plate("rows", 2, dim=-2), plate("columns", 3, dim=-1):
            z = sample("z", dist.Bernoulli(logits=weight()))
            sample("x", dist.Normal(z, 0.7), obs=GRID)

    def guide():
        with plate("columns", 3, dim=-1), plate("rows", 2, dim=-2):
            sample("z", dist.Bernoulli(logits=guide_logits(GRID_LOGITS)))

    return elementwise(model, guide, x=GRID, logits=GRID_LOGITS)


def other_dim_in_the_model():
    """The latent's plate lies at -2 with room for what is inside; an auxiliary one at -1."""

    def model():
        with plate("data", 3, dim=-2):
            z = sample("z", dist.Bernoulli(logits=weight()))
            sample("x", dist.Normal(z, 0.7), obs=X[:, None])

    def guide():
        with plate("data", 3, dim=-1):
            logits = guide_logits()
            sample("a", dist.Bernoulli(logits=logits), infer={"is_auxiliary": True})
        with plate("data", 3, dim=-2):
            sample("z", dist.Bernoulli(logits=logits[:, None]))

    def log_p(params, draws):
        z = draws["z"][:, 0]
        return log_bernoulli(params["weight"], z) + log_normal(X, z, 0.7)

    def log_q(params, draws):
        return sum(log_bernoulli(params["logits"], z) for z in (draws["a"], draws["z"][:, 0]))

    return Case(model, guide, log_p, log_q, {"weight": 0.8, "logits": LOGITS})


def swapped_dims_in_the_guide():
    """Two common plates, whose dims the auxiliary site has the other way round."""

    def model():
        with plate("rows", 2, dim=-2), plate("columns", 3, dim=-1):
            z = sample("z", dist.Bernoulli(logits=weight()))
            sample("x", dist.Normal(z, 0.7), obs=GRID)

    def guide():
        logits = guide_logits(GRID_LOGITS)
        with plate("columns", 3, dim=-2), plate("rows", 2, dim=-1):
            sample("a", dist.Bernoulli(logits=logits.T), infer={"is_auxiliary": True})
        with plate("rows", 2, dim=-2), plate("columns", 3, dim=-1):
            sample("z", dist.Bernoulli(logits=logits))

    def log_p(params, draws):
        return log_bernoulli(params["weight"], draws["z"]) + log_normal(GRID, draws["z"], 0.7)

    def log_q(params, draws):
        return sum(log_bernoulli(params["logits"], z) for z in (draws["a"].T, draws["z"]))

    return Case(model, guide, log_p, log_q, {"weight": 0.8, "logits": GRID_LOGITS})


def inner_plate_of_observations():
    """The inner plate has no latents: one weight for each element of the outer."""

    def model():
        with plate("rows", 2, dim=-2):
            z = sample("z", dist.Bernoulli(logits=weight()))
            with plate("columns", 3, dim=-1):
                sample("x", dist.Normal(z, 0.7), obs=GRID)

    def guide():
        with plate("rows", 2, dim=-2):
            sample("z", dist.Bernoulli(logits=guide_logits(LOGITS[:2])[:, None]))

    def log_p(params, draws):
        z = draws["z"]
        log_likelihood = log_normal(GRID, z, 0.7).sum(axis=1)
        return log_bernoulli(params["weight"], z[:, 0]) + log_likelihood

    def log_q(params, draws):
        return log_bernoulli(params["logits"], draws["z"][:, 0])

    return Case(model, guide, log_p, log_q, {"weight": 0.8, "logits": LOGITS[:2]})


def outer_plate_at_the_right():
    """The common plate has dim -1, the one inside of it dim -2."""

    def model():
        with plate("columns", 3, dim=-1):
            z = sample("z", dist.Bernoulli(logits=weight()))
            with plate("rows", 2, dim=-2):
                sample("x", dist.Normal(z, 0.7), obs=GRID)

    def guide():
        with plate("columns", 3, dim=-1):
            sample("z", dist.Bernoulli(logits=guide_logits()))

    def log_p(params, draws):
        z = draws["z"]
        return log_bernoulli(params["weight"], z) + log_normal(GRID, z, 0.7).sum(axis=0)

    return Case(
        model,
        guide,
        log_p,
        lambda params, draws: log_bernoulli(params["logits"], draws["z"]),
        {"weight": 0.8, "logits": LOGITS},
    )


def latent_outside():
    """A latent outside of the plate is shared by its elements: one weight for all."""

    def model():
        g = sample("g", dist.Bernoulli(logits=weight()))
        with plate("data", 3):
            z = sample("z", dist.Bernoulli(logits=weight() * g))
            sample("x", dist.Normal(z, 0.7), obs=X)

    def guide():
        sample("g", dist.Bernoulli(logits=guide_logits()[0]))
        with plate("data", 3):
            sample("z", dist.Bernoulli(logits=guide_logits()))

    def log_p(params, draws):
        local = log_bernoulli(params["weight"] * draws["g"], draws["z"])
        local += log_normal(X, draws["z"], 0.7)
        return log_bernoulli(params["weight"], draws["g"]) + local.sum()

    def log_q(params, draws):
        local = log_bernoulli(params["logits"], draws["z"]).sum()
        return log_bernoulli(params["logits"][0], draws["g"]) + local

    return Case(model, guide, log_p, log_q, {"weight": 0.8, "logits": LOGITS})


def auxiliary_outside():
    """So is an auxiliary site of the guide, though the model does not have it."""

    def model():
        with plate("data", 3):
            z = sample("z", dist.Bernoulli(logits=weight()))
            sample("x", dist.Normal(z, 0.7), obs=X)

    def guide():
        a = sample("a", dist.Bernoulli(0.4), infer={"is_auxiliary": True})
        with plate("data", 3):
            sample("z", dist.Bernoulli(logits=guide_logits() * a))

    def log_p(params, draws):
        z = draws["z"]
        return (log_bernoulli(params["weight"], z) + log_normal(X, z, 0.7)).sum()

    def log_q(params, draws):
        local = log_bernoulli(params["logits"] * draws["a"], draws["z"]).sum()
        return jnp.log(jnp.where(draws["a"] == 1, 0.4, 0.6)) + local

    return Case(model, guide, log_p, log_q, {"weight": 0.8, "logits": LOGITS})


def two_plates_side_by_side():
    """No plate encloses everything: one weight."""

    def model():
        with plate("first", 3):
            z = sample("z", dist.Bernoulli(logits=weight()))
            sample("x", dist.Normal(z, 0.7), obs=X)
        with plate("second", 2):
            y = sample("y", dist.Bernoulli(logits=weight()))
            sample("w", dist.Normal(y, 0.7), obs=X[:2])

    def guide():
        with plate("first", 3):
            sample("z", dist.Bernoulli(logits=guide_logits()))
        with plate("second", 2):
            sample("y", dist.Bernoulli(logits=guide_logits()[:2]))

    def log_p(params, draws):
        return sum(
            (log_bernoulli(params["weight"], z) + log_normal(x, z, 0.7)).sum()
            for z, x in ((draws["z"], X), (draws["y"], X[:2]))
        )

    def log_q(params, draws):
        first = log_bernoulli(params["logits"], draws["z"]).sum()
        return first + log_bernoulli(params["logits"][:2], draws["y"]).sum()

    return Case(model, guide, log_p, log_q, {"weight": 0.8, "logits": LOGITS})


def several_sites_and_events():
    """Two latents per datum, one of them a vector, and two observations."""

    def model():
        with plate("data", 2):
            z = sample("z", dist.Bernoulli(logits=weight()).expand([3]).to_event(1))
            y = sample("y", dist.Bernoulli(logits=weight() * z.sum(-1)))
            sample("x", dist.Normal(z, 0.7).to_event(1), obs=GRID)
            sample("w", dist.Normal(y, 0.7), obs=X[:2])

    def guide():
        with plate("data", 2):
            z = sample("z", dist.Bernoulli(logits=guide_logits(GRID_LOGITS)).to_event(1))
            sample("y", dist.Bernoulli(logits=z.sum(-1) - 1.0))

    def log_p(params, draws):
        z, y = draws["z"], draws["y"]
        log_p_y = log_bernoulli(params["weight"] * z.sum(-1), y) + log_normal(X[:2], y, 0.7)
        return log_p_y + (log_bernoulli(params["weight"], z) + log_normal(GRID, z, 0.7)).sum(-1)

    def log_q(params, draws):
        log_q_z = log_bernoulli(params["logits"], draws["z"]).sum(-1)
        return log_q_z + log_bernoulli(draws["z"].sum(-1) - 1.0, draws["y"])

    return Case(model, guide, log_p, log_q, {"weight": 0.8, "logits": GRID_LOGITS})


# --- scales and masks ----------------------------------------------------------------------------


def scaled_by(model_scale, guide_scale=None):
    """``one_plate`` with a scale around every site; that of the guide may have other dims."""
    case = one_plate()
    guide_scale = model_scale if guide_scale is None else guide_scale
    return case._replace(
        model=handlers.scale(case.model, scale=model_scale),
        guide=handlers.scale(case.guide, scale=guide_scale),
        bound_scale=np.asarray(model_scale),
    )


def scaled_at_other_dims():
    """A scale per datum that is common to all sites, although their plates lie at other dims."""
    case = other_dim_in_the_model()
    scale = np.array([2.5, 0.5, 1.0])

    def scaled_guide():
        with plate("data", 3, dim=-1), handlers.scale(scale=scale):
            logits = guide_logits()
            sample("a", dist.Bernoulli(logits=logits), infer={"is_auxiliary": True})
        with plate("data", 3, dim=-2), handlers.scale(scale=scale[:, None]):
            sample("z", dist.Bernoulli(logits=logits[:, None]))

    model = handlers.scale(case.model, scale=scale[:, None])
    return case._replace(model=model, guide=scaled_guide, bound_scale=scale)


def scaled_likelihood():
    """A scale on some sites alone weighs their log-probabilities, inside the weights."""

    def model():
        with plate("data", 3):
            z = sample("z", dist.Bernoulli(logits=weight()))
            with handlers.scale(scale=jnp.array([2.0, 1.0, 0.3])):
                sample("x", dist.Normal(z, 0.7), obs=X)

    def log_p(params, draws):
        z = draws["z"]
        log_likelihood = jnp.array([2.0, 1.0, 0.3]) * log_normal(X, z, 0.7)
        return log_bernoulli(params["weight"], z) + log_likelihood

    return one_plate()._replace(model=model, log_p=log_p)


def masked_by(mask):
    """A mask around every site: what it hides counts nothing, in the value and in the gradient."""
    case = one_plate()
    return case._replace(
        model=handlers.mask(case.model, mask=mask),
        guide=handlers.mask(case.guide, mask=mask),
        bound_scale=np.asarray(mask, float),
    )


def masked_distributions():
    """The same, by ``.mask`` of each distribution, which lies below ``to_event`` or above."""
    mask = jnp.array([True, False])

    def model():
        with plate("data", 2):
            z = sample("z", dist.Bernoulli(logits=weight()).expand([2, 3]).to_event(1).mask(mask))
            masked = dist.Normal(z, 0.7).mask(mask[:, None])
            sample("x", masked.to_event(1), obs=GRID)

    def guide():
        with plate("data", 2):
            logits = guide_logits(GRID_LOGITS)
            sample("z", dist.Bernoulli(logits=logits).mask(mask[:, None]).to_event(1))

    def log_p(params, draws):
        z = draws["z"]
        return (log_bernoulli(params["weight"], z) + log_normal(GRID, z, 0.7)).sum(-1)

    def log_q(params, draws):
        return log_bernoulli(params["logits"], draws["z"]).sum(-1)

    params = {"weight": 0.8, "logits": GRID_LOGITS}
    return Case(model, guide, log_p, log_q, params, bound_scale=np.array([1.0, 0.0]))


def observed_in_part():
    """``obs_mask`` makes the missing data latent; the guide draws those as well."""
    is_observed = jnp.array([True, False, True])

    def model():
        with plate("data", 3):
            sample("x", dist.Bernoulli(logits=weight()), obs=jnp.ones(3), obs_mask=is_observed)

    def guide():
        with plate("data", 3), handlers.mask(mask=~is_observed):
            sample("x_unobserved", dist.Bernoulli(logits=guide_logits()))

    def log_p(params, draws):
        return log_bernoulli(params["weight"], jnp.where(is_observed, 1.0, draws["x_unobserved"]))

    def log_drawn(params, draws):
        return log_bernoulli(params["logits"], draws["x_unobserved"])

    def log_q(params, draws):
        return jnp.where(is_observed, 0.0, log_drawn(params, draws))

    params = {"weight": 0.8, "logits": LOGITS}
    return Case(model, guide, log_p, log_q, params, log_drawn=log_drawn)


CASES = {
    case.__name__: case
    for case in (
        one_plate,
        two_common_plates,
        other_dim_in_the_model,
        swapped_dims_in_the_guide,
        inner_plate_of_observations,
        outer_plate_at_the_right,
        latent_outside,
        auxiliary_outside,
        two_plates_side_by_side,
        several_sites_and_events,
        scaled_at_other_dims,
        scaled_likelihood,
        masked_distributions,
        observed_in_part,
    )
} | {
    "scaled_by_a_number": partial(scaled_by, 2.5),
    "scaled_by_a_numpy_number": partial(scaled_by, np.float32(2.5)),
    "scaled_by_an_array": partial(scaled_by, jnp.array(2.5)),
    "scaled_by_a_number_and_an_array": partial(scaled_by, 2.5, jnp.array([2.5])),
    "scaled_by_datum": partial(scaled_by, np.array([2.5, 0.5, 1.0])),
    "masked_by_datum": partial(masked_by, np.array([True, False, True])),
    "masked": partial(masked_by, False),
    "not_masked": partial(masked_by, True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_loss_and_gradient_follow_the_definition(case):
    assert_follows_definition(case())


@pytest.mark.parametrize(
    ("build", "signal"),
    [
        (partial(IWAE, 1), oracle.reinforce_learning_signal),
        (partial(IWAE, 4), oracle.reinforce_learning_signal),
        (partial(VIMCO, 2), oracle.vimco_learning_signal),
    ],
    ids=["one-particle", "IWAE", "VIMCO"],
)
def test_other_objectives_follow_the_definition(build, signal):
    assert_follows_definition(inner_plate_of_observations(), build, signal)


@jax.jit
def gradient_of_logits(x):
    def model(x):
        with plate("data", 3):
            z = sample("z", dist.Bernoulli(0.3))
            sample("x", dist.Normal(z, 0.7), obs=x)

    def guide(x):
        with plate("data", 3):
            sample("z", dist.Bernoulli(logits=guide_logits()))

    def loss(logits):
        return VIMCO(4).loss(random.key(0), {"logits": logits}, model, guide, x)

    return jax.grad(loss)(jnp.asarray(LOGITS))


def test_a_datum_is_indifferent_to_the_others():
    gradient, other = gradient_of_logits(X), gradient_of_logits(X.at[1].set(7.0))
    np.testing.assert_array_equal(gradient[jnp.array([0, 2])], other[jnp.array([0, 2])])
    assert gradient[1] != other[1]


def test_a_traced_scale_multiplies_loss_and_gradient():
    case = one_plate()
    params = as_arrays(case.params)

    def loss(params, scale):
        model = handlers.scale(case.model, scale=scale)
        guide = handlers.scale(case.guide, scale=scale)
        return OVIS(3).loss(random.key(0), params, model, guide)

    evaluate_at = jax.jit(jax.value_and_grad(loss))
    actual, plain = evaluate_at(params, 2.5), evaluate_at(params, 1.0)
    for scaled, unscaled in zip(*map(jax.tree.leaves, (actual, plain)), strict=True):
        np.testing.assert_allclose(scaled, 2.5 * unscaled, rtol=1e-10)


# --- subsampling ---------------------------------------------------------------------------------


def subsampled(*, rows=None, columns=None):
    """``two_common_plates`` on a random part of the grid."""

    def model():
        with plate("rows", 2, rows, dim=-2) as i, plate("columns", 3, columns, dim=-1) as j:
            z = sample("z", dist.Bernoulli(logits=weight()))
            sample("x", dist.Normal(z, 0.7), obs=GRID[i[:, None], j])

    def guide():
        with plate("columns", 3, columns, dim=-1) as j, plate("rows", 2, rows, dim=-2) as i:
            logits = guide_logits(GRID_LOGITS)
            sample("z", dist.Bernoulli(logits=logits[i[:, None], j]))

    def log_p(params, draws):
        x = GRID[draws["rows"][:, None], draws["columns"]]
        return log_bernoulli(params["weight"], draws["z"]) + log_normal(x, draws["z"], 0.7)

    def log_q(params, draws):
        logits = params["logits"][draws["rows"][:, None], draws["columns"]]
        return log_bernoulli(logits, draws["z"])

    params = {"weight": 0.8, "logits": GRID_LOGITS}
    scale = 2 / (rows or 2) * 3 / (columns or 3)
    return Case(model, guide, log_p, log_q, params, bound_scale=scale)


@pytest.mark.parametrize(
    "subsample", [{"columns": 2}, {"rows": 1, "columns": 2}], ids=["one-plate", "nested"]
)
def test_subsampling_scales_the_bound_and_is_shared_by_particles(subsample):
    draws = assert_follows_definition(subsampled(**subsample)).draws
    for name in ("rows", "columns"):
        np.testing.assert_array_equal(
            draws[name], np.broadcast_to(draws[name][0], draws[name].shape)
        )


def test_subsampling_inside_a_common_scale():
    case = subsampled(columns=2)
    scaled = case._replace(
        model=handlers.scale(case.model, scale=0.7),
        guide=handlers.scale(case.guide, scale=0.7),
        bound_scale=0.7 * case.bound_scale,
    )
    assert_follows_definition(scaled)


def test_every_evaluation_draws_a_subsample_of_its_own():
    def model():
        with plate("data", 3, 1) as i:
            sample("x", dist.Normal(0.0, 0.7), obs=X[i])

    def loss(key):
        return IWAE(2).loss(key, {}, model, lambda: None)

    losses = jax.jit(jax.vmap(loss))(random.split(random.key(0), 20))
    every = -3 * log_normal(X, 0.0, 0.7)
    chosen = jnp.isclose(losses[:, None], every)
    assert chosen.sum(axis=1).all() and chosen.sum(axis=0).all()


def test_param_and_subsample_statements_follow_the_subsample():
    """The host's own ways of subsampling see the same indices."""

    def model():
        with plate("data", 3, 2):
            x = numpyro.subsample(X, event_dim=0)
            z = sample("z", dist.Bernoulli(0.3))
            sample("x", dist.Normal(z, 0.7), obs=x)

    def guide():
        with plate("data", 3, 2):
            logits = numpyro.param("logits", jnp.asarray(LOGITS), event_dim=0)
            sample("z", dist.Bernoulli(logits=logits))

    def log_p(params, draws):
        log_likelihood = log_normal(X[draws["data"]], draws["z"], 0.7)
        return jnp.log(jnp.where(draws["z"] == 1, 0.3, 0.7)) + log_likelihood

    def log_q(params, draws):
        return log_bernoulli(params["logits"][draws["data"]], draws["z"])

    case = Case(model, guide, log_p, log_q, {"logits": LOGITS}, bound_scale=1.5)
    assert_follows_definition(case)


def subsampled_inside():
    """A latent lies outside of the plate that is subsampled."""
    case = latent_outside()

    def model():
        g = sample("g", dist.Bernoulli(logits=weight()))
        with plate("data", 3, 2) as i:
            sample("x", dist.Normal(g, 0.7), obs=X[i])

    def guide():
        sample("g", dist.Bernoulli(logits=guide_logits()[0]))

    def log_p(params, draws):
        i = draws["data"]
        log_likelihood = 1.5 * log_normal(X[i], draws["g"], 0.7).sum()
        return log_bernoulli(params["weight"], draws["g"]) + log_likelihood

    def log_q(params, draws):
        return log_bernoulli(params["logits"][0], draws["g"])

    return case._replace(model=model, guide=guide, log_p=log_p, log_q=log_q)


def test_weights_refuse_a_subsampled_plate_that_is_not_common():
    case = subsampled_inside()
    with pytest.raises(ValueError, match=r"Plate 'data' is subsampled \(2 of 3\) but .* 'g'"):
        VIMCO(2).loss(random.key(0), case.params, case.model, case.guide)


@pytest.mark.parametrize("num_replicates", [1, 3])
def test_one_particle_may_subsample_any_plate(num_replicates):
    """There are no weights to be wrong about: the ELBO, N/B on the log-probabilities."""
    case = subsampled_inside()

    def mean_log_weight(params, draws):
        return case.log_p(params, draws) - case.log_q(params, draws)

    actual = evaluate(
        partial(IWAE, 1, num_replicates=num_replicates), case.model, case.guide, case.params
    )
    params = as_arrays(case.params)
    log_weights = jax.vmap(partial(mean_log_weight, params))(actual.draws)
    np.testing.assert_allclose(actual.loss, -log_weights.mean(), rtol=1e-10)
