"""An estimator for each guide site: the gradient of a mixture of them, and what is refused.

Expectations are by quadrature and enumeration together, as in ``test_dreg``; where sites have no
parameters in common, each has to get, draw by draw, what the objective of that estimator gives it.
"""

from functools import cache, partial

import numpy as np
import pytest

from tests.conformance.backends import backend_for
from tests.conformance.objectives import assert_equal
from tests.conformance.programs import Program, mixed, one_bit
from tests.conformance.replay import Prescription, draws, evaluations
from tests.conformance.test_dreg import (
    TWO_LAYERS,
    gaussian,
    in_plate,
    nodes,
    quadrature,
    split,
    two_layers,
)
from tests.oracles import multisample as oracle
from tests.oracles.enumeration import (
    Problem,
    complex_step_gradient,
    log_bernoulli,
    log_mean_exp,
    log_normal,
)


def configured(host, program, config):
    """The program with these estimators at the sites of its guide; ``None`` leaves it alone."""
    if config is None:
        return program
    package = backend_for(host).package
    return program._replace(guide=package.configure_estimators(program.guide, config))


# --- four kinds of sites in one guide ------------------------------------------------------------

FOUR = {
    "weight": np.array(0.7),
    "logit": np.array(0.3),
    "loc": np.array([0.2, -0.3]),
    "log_scale": np.array(-0.2),
    "slope": np.array(0.6),
    "log_width": np.array(-0.3),
    "tilt": np.array(0.8),
}
NUM_PARTICLES, NUM_NODES = 2, 10


def four_densities(params, a, noise_y, noise_u, b):
    """Draws from noise; log p; and log q of each site, for the noise its standard density."""
    y = np.where(a, params["loc"][1], params["loc"][0]) + np.exp(params["log_scale"]) * noise_y
    u = params["slope"] * y + np.exp(params["log_width"]) * noise_u
    log_p = log_bernoulli(0.5, a) + log_normal(y, 0.5 * a, 1.0)
    log_p = log_p + log_normal(u, params["weight"] * y, 0.8) + log_bernoulli(0.4 * u, b)
    log_p = log_p + log_normal(0.6, u + 0.3 * y + 0.8 * b, 1.5)
    log_q_a = log_bernoulli(params["logit"], a)
    log_q_b = log_bernoulli(params["tilt"] * u - 0.5 * a, b)
    log_q_y = log_normal(noise_y, 0.0, 1.0) - params["log_scale"]
    log_q_u = log_normal(noise_u, 0.0, 1.0) - params["log_width"]
    return log_p - log_q_a - log_q_y - log_q_u - log_q_b, log_q_a + log_q_b


def four_states():
    """One particle's states, and the probability of their noise."""
    points, weights = nodes(NUM_NODES)
    index = np.arange(NUM_NODES)
    a, y, u, b = (axis.ravel() for axis in np.meshgrid([0, 1], index, index, [0, 1], indexing="ij"))
    return {"a": a, "y": points[y], "u": points[u], "b": b}, weights[y] * weights[u]


def four_kinds():
    def make(num_tuples, weights):
        def model(ppl):
            weight = ppl.param("weight", FOUR["weight"])
            a = ppl.sample("a", ppl.Bernoulli(logits=ppl.array(0.5)))
            y = ppl.sample("y", ppl.Normal(0.5 * a, 1.0))
            u = ppl.sample("u", ppl.Normal(weight * y, 0.8))
            b = ppl.sample("b", ppl.Bernoulli(logits=0.4 * u))
            x = ppl.array(np.full(num_tuples, 0.6))
            ppl.sample("x", ppl.Normal(u + 0.3 * y + 0.8 * b, 1.5), obs=x)

        def guide(ppl):
            logit, loc, log_scale, slope, log_width, tilt = (
                ppl.param(name, FOUR[name])
                for name in ("logit", "loc", "log_scale", "slope", "log_width", "tilt")
            )
            a = ppl.sample("a", ppl.Bernoulli(logits=logit))
            y = ppl.sample("y", ppl.Normal(ppl.choose(loc, a), ppl.exp(log_scale)))
            u = ppl.sample("u", ppl.Normal(slope * y, ppl.exp(log_width)))
            ppl.sample("b", ppl.Bernoulli(logits=tilt * u - 0.5 * a))

        return (in_plate(num_tuples, weights, program) for program in (model, guide))

    states, of_noise = four_states()
    _, log_drawn = four_densities(FOUR, *states.values())
    return quadrature(make, FOUR, states, of_noise * np.exp(log_drawn), ("y", "u"), NUM_PARTICLES)


