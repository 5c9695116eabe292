"""Models and guides small enough to enumerate: once as programs, once as NumPy densities.

A program is written against ``ppl``, the handful of primitives whose signatures the hosts share
(``backends.py``), so that both hosts run the same lines. Its densities repeat it in NumPy.

States hold the discrete values by site name; for a reparameterised site they hold the noise,
which takes two points instead of a Gaussian's continuum (value = mean + noise * deviation).
"""

from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from tests.oracles.enumeration import (
    Densities,
    Problem,
    log_bernoulli,
    log_categorical,
    log_normal,
)


class Program(NamedTuple):
    """A model and a guide, and what the oracle needs to enumerate them."""

    model: Callable[..., None]
    guide: Callable[..., None]
    problem: Problem
    noise_sites: tuple[str, ...] = ()
    subsampled_plate: str | None = None
    full_problem: Problem | None = None
    """The problem on all data, if ``problem`` is on random subsamples of them."""


def states_of(**values) -> list[dict[str, Any]]:
    """The product of the values that each site can take."""
    return [dict(zip(values, state, strict=True)) for state in product(*values.values())]


def bits(size: int) -> list[np.ndarray]:
    """Every vector of ``size`` bits."""
    return [np.array(state) for state in product([0, 1], repeat=size)]


NOISE = (-0.7, 1.3)
LOG_NOISE = -np.log(2)


def _densities(log_p, log_q, log_score=None, log_drawn=None) -> Densities:
    return Densities(log_p, log_q, log_q if log_score is None else log_score, log_drawn)


# --- one categorical site ------------------------------------------------------------------------

CATEGORICAL = {
    "prior": np.array([0.4, -0.2, 0.1]),
    "emission": np.array([[0.3, -1.0], [0.8, 0.2], [-0.6, 0.5]]),
    "logits": np.array([0.2, -0.4, 0.7]),
}


def categorical() -> Program:
    """Three states; parameters in the prior, the likelihood and the guide."""

    def model(ppl):
        prior = ppl.param("prior", CATEGORICAL["prior"])
        emission = ppl.param("emission", CATEGORICAL["emission"])
        z = ppl.sample("z", ppl.Categorical(logits=prior))
        ppl.sample("x", ppl.Categorical(logits=emission[z]), obs=ppl.array(1))

    def guide(ppl):
        ppl.sample("z", ppl.Categorical(logits=ppl.param("logits", CATEGORICAL["logits"])))

    def densities(params, state, subsample):
        z = state["z"]
        log_p = log_categorical(params["prior"], z) + log_categorical(params["emission"][z], 1)
        return _densities(log_p, log_categorical(params["logits"], z))

    return Program(model, guide, Problem(CATEGORICAL, states_of(z=range(3)), densities))


def one_bit() -> Program:
    """A single bit: many particles, few tuples."""
    params = {"weight": np.array(0.8), "logit": np.array(-0.4)}

    def model(ppl):
        z = ppl.sample("z", ppl.Bernoulli(logits=ppl.param("weight", params["weight"])))
        ppl.sample("x", ppl.Normal(1.0 * z, 0.7), obs=ppl.array(0.9))

    def guide(ppl):
        ppl.sample("z", ppl.Bernoulli(logits=ppl.param("logit", params["logit"])))

    def densities(params, state, subsample):
        z = state["z"]
        log_p = log_bernoulli(params["weight"], z) + log_normal(0.9, z, 0.7)
        return _densities(log_p, log_bernoulli(params["logit"], z))

    return Program(model, guide, Problem(params, states_of(z=(0, 1)), densities))


