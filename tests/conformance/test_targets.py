"""What gradients are said to be estimates of, and what they are measured against.

Also where the guide's sites choose their estimators for themselves, as ``test_gradient_statistics``
does for the options of the loss.
"""

import importlib
from functools import partial

import numpy as np
import pytest

from tests.conformance.objectives import assert_equal, program_for
from tests.conformance.replay import NumPyroPrimitives, PyroPrimitives
from tests.conformance.test_gradient_statistics import flat, module, statistics
from tests.oracles import enumeration


def guide_sites(backend, program):
    """The guide's sites, where its parameters start."""
    infer = f"{backend.host}_gradest.infer"
    sites = importlib.import_module(f"{infer}._trace").guide_sites
    if backend.host == "pyro":
        import pyro

        pyro.clear_param_store()
        return sites(partial(program.guide, PyroPrimitives()), (), {})
    import jax

    estimators = importlib.import_module(f"{infer}._site_estimators").SiteEstimators("score")
    guide = partial(program.guide, NumPyroPrimitives())
    ran = importlib.import_module(f"{infer}._trace").Program(
        None, guide, {}, (), {}, estimators, is_weighted=False
    )
    return sites(ran, jax.random.key(0))


def target(backend, loss, program):
    return module(backend, "_targets").target_of(loss, guide_sites(backend, program))


def by_imle(backend, program, config):
    return program._replace(guide=backend.package.imle(program.guide, config))


def chosen(backend, program, **config):
    """The program with these estimators at its sites; words of functions stand for them."""
    estimators = backend.estimators
    signals = {
        "half wake-phi": partial(estimators.ovis_gamma_learning_signal, gamma=0.5),
        "ovis": estimators.ovis_gamma_learning_signal,
        "vimco": estimators.vimco_learning_signal,
        "own": own_signal,
        "own, 3": partial(own_signal, level=3),
        "imle": backend.package.IMLE(),
        "reinmax": estimators.ReinMax(),
        "long step": backend.package.IMLE(step_size=2.0),
    }
    config = {site: signals.get(name, name) for site, name in config.items()}
    return program._replace(guide=backend.package.configure_estimators(program.guide, config))


def own_signal(log_weights, level=1.0):
    return 0 * log_weights + level


# --- by the loss ---------------------------------------------------------------------------------


def test_losses_with_another_mean_are_told_apart(backend):
    package, sites = backend.package, guide_sites(backend, program_for("mixed"))
    target_of = partial(module(backend, "_targets").target_of, guide_sites=sites)
    same = [package.IWAE(3), package.VIMCO(3), package.OVIS(3), package.NVIL(3)]
    same += [package.IWAE(3, num_replicates=2), package.IWAE(3, pool_replicates=True)]
    same += [package.IWAE(3, reparam="dreg"), package.OVIS(3, num_auxiliary=2), package.DisARM(3)]
    assert len(set(map(target_of, same))) == 1
    others = [
        package.IWAE(4),
        package.VIMCO(3, alpha=0.5),
        package.OVIS(3, gamma=0.5),
        package.IWAE(3, reparam="stl"),
        package.TVO(3),
        package.ReweightedWakeSleep(3),
        package.RLOO(3),
        package.IWAE(3, elbo_weight=0.5),
        package.IWAE(3, num_replicates=2, pool_replicates=True),
    ]
    assert len(set(map(target_of, [*same, *others]))) == 1 + len(others)
    assert target_of(package.IWAE(1, reparam="stl")) == target_of(package.RLOO(3))


# --- by the sites --------------------------------------------------------------------------------

AS_IT_IS = ["3-sample bound"] * 3
WORDS = [
    ({"a": "vimco", "b": "ovis", "y": "dreg"}, AS_IT_IS),
    ({"a": "score", "y": "score"}, AS_IT_IS),
    (
        {"y": "stl"},
        ["3-sample bound less the score of reparameterised sites"] * 2 + [None],
    ),
    (
        {"b": "half wake-phi"},
        ["3-sample bound plus 0.5 times wake-phi at b"] * 2
        + ["3-sample bound plus 1 times wake-phi at a and plus 0.5 times wake-phi at b"],
    ),
    (
        {"a": "half wake-phi", "b": "half wake-phi"},
        ["3-sample bound plus 0.5 times wake-phi"] * 3,
    ),
    ({"a": "own"}, ["3-sample bound by own_signal at a"] * 2 + [None]),
    ({"a": "own, 3"}, ["3-sample bound by own_signal(level=3) at a"] * 2 + [None]),
    ({"b": "reinmax"}, ["3-sample bound by ReinMax() at b"] * 2 + [None]),
    (
        {"y": "stl", "b": "long step"},
        [
            "3-sample bound less the score of reparameterised sites at y and by "
            "IMLE(step_size=2.0) at b"
        ]
        * 2
        + [None],
    ),
]