@cache
def exact_four():
    """The gradient of the expected bound, from its equation."""
    states, of_noise = four_states()
    tuples = np.indices((len(of_noise),) * NUM_PARTICLES).reshape(NUM_PARTICLES, -1)

    def expected(params):
        log_weights, log_drawn = four_densities(params, *states.values())
        bound = log_mean_exp(log_weights[tuples])
        return np.sum(np.prod((of_noise * np.exp(log_drawn))[tuples], axis=0) * bound)

    return split(complex_step_gradient(expected, FOUR)[None], FOUR)


def test_a_guide_with_an_estimator_for_each_site_is_unbiased(backend):
    """A bit by VIMCO, a Gaussian by DReG, one by the score function, and a bit by that alone."""
    program, prescription = four_kinds()
    config = {
        "a": backend.estimators.vimco_learning_signal,
        "y": "dreg",
        "u": "score",
        "b": lambda log_weights: backend.estimators.reinforce_learning_signal(log_weights),
    }
    gradient = evaluations(
        backend.host,
        partial(backend.package.OVIS, NUM_PARTICLES),
        configured(backend.host, program, config),
        prescription,
    ).gradients
    actual = split(gradient, FOUR)
    for param, desired in exact_four().items():
        # To the error of the quadrature.
        np.testing.assert_allclose(actual[param], desired, rtol=0, atol=1e-4, err_msg=param)
        assert np.abs(desired).min() > 3e-3  # not the agreement of two zeros


# --- pathwise, dreg and stl together, at each draw -----------------------------------------------


def layers_by_hand(noise, kinds):
    """The gradient as it is defined, of one K-tuple of noise ``[K]`` per site.

    A path starts at the draw of one site, whose parameters are moved alone.
    """

    def drawn(of_y, of_u):
        y = of_y["loc"] + np.exp(of_y["log_scale"]) * noise["y"]
        return y, of_u["slope"] * y + np.exp(of_u["log_width"] + 0.1 * y) * noise["u"]

    def log_p(params, y, u):
        log_p = log_normal(y, 0.0, 1.0) + log_normal(u, params["weight"] * y, 0.8)
        return log_p + log_normal(0.6, u + 0.3 * y, 1.5)

    def log_q(params, y, u):
        log_q_y = log_normal(y, params["loc"], np.exp(params["log_scale"]))
        return log_q_y, log_normal(u, params["slope"] * y, np.exp(params["log_width"] + 0.1 * y))

    def log_weights(y, u):
        return log_p(start, y, u) - sum(log_q(start, y, u))

    start = TWO_LAYERS
    here = drawn(start, start)
    v = oracle.normalized_weights(log_weights(*here))
    gradient = complex_step_gradient(lambda params: log_p(params, *here), start) @ v
    for site, kind in enumerate(kinds):
        moved = {0: lambda params: drawn(params, start), 1: lambda params: drawn(start, params)}
        along = complex_step_gradient(
            lambda params, move=moved[site]: log_weights(*move(params)), start
        )
        gradient = gradient + along @ (v**2 if kind == "dreg" else v)
        if kind == "pathwise":
            of_density = complex_step_gradient(
                lambda params, site=site: log_q(params, *here)[site], start
            )
            gradient = gradient - of_density @ v
    return gradient


LAYERS = [
    ("pathwise", "dreg", "pathwise", "vmap"),
    ("dreg", "pathwise", "pathwise", "loop"),
    ("stl", "dreg", "pathwise", "vmap"),
    ("pathwise", "stl", "dreg", "vmap"),
]


@pytest.mark.parametrize(("y", "u", "reparam", "particles"), LAYERS)
def test_gradient_along_the_path_at_each_draw(backend, y, u, reparam, particles):
    """The first layer reaches the second's value and density, whatever each is estimated by."""
    rng = np.random.default_rng(0)
    noise = {site: rng.normal(size=(3, 3, 1)) for site in ("y", "u")}  # 3 tuples of 3 particles
    # Twice, as Pyro may have to run the guide again.
    twice = {site: np.tile(value, (1, 2, 1)) for site, value in noise.items()}
    actual = evaluations(
        backend.host,
        partial(backend.package.IWAE, 3, reparam=reparam),
        configured(backend.host, two_layers(1, 1).program, {"y": y, "u": u}),
        Prescription(twice, ("y", "u")),
        particles=particles,
    )
    for t, gradient in enumerate(actual.gradients):
        one = {site: value[t, :, 0] for site, value in noise.items()}
        assert_equal(gradient, layers_by_hand(one, (y, u)))


# --- learning signals ----------------------------------------------------------------------------

TWO_BITS = {
    "weight": np.array(0.8),
    "logit": np.array(0.4),
    "slope": np.array([0.9, -0.6]),
}