def bit_vector() -> Program:
    """One site of two bits, which the model ties together and the guide can't."""
    params = {"coupling": np.array(1.5), "logits": np.array([0.7, -1.1])}

    def model(ppl):
        z = ppl.sample("z", ppl.Bernoulli(logits=ppl.array(np.array([0.3, -0.2]))).to_event(1))
        coupling = ppl.param("coupling", params["coupling"])
        ppl.sample("x", ppl.Normal(z[..., 0] - coupling * z[..., 1], 0.7), obs=ppl.array(0.9))

    def guide(ppl):
        logits = ppl.param("logits", params["logits"])
        ppl.sample("z", ppl.Bernoulli(logits=logits).to_event(1))

    def densities(params, state, subsample):
        z = state["z"]
        log_p = log_bernoulli(np.array([0.3, -0.2]), z).sum()
        log_p = log_p + log_normal(0.9, z[0] - params["coupling"] * z[1], 0.7)
        return _densities(log_p, log_bernoulli(params["logits"], z).sum())

    return Program(model, guide, Problem(params, states_of(z=bits(2)), densities))


def dreaming() -> Program:
    """A guide that looks at the observation, so that the model can dream one for it.

    A state is one of the wake phase; dreams are enumerated by ``dream_states``.
    """
    params = {
        "prior": np.array(0.6),
        "emission": np.array([[0.3, -1.0, 0.2], [0.8, 0.2, -0.5]]),
        "logits": np.array([0.4, -0.9, 0.2]),
    }
    x = 1

    def model(ppl, x):
        emission = ppl.param("emission", params["emission"])
        z = ppl.sample("z", ppl.Bernoulli(logits=ppl.param("prior", params["prior"])))
        ppl.sample("x", ppl.Categorical(logits=ppl.choose(emission, z)), obs=x)

    def guide(ppl, x):
        logits = ppl.param("logits", params["logits"])
        ppl.sample("z", ppl.Bernoulli(logits=logits[x]))

    def densities(params, state, subsample):
        z = state["z"]
        log_p = log_bernoulli(params["prior"], z) + log_categorical(params["emission"][z], x)
        return _densities(log_p, log_bernoulli(params["logits"][x], z))

    return Program(model, guide, Problem(params, states_of(z=(0, 1)), densities))


def dream_states() -> list[dict[str, Any]]:
    """All that the model of ``dreaming`` can dream."""
    return states_of(z=(0, 1), x=(0, 1, 2))


def log_p_of_dream(params, dream):
    log_p_x = log_categorical(params["emission"][dream["z"]], dream["x"])
    return log_bernoulli(params["prior"], dream["z"]) + log_p_x


def log_q_of_dream(params, dream):
    return log_bernoulli(params["logits"][dream["x"]], dream["z"])


def impossible_state() -> Program:
    """The model gives one of three states, which the guide proposes, no probability."""
    params = {"shift": np.array(0.3), "logits": np.array([0.2, -0.4, 0.7])}
    table = np.array([-0.5, -np.inf, 0.4])

    def model(ppl):
        shift = ppl.param("shift", params["shift"])
        z = ppl.sample("z", ppl.Categorical(logits=ppl.array(np.zeros(3))))
        ppl.factor("likelihood", ppl.array(table)[z] + shift * z)

    def guide(ppl):
        ppl.sample("z", ppl.Categorical(logits=ppl.param("logits", params["logits"])))

    def densities(params, state, subsample):
        z = state["z"]
        log_p = -np.log(3) + table[z] + params["shift"] * z
        return _densities(log_p, log_categorical(params["logits"], z))

    return Program(model, guide, Problem(params, states_of(z=range(3)), densities))


# --- discrete and reparameterised sites together -------------------------------------------------


def reparameterised() -> Program:
    """No discrete site: nothing is left to the learning signal."""
    params = {"weight": np.array(0.8), "loc": np.array(0.3), "log_scale": np.array(-0.2)}

    def model(ppl):
        y = ppl.sample("y", ppl.Normal(ppl.array(0.0), 1.0))
        weight = ppl.param("weight", params["weight"])
        ppl.sample("x", ppl.Normal(weight * y, 0.7), obs=ppl.array(0.9))

    def guide(ppl):
        loc, log_scale = (ppl.param(name, params[name]) for name in ("loc", "log_scale"))
        ppl.sample("y", ppl.Normal(loc, ppl.exp(log_scale)))

    def densities(params, state, subsample):
        scale = np.exp(params["log_scale"])
        y = params["loc"] + state["y"] * scale
        log_p = log_normal(y, 0.0, 1.0) + log_normal(0.9, params["weight"] * y, 0.7)
        return _densities(log_p, log_normal(y, params["loc"], scale), 0.0)

    problem = Problem(params, states_of(y=NOISE), densities, log_noise=LOG_NOISE)
    return Program(model, guide, problem, noise_sites=("y",))


