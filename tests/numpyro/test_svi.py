"""The objectives inside SVI: compiled steps, state, networks, dtypes, ways to run particles."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import linen, nnx
from jax import random
from numpyro import param, plate, sample
from numpyro.contrib.module import flax_module, nnx_module
from numpyro.infer import SVI
from numpyro.primitives import mutable

from numpyro_gradest import IWAE, OVIS, VIMCO, ReweightedWakeSleep
from tests.conformance.backends import QUICK_TO_COMPILE

quickly = partial(jax.jit, compiler_options=QUICK_TO_COMPILE)
X = np.array([0.9, -0.4, 0.1, 1.3])


def model(x):
    weight = param("weight", 0.8)
    with plate("data", len(x)):
        z = sample("z", dist.Bernoulli(0.3))
        y = sample("y", dist.Normal(1.0 * z, 1.0))
        sample("x", dist.Normal(weight * y, 0.7), obs=x)


def guide(x):
    slope = param("slope", 0.3)
    with plate("data", len(x)):
        z = sample("z", dist.Bernoulli(logits=slope * x + 0.1))
        sample("y", dist.Normal(slope * x + 0.2 * z, 0.7))


OBJECTIVES = {
    "IWAE": partial(IWAE, 4),
    "ELBO": partial(IWAE, 1),
    "VIMCO": partial(VIMCO, 4),
    "OVIS-MC": partial(OVIS, 3, num_auxiliary=2),
    "ReweightedWakeSleep": partial(
        ReweightedWakeSleep, 4, insomnia=0.5, dream_inputs=lambda dream, x: (dream["x"],)
    ),
}
every_objective = pytest.mark.parametrize("build", OBJECTIVES.values(), ids=OBJECTIVES)


def svi_of(objective, model=model, guide=guide):
    return SVI(model, guide, optax.adam(0.05), loss=objective)


def value_and_gradient(objective, x=X, model=model, guide=guide, key=None, params=None):
    params = {"weight": 0.8, "slope": 0.3} if params is None else params
    params = jax.tree.map(lambda value: jnp.asarray(value, dtype=float), params)
    key = random.key(0) if key is None else key

    def loss(params, x):
        return objective.loss(key, params, model, guide, x)

    return quickly(jax.value_and_grad(loss))(params, x)


def assert_close(actual, desired, rtol=1e-9):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=1e-12), actual, desired)


# --- the ways to train ---------------------------------------------------------------------------


@every_objective
@pytest.mark.parametrize("progress_bar", [True, False], ids=["progress_bar", "silent"])
def test_run(build, progress_bar):
    result = svi_of(build()).run(random.key(0), 3, X, progress_bar=progress_bar)
    assert result.losses.shape == (3,) and np.isfinite(result.losses).all()
    assert result.params["slope"] != 0.3 and result.params["weight"] != 0.8


def test_update_scan_and_stable_update_agree():
    """One step compiled, steps in ``lax.scan``, and steps that check for NaN."""
    svi = svi_of(OVIS(3))
    start = svi.init(random.key(0), X)

    def steps(update):
        return quickly(lambda: jax.lax.scan(lambda s, _: update(s, X), start, length=2))()

    one, first_loss = quickly(svi.update)(start, X)
    two, _ = quickly(svi.update)(one, X)
    scanned, losses = steps(svi.update)
    assert_close(svi.get_params(scanned), svi.get_params(two))
    assert_close(losses[0], first_loss)
    assert_close(svi.get_params(steps(svi.stable_update)[0]), svi.get_params(scanned))
    np.testing.assert_allclose(svi.evaluate(start, X), first_loss)


def test_a_step_is_traced_once():
    traces = []

    def counted(x):
        traces.append(None)
        model(x)

    svi = svi_of(VIMCO(3), model=counted)
    state = svi.init(random.key(0), X)
    update = quickly(svi.update)
    state, _ = update(state, X)
    before = len(traces)
    for _ in range(3):
        state, _ = update(state, X)
    assert len(traces) == before


def test_forward_mode_differentiation():
    """Everything that a loss does is differentiable forwards as well, chunks included."""
    for objective in (OVIS(3), VIMCO(3, chunk_size=2)):
        svi = svi_of(objective)
        state = svi.init(random.key(0), X)
        forward, _ = quickly(partial(svi.update, forward_mode_differentiation=True))(state, X)
        backward, _ = quickly(svi.update)(state, X)
        assert_close(svi.get_params(forward), svi.get_params(backward))


def test_gradients_under_vmap():
    """Many keys at once, as gradient statistics need them."""

    def gradient(key):
        params = {"weight": jnp.array(0.8), "slope": jnp.array(0.3)}
        return jax.grad(lambda params: OVIS(3).loss(key, params, model, guide, X))(params)

    keys = random.split(random.key(0), 2)
    several = quickly(jax.vmap(gradient))(keys)
    for i in range(2):
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], several), quickly(gradient)(keys[i]))


def sometimes_nan(scale):
    def model():
        sample("z", dist.Normal(0.0, 1.0))
        numpyro.factor("evidence", jnp.log(scale))

    def guide():
        sample("z", dist.Normal(param("loc", 0.5), 1.0))

    return svi_of(VIMCO(2), model, guide)


def test_stable_update_skips_a_step_that_is_nan():
    svi = sometimes_nan(jnp.nan)
    state = svi.init(random.key(0))
    after, loss = quickly(svi.stable_update)(state)
    assert np.isnan(loss)
    assert_close(svi.get_params(after), svi.get_params(state))


# --- dtypes and keys -----------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [None, 2], ids=["whole", "chunked"])
def test_without_x64_everything_is_float32(user_defaults, chunk_size):
    objective = OVIS(3, num_auxiliary=1, chunk_size=chunk_size)
    loss, gradient = value_and_gradient(objective, X.astype(np.float32))
    assert {leaf.dtype for leaf in jax.tree.leaves((loss, gradient))} == {jnp.dtype("float32")}
    assert all(np.isfinite(leaf) for leaf in jax.tree.leaves((loss, gradient)))


def test_old_keys_draw_as_new_ones():
    new, old = random.key(3), random.PRNGKey(3)
    assert_close(
        value_and_gradient(VIMCO(3), key=old), value_and_gradient(VIMCO(3), key=new), rtol=1e-12
    )


# --- how particles are run -----------------------------------------------------------------------


def loop(fn, keys):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *[fn(key) for key in keys])


def sharded(fn, keys):
    """Particles spread over a mesh of devices (here of one), as a user of many would."""
    mesh = jax.make_mesh((1,), ("particles",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.PartitionSpec("particles")
    return jax.shard_map(jax.vmap(fn), mesh=mesh, in_specs=split, out_specs=split)(keys)


@pytest.mark.parametrize(
    "vectorize",
    [False, loop, partial(jax.lax.map, batch_size=2), sharded],
    ids=["lax.map", "loop", "lax.map-in-batches", "shard_map"],
)
def test_every_way_to_run_particles_gives_the_same(vectorize):
    objective = partial(OVIS, 3, num_auxiliary=2, num_replicates=2)
    actual = value_and_gradient(objective(vectorize_particles=vectorize))
    assert_close(actual, value_and_gradient(objective()))


@pytest.mark.parametrize("chunk_size", [1, 4, 6, 100])
@pytest.mark.parametrize("build", [partial(OVIS, 3, num_auxiliary=2), partial(IWAE, 3)])
def test_chunks_have_the_gradient_of_the_whole(build, chunk_size):
    """Whether the size divides the number of particles (six here), or exceeds it."""
    build = partial(build, num_replicates=2)
    chunked = value_and_gradient(build(chunk_size=chunk_size))
    assert_close(chunked, value_and_gradient(build()))


def test_memory_does_not_grow_with_particles_in_chunks():
    def temporary_bytes(num_particles):
        objective = VIMCO(num_particles, chunk_size=10)

        def gradient(weight):
            def loss(weight):
                params = {"weight": weight, "slope": jnp.array(0.3)}
                return objective.loss(random.key(0), params, model, guide, jnp.zeros(1000))

            return jax.grad(loss)(weight)

        compiled = jax.jit(gradient).lower(jnp.array(0.8)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # What grows is three arrays of K numbers per datum: log-weights and coefficients.
    growth = temporary_bytes(400) - temporary_bytes(100)
    assert growth < 300 * 1000 * 8 * 10


def test_auxiliary_draws_do_not_touch_the_bound():
    plain, _ = value_and_gradient(OVIS(3))
    for num_auxiliary in (1, 5):
        loss, _ = value_and_gradient(OVIS(3, num_auxiliary=num_auxiliary))
        assert loss == plain


def test_replicates_average_independent_bounds():
    """Their mean is a loss of the same expectation, with a spread that shrinks as it should."""

    @quickly
    @partial(jax.vmap, in_axes=0)
    def losses(key):
        params = {"weight": jnp.array(0.8), "slope": jnp.array(0.3)}
        return tuple(
            IWAE(2, num_replicates=replicates).loss(key, params, model, guide, X)
            for replicates in (1, 4)
        )

    one, four = losses(random.split(random.key(0), 2000))
    error = np.sqrt((one.var() + four.var()) / 2000)
    assert error < 0.1 and abs(one.mean() - four.mean()) < 4.5 * error
    np.testing.assert_allclose(one.var() / four.var(), 4.0, rtol=0.25)


# --- mutable state and networks ------------------------------------------------------------------


def counting_guide(x):
    """Counts its runs, and keeps a running mean of what it draws."""
    state = mutable("state", {"runs": jnp.array(0), "mean": jnp.array(0.0)})
    with plate("data", len(x)):
        z = sample("z", dist.Bernoulli(logits=param("slope", 0.3) * x))
        sample("y", dist.Normal(1.0 * z, 1.0))
    state["runs"] = state["runs"] + 1
    state["mean"] = 0.9 * state["mean"] + 0.1 * z.mean()


@pytest.mark.parametrize(
    "options",
    [
        {"num_particles": 1},
        {"num_particles": 3},
        {"num_particles": 5, "chunk_size": 2},
        {"num_particles": 3, "num_replicates": 2, "vectorize_particles": False},
    ],
    ids=str,
)
def test_mutable_state_is_averaged_over_particles(options):
    svi = svi_of(IWAE(**options), guide=counting_guide)
    state = svi.init(random.key(0), X)
    # The first run of the guide, which creates the state, is that of init.
    before = jax.tree.map(jnp.asarray, state.mutable_state["state"])
    after, _ = quickly(svi.update)(state, X)
    mutable = after.mutable_state["state"]
    assert mutable["runs"] == before["runs"] + 1  # not a float: no mean, and no sum over particles
    fraction = (mutable["mean"] - 0.9 * before["mean"]) / 0.1
    runs = options["num_particles"] * options.get("num_replicates", 1)
    np.testing.assert_allclose(fraction * 4 * runs, np.round(fraction * 4 * runs), atol=1e-9)
    assert jax.tree.map(jnp.result_type, mutable) == jax.tree.map(jnp.result_type, before)


class Normalised(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(1)(linen.BatchNorm(use_running_average=False)(x))[:, 0]


@pytest.mark.parametrize("chunk_size", [None, 2], ids=["whole", "chunked"])
def test_batch_normalisation_of_flax(chunk_size):
    """The statistics that a module keeps move with the data, in every step."""

    def guide(x):
        shape = {"input_shape": (len(x), 1)}
        network = flax_module("network", Normalised(), mutable=["batch_stats"], **shape)
        with plate("data", len(x)):
            z = sample("z", dist.Bernoulli(logits=network(x[:, None])))
            sample("y", dist.Normal(1.0 * z, 1.0))

    svi = svi_of(VIMCO(3, chunk_size=chunk_size), guide=guide)
    result = svi.run(random.key(0), 3, X, progress_bar=False)
    statistics = result.state.mutable_state["network$state"]["batch_stats"]["BatchNorm_0"]
    # flax: mean <- 0.99 mean + 0.01 x.mean(), in init and in three steps.
    expected = X.mean() * (1 - 0.99**4)
    np.testing.assert_allclose(statistics["mean"], expected, rtol=1e-5)


def test_network_of_nnx():
    network = nnx.Linear(1, 1, rngs=nnx.Rngs(0))

    def guide(x):
        apply = nnx_module("network", network)
        with plate("data", len(x)):
            z = sample("z", dist.Bernoulli(logits=apply(x[:, None])[:, 0]))
            sample("y", dist.Normal(1.0 * z, 1.0))

    result = svi_of(OVIS(3), guide=guide).run(random.key(0), 3, X, progress_bar=False)
    assert np.isfinite(result.losses).all()
    change = result.params["network$params"]["kernel"] - network.kernel[...]
    assert jnp.abs(change).max() > 0