def two_bits() -> Program:
    """The second bit depends on the first; each has parameters of its own."""

    def model(ppl):
        weight = ppl.param("weight", TWO_BITS["weight"])
        a = ppl.sample("a", ppl.Bernoulli(logits=ppl.array(0.5)))
        b = ppl.sample("b", ppl.Bernoulli(logits=weight * a))
        ppl.sample("x", ppl.Normal(weight * a + b, 1.5), obs=ppl.array(0.6))

    def guide(ppl):
        a = ppl.sample("a", ppl.Bernoulli(logits=ppl.param("logit", TWO_BITS["logit"])))
        slope = ppl.param("slope", TWO_BITS["slope"])
        ppl.sample("b", ppl.Bernoulli(logits=ppl.choose(slope, a)))

    return Program(model, guide, Problem(TWO_BITS, [], None))


def gradients(backend, loss, program, num_seeds=3):
    return draws(backend.host, loss, program, num_seeds)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_each_site_gets_the_signal_it_asks_for(backend, chunk_size):
    package, estimators = backend.package, backend.estimators
    half = partial(estimators.ovis_gamma_learning_signal, gamma=0.5)
    program = configured(
        backend.host, two_bits(), {"a": estimators.vimco_learning_signal, "b": half}
    )
    actual = gradients(backend, package.IWAE(3, chunk_size=chunk_size), program)
    a, b, all_ = (
        split(gradients(backend, loss, two_bits()), TWO_BITS)
        for loss in (package.VIMCO(3), package.OVIS(3, gamma=0.5), package.IWAE(3))
    )
    desired = [all_["weight"], a["logit"], b["slope"]]
    assert_equal(actual, np.concatenate(desired, axis=1))
    assert np.abs(a["logit"] - b["logit"]).max() > 1e-2


def test_a_signal_of_ones_own_made_anew_at_each_run(backend):
    """Also where the guide itself makes it, so that it is another function for each particle."""
    level = 0.7

    def guide(ppl):
        def signal(log_weights):
            return log_weights * 0.0 + level

        estimator = {"infer": {"estimator": signal}}
        ppl.sample("a", ppl.Bernoulli(logits=ppl.param("logit", TWO_BITS["logit"])), **estimator)
        slope = ppl.param("slope", TWO_BITS["slope"])
        ppl.sample("b", ppl.Bernoulli(logits=slope[0]), **estimator)

    program = two_bits()._replace(guide=guide)
    actual = split(gradients(backend, backend.package.IWAE(2, num_replicates=1), program), TWO_BITS)
    # Each particle adds the score of its draw, 1 - p or -p.
    for param, site in (("logit", None), ("slope", 0)):
        value = TWO_BITS[param] if site is None else TWO_BITS[param][site]
        p = 1 / (1 + np.exp(-value))
        possible = level * np.array([-2 * p, 1 - 2 * p, 2 - 2 * p])
        distance = np.abs(actual[param][:, :1] - possible).min(axis=1)
        assert_equal(distance, 0.0)


# --- the same for all sites ----------------------------------------------------------------------

SAME = [
    ("OVIS", "pathwise", ["y"], {}),
    ("OVIS", "dreg", ["y"], {}),
    ("IWAE", "stl", ["y"], {}),
    ("VIMCO", "score", None, {}),
    ("RLOO", "dreg", ["y"], {}),
    ("ReweightedWakeSleep", "dreg", ["y"], {}),
    ("IWAE", "dreg", ["y"], {"num_replicates": 2, "pool_replicates": True}),
]


@pytest.mark.parametrize(("name", "reparam", "sites", "options"), SAME)
def test_all_sites_alike_is_the_option_of_the_loss(backend, name, reparam, sites, options):
    """To the last bit."""
    loss = getattr(backend.package, name)
    program = mixed()
    sites = sites or [site for site in program.problem.states[0] if site != "x"]
    by_site = configured(backend.host, program, dict.fromkeys(sites, reparam))
    actual = gradients(backend, loss(3, **options), by_site, 2)
    desired = gradients(backend, loss(3, reparam=reparam, **options), program, 2)
    np.testing.assert_array_equal(actual, desired)


@pytest.mark.parametrize("signal", ["vimco", "score"])
def test_all_signals_alike_are_the_loss_with_that_signal(backend, signal):
    package = backend.package
    estimator = {"vimco": backend.estimators.vimco_learning_signal, "score": "score"}[signal]
    by_site = configured(backend.host, two_bits(), {"a": estimator, "b": estimator})
    whole = {"vimco": package.VIMCO(3), "score": package.OVIS(3)}[signal]
    other = {"vimco": package.IWAE(3), "score": package.OVIS(3)}[signal]
    desired = gradients(backend, whole, two_bits())
    np.testing.assert_array_equal(gradients(backend, other, by_site), desired)


# --- what is refused -----------------------------------------------------------------------------