def discrete_then_reparameterised(*, reparam: str = "pathwise") -> Program:
    """The guide's Gaussian has a mean that depends on its discrete site.

    With ``reparam="score"`` the Gaussian's value is a constant, and its density in the score. The
    states are drawn as before: the noise still has two points, for which the score function of a
    Gaussian is not unbiased, but what the estimator does at each tuple is defined all the same.
    """
    start = {
        "weight": np.array(0.8),
        "logit": np.array(0.4),
        "loc": np.array([0.3, -0.6]),
        "log_scale": np.array([-0.2, 0.1]),
    }

    def model(ppl):
        weight = ppl.param("weight", start["weight"])
        z = ppl.sample("z", ppl.Bernoulli(logits=ppl.array(0.5)))
        y = ppl.sample("y", ppl.Normal(1.0 * z, 1.0))
        ppl.sample("x", ppl.Normal(weight * y, 0.7), obs=ppl.array(0.9))

    def guide(ppl):
        loc, log_scale = (ppl.param(name, start[name]) for name in ("loc", "log_scale"))
        z = ppl.sample("z", ppl.Bernoulli(logits=ppl.param("logit", start["logit"])))
        ppl.sample("y", ppl.Normal(ppl.choose(loc, z), ppl.exp(ppl.choose(log_scale, z))))

    def densities(params, state, subsample):
        z = state["z"]
        scale = np.exp(params["log_scale"][z])
        path = params if reparam == "pathwise" else start
        y = path["loc"][z] + state["y"] * np.exp(path["log_scale"][z])
        log_p = (
            log_bernoulli(0.5, z)
            + log_normal(y, z, 1.0)
            + log_normal(0.9, params["weight"] * y, 0.7)
        )
        log_q_z = log_bernoulli(params["logit"], z)
        log_q = log_q_z + log_normal(y, params["loc"][z], scale)
        return _densities(log_p, log_q, log_q_z if reparam == "pathwise" else log_q, log_q_z)

    problem = Problem(start, states_of(z=(0, 1), y=NOISE), densities, log_noise=LOG_NOISE)
    return Program(model, guide, problem, noise_sites=("y",))


def discrete_then_scored() -> Program:
    return discrete_then_reparameterised(reparam="score")


def reparameterised_then_discrete() -> Program:
    """The guide's discrete site has a logit that depends on its Gaussian's value.

    The gradient of the location flows through y into log q(z | y), which the score term keeps.
    """
    params = {
        "weight": np.array(0.8),
        "loc": np.array(0.3),
        "log_scale": np.array(-0.2),
        "slope": np.array(1.2),
    }

    def model(ppl):
        weight = ppl.param("weight", params["weight"])
        y = ppl.sample("y", ppl.Normal(ppl.array(0.0), 1.0))
        z = ppl.sample("z", ppl.Bernoulli(logits=weight * y))
        ppl.sample("x", ppl.Normal(y + 1.0 * z, 0.7), obs=ppl.array(0.9))

    def guide(ppl):
        loc, log_scale = (ppl.param(name, params[name]) for name in ("loc", "log_scale"))
        y = ppl.sample("y", ppl.Normal(loc, ppl.exp(log_scale)))
        ppl.sample("z", ppl.Bernoulli(logits=ppl.param("slope", params["slope"]) * y - 0.3))

    def densities(params, state, subsample):
        z, scale = state["z"], np.exp(params["log_scale"])
        y = params["loc"] + state["y"] * scale
        log_p = (
            log_normal(y, 0.0, 1.0)
            + log_bernoulli(params["weight"] * y, z)
            + log_normal(0.9, y + z, 0.7)
        )
        log_q_z = log_bernoulli(params["slope"] * y - 0.3, z)
        return _densities(log_p, log_q_z + log_normal(y, params["loc"], scale), log_q_z)

    problem = Problem(params, states_of(y=NOISE, z=(0, 1)), densities, log_noise=LOG_NOISE)
    return Program(model, guide, problem, noise_sites=("y",))