@pytest.mark.parametrize(("config", "words"), WORDS, ids=lambda value: str(value)[:40])
def test_sites_say_what_the_gradient_is_of(backend, config, words):
    """Under losses that are unbiased, and under one that is not where sites do not choose."""
    program = chosen(backend, program_for("mixed"), **config)
    package = backend.package
    losses = [package.IWAE(3), package.VIMCO(3, reparam="dreg"), package.OVIS(3, gamma=1.0)]
    if words == AS_IT_IS:
        losses[2] = package.OVIS(3)
    for loss, desired in zip(losses, words, strict=True):
        if desired is not None:
            assert target(backend, loss, program).words == desired


def test_choosing_for_all_sites_is_the_option_of_the_loss(backend):
    """The two are ranked together, and one site alone is not."""
    package, program = backend.package, program_for("mixed")
    wake_phi, stl = package.OVIS(3, gamma=0.5), package.IWAE(3, reparam="stl")
    both = chosen(backend, program, a="half wake-phi", b="half wake-phi")
    assert target(backend, package.IWAE(3), both) == target(backend, wake_phi, program)
    one = chosen(backend, program, a="half wake-phi")
    assert target(backend, package.IWAE(3), one) != target(backend, wake_phi, program)
    by_site = chosen(backend, program, y="stl")
    assert target(backend, package.IWAE(3), by_site) == target(backend, stl, program)
    none = chosen(backend, program, a="vimco", b="vimco", y="pathwise")
    plain = target(backend, package.IWAE(3), program)
    assert target(backend, wake_phi, none) == target(backend, stl, none) == plain


def test_the_sticking_landing_of_one_particle_is_the_elbo(backend):
    program = chosen(backend, program_for("mixed"), y="stl")
    for loss in (backend.package.IWAE(1), backend.package.RLOO(2)):
        assert target(backend, loss, program).words == "ELBO"


def test_what_is_no_bound_departs_too(backend):
    program = by_imle(backend, program_for("one_bit"), backend.package.IMLE())
    loss = backend.package.IWAE(3, elbo_weight=0.5)
    assert target(backend, loss, program).words == "3-sample bound and ELBO, 0.5 to 0.5 by IMLE()"
    score = backend.package.IWAE(3, reparam="score")
    assert target(backend, score, program).words == "3-sample bound"


def host_elbo(backend):
    if backend.host == "pyro":
        from pyro.infer import Trace_ELBO as HostELBO
    else:
        from numpyro.infer import TraceGraph_ELBO as HostELBO  # the one for discrete latents
    return HostELBO()


def test_losses_of_the_host_look_at_no_choice_but_a_gradient_to_carry(backend):
    program = program_for("mixed")
    ignored = chosen(backend, program, a="own", y="stl")
    assert target(backend, host_elbo(backend), ignored).words == "ELBO"
    carried = by_imle(backend, program, {"b": backend.estimators.SIMPLE()})
    assert target(backend, host_elbo(backend), carried).words == "ELBO by SIMPLE() at b"


def test_losses_are_not_known_by_their_name_alone(backend):
    class IWAE(type(host_elbo(backend))):
        pass

    words = target(backend, IWAE(num_particles=3), program_for("one_bit")).words
    assert words == "objective of IWAE with 3 particles"


# --- what they are measured against --------------------------------------------------------------


def test_a_choice_of_the_site_is_measured_as_that_of_the_loss(backend):
    """Figures and target; the bias, by enumeration, is that which the other test is about."""
    package, program = backend.package, program_for("one_bit")
    options = {"num_draws": 60}
    by_loss = statistics(backend.host, package.OVIS(2, gamma=0.5), program, **options)
    by_site = chosen(backend, program, z="half wake-phi")
    by_site = statistics(backend.host, package.IWAE(2), by_site, **options)
    assert by_site.target == by_loss.target
    assert by_site.reference == by_loss.reference == "enumeration"
    assert_equal(flat(program, by_site.bias), flat(program, by_loss.bias))
    assert by_site.total_bias > 0