def observed_in_guide(ppl):
    ppl.sample("z", ppl.Bernoulli(logits=ppl.param("logit", np.array(-0.4))))
    ppl.sample(
        "w", ppl.Normal(ppl.array(0.0), 1.0), obs=ppl.array(0.3), infer={"estimator": "score"}
    )


REFUSED = [
    ("IWAE", one_bit, {"z": "pathwise"}, r"'z'.*\"pathwise\".*Bernoulli.*Use \"score\""),
    ("IWAE", one_bit, {"z": "dreg"}, r"'z'.*\"dreg\".*Bernoulli.*vimco_learning_signal"),
    ("TVO", lambda: gaussian(1, 1).program, {"y": "dreg"}, r"'y'.*'dreg'.*TVO can't.*\"score\""),
    ("ReweightedWakeSleep", lambda: gaussian(1, 1).program, {"y": "stl"}, r"'stl'.*\"dreg\""),
    ("RLOO", one_bit, {"z": "vimco_learning_signal"}, r"vimco_learning_signal.*RLOO is for the E"),
    ("TVO", one_bit, {"z": "vimco_learning_signal"}, r"TVO is for the thermodynamic objective"),
    ("IWAE", one_bit, {"z": "wake_phi_learning_signal"}, r"is for wake-phi.*write a function"),
    ("IWAE", one_bit, {"z": "nvil_learning_signal"}, r"needs more than.*Pass SVI NVIL"),
    ("IWAE", one_bit, lambda site: "dregs" if site["name"] == "z" else None, r"'dregs'.*\"dreg\""),
]


@pytest.mark.parametrize(("name", "make", "config", "message"), REFUSED)
def test_what_a_loss_or_site_cannot_have_is_refused(backend, name, make, config, message):
    if isinstance(config, dict):
        config = {
            site: getattr(backend.estimators, estimator, estimator)
            for site, estimator in config.items()
        }
    program = configured(backend.host, make(), config)
    with pytest.raises(ValueError, match=message):
        gradients(backend, getattr(backend.package, name)(2), program, 1)


def test_a_config_is_refused_at_once(backend):
    configure = backend.package.configure_estimators
    guide = one_bit().guide
    with pytest.raises(ValueError, match=r"'z' has the estimator 'dregs'. There are \"pathwise\""):
        configure(guide, {"z": "dregs"})
    with pytest.raises(TypeError, match=r"'z' needs as its estimator one of.*It has 3"):
        configure(guide, {"z": 3})
    with pytest.raises(TypeError, match=r"needs config=.*options of the loss"):
        configure(guide, "dreg")
    with pytest.raises(TypeError, match=r"function from sites to estimators"):
        configure(guide, backend.estimators.vimco_learning_signal)


def test_unknown_and_observed_sites_are_refused(backend):
    loss, program = backend.package.IWAE(2), one_bit()
    with pytest.raises(ValueError, match=r"for the sites \['y'\].*has only \['z'\]"):
        gradients(backend, loss, configured(backend.host, program, {"y": "score"}), 1)
    observed = program._replace(guide=observed_in_guide)
    with pytest.raises(ValueError, match="'w' is observed and draws nothing"):
        gradients(backend, loss, observed, 1)
    with pytest.raises(ValueError, match="'w', which is observed"):
        gradients(backend, loss, configured(backend.host, observed, {"w": "score"}), 1)


def test_a_signal_of_the_wrong_shape_is_refused(backend):
    program = configured(backend.host, one_bit(), {"z": lambda log_weights: log_weights[0]})
    with pytest.raises(ValueError, match=r"signal of guide site 'z'.*shape \(2, 1\).*\(1,\)"):
        gradients(backend, backend.package.IWAE(2), program, 1)


def test_an_estimator_of_values_needs_its_handler(backend):
    estimator = {"infer": {"estimator": backend.package.IMLE()}}

    def guide(ppl):
        ppl.sample("z", ppl.Bernoulli(logits=ppl.param("logit", np.array(-0.4))), **estimator)

    program = one_bit()._replace(guide=guide)
    loss = backend.package.IWAE(2)
    with pytest.raises(ValueError, match=r"'z' \(Bernoulli.*no handler.*imle\(guide\)"):
        gradients(backend, loss, program, 1)
    by_imle = gradients(backend, loss, program._replace(guide=backend.package.imle(guide)), 2)
    plain = one_bit()
    named = plain._replace(guide=backend.package.imle(plain.guide, {"z": backend.package.IMLE()}))
    np.testing.assert_array_equal(by_imle, gradients(backend, loss, named, 2))
    by_config = configured(backend.host, plain, {"z": backend.package.IMLE()})
    np.testing.assert_array_equal(by_imle, gradients(backend, loss, by_config, 2))