def mixed() -> Program:
    """Discrete, then reparameterised, then discrete, each depending on all before."""
    params = {
        "weight": np.array(0.8),
        "logit": np.array(0.4),
        "loc": np.array([0.3, -0.6]),
        "slope": np.array(1.2),
    }

    def model(ppl):
        weight = ppl.param("weight", params["weight"])
        a = ppl.sample("a", ppl.Bernoulli(logits=ppl.array(0.5)))
        y = ppl.sample("y", ppl.Normal(1.0 * a, 1.0))
        b = ppl.sample("b", ppl.Bernoulli(logits=weight * y))
        ppl.sample("x", ppl.Normal(weight * y + 1.0 * b, 0.7), obs=ppl.array(0.9))

    def guide(ppl):
        a = ppl.sample("a", ppl.Bernoulli(logits=ppl.param("logit", params["logit"])))
        y = ppl.sample("y", ppl.Normal(ppl.choose(ppl.param("loc", params["loc"]), a), 0.8))
        ppl.sample("b", ppl.Bernoulli(logits=ppl.param("slope", params["slope"]) * y - 0.5 * a))

    def densities(params, state, subsample):
        a, b = state["a"], state["b"]
        y = params["loc"][a] + state["y"] * 0.8
        log_p = (
            log_bernoulli(0.5, a)
            + log_normal(y, a, 1.0)
            + log_bernoulli(params["weight"] * y, b)
            + log_normal(0.9, params["weight"] * y + b, 0.7)
        )
        log_score = log_bernoulli(params["logit"], a)
        log_score = log_score + log_bernoulli(params["slope"] * y - 0.5 * a, b)
        return _densities(log_p, log_score + log_normal(y, params["loc"][a], 0.8), log_score)

    states = states_of(a=(0, 1), y=NOISE, b=(0, 1))
    problem = Problem(params, states, densities, log_noise=LOG_NOISE)
    return Program(model, guide, problem, noise_sites=("y",))


def auxiliary_site() -> Program:
    """A guide site that the model does not have counts in log q all the same."""
    params = {"logit": np.array(0.4), "slope": np.array(1.2), "weight": np.array(0.8)}

    def model(ppl):
        z = ppl.sample("z", ppl.Bernoulli(logits=ppl.param("weight", params["weight"])))
        ppl.sample("x", ppl.Normal(1.0 * z, 0.7), obs=ppl.array(0.9))

    def guide(ppl):
        a = ppl.sample(
            "a",
            ppl.Bernoulli(logits=ppl.param("logit", params["logit"])),
            infer={"is_auxiliary": True},
        )
        ppl.sample("z", ppl.Bernoulli(logits=ppl.param("slope", params["slope"]) * a - 0.3))

    def densities(params, state, subsample):
        a, z = state["a"], state["z"]
        log_p = log_bernoulli(params["weight"], z) + log_normal(0.9, z, 0.7)
        log_q = log_bernoulli(params["logit"], a) + log_bernoulli(params["slope"] * a - 0.3, z)
        return _densities(log_p, log_q)

    return Program(model, guide, Problem(params, states_of(a=(0, 1), z=(0, 1)), densities))


# --- plates --------------------------------------------------------------------------------------

PLATE = {"weight": np.array(0.8), "logits": np.array([0.4, -0.9])}
X = np.array([0.9, -0.4])


def _plate_densities(
    params, state, *, model_scale=1.0, q_scale=1.0, x_scale=1.0, score_scale=1.0
) -> Densities:
    """z_i ~ Bernoulli in the model and the guide, x_i ~ Normal around it; scales per site."""
    z = state["z"]
    log_q = log_bernoulli(params["logits"], z)
    log_p = model_scale * log_bernoulli(params["weight"], z) + x_scale * log_normal(X, z, 0.7)
    return _densities(log_p, q_scale * log_q, score_scale * log_q, np.sum(log_q))