@pytest.mark.parametrize("num_particles", [None, 2])
def test_the_reference_of_a_carried_gradient_is_the_exact_one(backend, num_particles):
    """Of the host's ELBO, and of a bound; what carries the gradient does not get into it."""
    program = by_imle(backend, program_for("one_bit"), {"z": backend.package.IMLE(step_size=0.5)})
    loss = host_elbo(backend) if num_particles is None else backend.package.IWAE(num_particles)
    measured = statistics(backend.host, loss, program, num_draws=100)
    assert measured.reference == "enumeration"
    assert measured.target.words.endswith(" by IMLE(step_size=0.5)")
    exact = flat(program, measured.mean) - flat(program, measured.bias)
    assert_equal(exact, enumeration.exact_gradient(program.problem, num_particles or 1))


def truth(backend, loss, program, **options):
    """What the bias is measured against."""
    options = {"num_draws": 4, "num_reference_draws": 10} | options
    measured = statistics(backend.host, loss, program, **options)
    return measured.reference, flat(program, measured.mean) - flat(program, measured.bias)


def long_run(backend, loss, program):
    """The mean of ten gradients of a loss, with the random numbers of a reference."""
    gradients = module(backend, "gradient_statistics")._Gradients
    options = {"direction": None, "name": "", "progress_bar": False}
    if backend.host == "pyro":
        ppl = PyroPrimitives()
        pair = partial(program.model, ppl), partial(program.guide, ppl)
        guide_sites(backend, program)  # which makes the parameters
        of_loss = gradients(loss, *pair, (), {}, None)
        return flat(program, of_loss.by_parameter(of_loss.measure(10, seed=1, **options).mean))
    import jax

    ppl, key = NumPyroPrimitives(), jax.random.key(0)
    pair = partial(program.model, ppl), partial(program.guide, ppl)
    params = {name: ppl.array(value) for name, value in program.problem.params.items()}
    of_loss = gradients(loss, *pair, params, (), {}, key, None)
    moments = of_loss.measure(jax.random.split(key)[1], 10, batch_size=50, **options)
    return flat(program, of_loss.by_parameter(moments.mean))


def test_a_long_run_is_without_the_choices_that_are_biased(backend):
    """It is that of the same guide with unbiased choices in their place."""
    loss, program = backend.package.IWAE(2), program_for("mixed")
    biased = chosen(backend, program, a="own", b="imle", y="stl")
    reference, actual = truth(backend, loss, biased)
    assert reference == "10 draws of IWAE"
    assert_equal(actual, long_run(backend, loss, program))


def test_choices_are_left_out_of_a_reference_that_is_passed(backend):
    loss, program = backend.package.IWAE(2), program_for("one_bit")
    biased = by_imle(backend, program, {"z": backend.package.IMLE()})
    reference, actual = truth(backend, loss, biased, reference=loss)
    assert reference == "10 draws of IWAE"
    assert_equal(actual, long_run(backend, loss, program))


def test_a_long_run_for_the_hosts_elbo_is_one_of_ours(backend):
    """Also where the guide has a signal for another bound, which the host does not look at."""
    package, program = backend.package, program_for("mixed")
    biased = by_imle(backend, chosen(backend, program, a="vimco"), {"b": package.IMLE()})
    reference, actual = truth(backend, host_elbo(backend), biased)
    assert reference == "10 draws of RLOO"
    assert_equal(actual, long_run(backend, package.RLOO(2), program))


def test_what_no_loss_can_be_unbiased_for_has_no_long_run(backend):
    """A solver's draws have no density, so that there is no other gradient to compare with."""
    program = by_imle(backend, solved(backend), backend.package.IMLE())
    loss = host_elbo(backend)
    assert target(backend, loss, program).words == "ELBO by IMLE()"
    gradients = object.__new__(module(backend, "gradient_statistics")._Gradients)
    gradients.loss, gradients.guide_sites = loss, guide_sites(backend, program)
    assert gradients.reference("auto") is None


def solved(backend):
    """A program whose guide draws by a solver."""

    def guide(ppl):
        theta = ppl.param("theta", np.zeros(3))
        one_hot = backend.estimators.one_hot_argmax()
        ppl.sample("z", backend.package.PerturbAndMAP(theta, one_hot))

    return program_for("one_bit")._replace(guide=guide)