def _plate_program(densities, *, scale=1.0, whole=None, latent=None, observed=None) -> Program:
    """Two data in a plate, with a handler around everything, the latent or the observed sites."""

    def model(ppl):
        weight = ppl.param("weight", PLATE["weight"])
        with ppl.plate("data", 2, dim=-1), ppl.using(whole):
            with ppl.using(latent):
                z = ppl.sample("z", ppl.Bernoulli(logits=weight))
            with ppl.using(observed):
                ppl.sample("x", ppl.Normal(1.0 * z, 0.7), obs=ppl.array(X))

    def guide(ppl):
        logits = ppl.param("logits", PLATE["logits"])
        with ppl.plate("data", 2, dim=-1), ppl.using(whole), ppl.using(latent):
            ppl.sample("z", ppl.Bernoulli(logits=logits))

    problem = Problem(
        PLATE,
        states_of(z=bits(2)),
        lambda params, state, subsample: densities(params, state),
        batch_shape=(2,),
        scale=scale,
    )
    return Program(model, guide, problem)


def plate() -> Program:
    """Each element of a plate common to all sites has weights of its own."""
    return _plate_program(_plate_densities)


def scaled() -> Program:
    """One scale around every site multiplies the bound, not the log-weights."""
    return _plate_program(_plate_densities, scale=2.5, whole=("scale", 2.5))


def scaled_per_element() -> Program:
    """A scale per element, common to every site, multiplies each element's bound."""
    scale = np.array([2.5, 0.5])
    return _plate_program(_plate_densities, scale=scale, whole=("scale", scale))


def tempered_likelihood() -> Program:
    """A scale on the likelihood alone multiplies its log-probability."""

    def densities(params, state):
        return _plate_densities(params, state, x_scale=0.3)

    return _plate_program(densities, observed=("scale", 0.3))


def annealed_latents() -> Program:
    """A scale on the latents alone ("KL annealing") weighs their log-probabilities.

    The latents are still drawn from the guide as it is: the score is not scaled.
    """

    def densities(params, state):
        return _plate_densities(params, state, model_scale=0.3, q_scale=0.3)

    return _plate_program(densities, latent=("scale", 0.3))


def masked() -> Program:
    """A masked element has a bound of zero and no gradient."""
    mask = np.array([True, False])

    def densities(params, state):
        return _plate_densities(
            params, state, model_scale=mask, q_scale=mask, x_scale=mask, score_scale=mask
        )

    return _plate_program(densities, whole=("mask", mask))


def masked_observation() -> Program:
    """A masked observation leaves the element's latent with its prior only."""
    mask = np.array([True, False])

    def densities(params, state):
        return _plate_densities(params, state, x_scale=mask)

    return _plate_program(densities, observed=("mask", mask))


def nested_plates() -> Program:
    """Latents in the outer plate, three observations each in the inner: one weight per latent."""
    x = np.array([[0.9, -0.4, 0.1], [0.3, 1.2, 0.8]])

    def model(ppl):
        weight = ppl.param("weight", PLATE["weight"])
        with ppl.plate("outer", 2, dim=-2):
            z = ppl.sample("z", ppl.Bernoulli(logits=weight))
            with ppl.plate("inner", 3, dim=-1):
                ppl.sample("x", ppl.Normal(1.0 * z, 0.7), obs=ppl.array(x))

    def guide(ppl):
        logits = ppl.param("logits", PLATE["logits"])
        with ppl.plate("outer", 2, dim=-2):
            ppl.sample("z", ppl.Bernoulli(logits=logits[:, None]))

    def densities(params, state, subsample):
        z = state["z"]
        log_p = log_bernoulli(params["weight"], z)
        log_p = log_p + log_normal(x, z[:, None], 0.7).sum(axis=1)
        return _densities(log_p, log_bernoulli(params["logits"], z))

    return Program(model, guide, Problem(PLATE, states_of(z=bits(2)), densities, batch_shape=(2,)))


def sequential_plate() -> Program:
    """Pyro's plate as a loop: every turn has a weight of its own."""

    def model(ppl):
        weight = ppl.param("weight", PLATE["weight"])
        for i in ppl.plate("data", 2):
            z = ppl.sample(f"z_{i}", ppl.Bernoulli(logits=weight))
            ppl.sample(f"x_{i}", ppl.Normal(1.0 * z, 0.7), obs=ppl.array(X)[i])

    def guide(ppl):
        logits = ppl.param("logits", PLATE["logits"])
        for i in ppl.plate("data", 2):
            ppl.sample(f"z_{i}", ppl.Bernoulli(logits=logits[i]))

    def densities(params, state, subsample):
        return _plate_densities(params, {"z": np.array([state["z_0"], state["z_1"]])})

    states = states_of(z_0=(0, 1), z_1=(0, 1))
    return Program(model, guide, Problem(PLATE, states, densities, batch_shape=(2,)))


def global_and_local() -> Program:
    """A latent outside of the plate ties its elements together: one weight for all."""
    params = PLATE | {"global_logit": np.array(0.3)}

    def model(ppl):
        weight = ppl.param("weight", params["weight"])
        g = ppl.sample("g", ppl.Bernoulli(logits=ppl.array(0.5)))
        with ppl.plate("data", 2, dim=-1):
            z = ppl.sample("z", ppl.Bernoulli(logits=weight * g))
            ppl.sample("x", ppl.Normal(1.0 * z, 0.7), obs=ppl.array(X))

    def guide(ppl):
        logits = ppl.param("logits", params["logits"])
        ppl.sample("g", ppl.Bernoulli(logits=ppl.param("global_logit", params["global_logit"])))
        with ppl.plate("data", 2, dim=-1):
            ppl.sample("z", ppl.Bernoulli(logits=logits))

    def densities(params, state, subsample):
        g, z = state["g"], state["z"]
        log_p = log_bernoulli(0.5, g) + np.sum(
            log_bernoulli(params["weight"] * g, z) + log_normal(X, z, 0.7)
        )
        log_q = log_bernoulli(params["global_logit"], g)
        return _densities(log_p, log_q + np.sum(log_bernoulli(params["logits"], z)))

    return Program(model, guide, Problem(params, states_of(g=(0, 1), z=bits(2)), densities))


def subsampled_plate() -> Program:
    """Two of three data at a time: N/B multiplies the bound."""
    params = {"weight": np.array(0.8), "logits": np.array([0.4, -0.9, 0.2])}
    x = np.array([0.9, -0.4, 0.3])

    def model(ppl):
        weight = ppl.param("weight", params["weight"])
        with ppl.plate("data", 3, subsample_size=2, dim=-1) as index:
            z = ppl.sample("z", ppl.Bernoulli(logits=weight))
            ppl.sample("x", ppl.Normal(1.0 * z, 0.7), obs=ppl.array(x)[index])

    def guide(ppl):
        logits = ppl.param("logits", params["logits"])
        with ppl.plate("data", 3, subsample_size=2, dim=-1) as index:
            ppl.sample("z", ppl.Bernoulli(logits=logits[index]))

    def densities(params, state, subsample):
        z = state["z"]
        log_p = log_bernoulli(params["weight"], z) + log_normal(x[subsample], z, 0.7)
        return _densities(log_p, log_bernoulli(params["logits"][subsample], z))

    everything = np.arange(3)
    problem = Problem(
        params,
        states_of(z=bits(2)),
        densities,
        batch_shape=(2,),
        scale=3 / 2,
        subsamples=[np.delete(everything, i) for i in everything],
    )
    full = Problem(
        params, states_of(z=bits(3)), densities, batch_shape=(3,), subsamples=[everything]
    )
    return Program(model, guide, problem, subsampled_plate="data", full_problem=full)
