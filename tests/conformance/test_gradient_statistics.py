"""Figures of gradient estimators: their moments, their exact reference, and what they say."""

import importlib
from functools import partial

import numpy as np
import pytest

from tests.conformance.backends import backend_for
from tests.conformance.objectives import assert_equal, program_for
from tests.conformance.replay import NumPyroPrimitives, PyroPrimitives
from tests.oracles import enumeration
from tests.oracles import multisample as oracle


def module(backend, name):
    return importlib.import_module(f"{backend.host}_gradest.diagnostics.{name}")


def statistics(host, loss, program, **options):
    """``gradient_statistics`` of a program that both hosts run."""
    package = backend_for(host).package
    if host == "pyro":
        import pyro

        ppl = PyroPrimitives()
        pyro.clear_param_store()
        for name, value in program.problem.params.items():
            ppl.param(name, value)
        return package.gradient_statistics(
            loss, partial(program.model, ppl), partial(program.guide, ppl), **options
        )
    import jax

    ppl = NumPyroPrimitives()
    params = {name: ppl.array(value) for name, value in program.problem.params.items()}
    model, guide = partial(program.model, ppl), partial(program.guide, ppl)
    return package.gradient_statistics(
        jax.random.key(0), loss, model, guide, params, batch_size=50, **options
    )


def flat(program, by_parameter):
    return np.concatenate([by_parameter[name].ravel() for name in program.problem.params])


# --- moments -------------------------------------------------------------------------------------


def test_moments_of_a_stream(backend):
    """Also where the sum of squares would cancel, and where batches do not divide the draws."""
    draws = np.random.default_rng(0).normal(size=(95, 3)) * [1.0, 0.1, 0.0] + [1e7, -2.0, 0.0]
    batches = iter([draws[:10], *np.split(draws, range(10, 95, 10)), draws])
    measured = module(backend, "_measure").measure(
        batches, 92, direction=None, progress_bar=False, name=""
    )
    draws = draws[:92]
    assert measured.num_draws == 92
    np.testing.assert_allclose(measured.mean, draws.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(measured.variance, draws.var(axis=0, ddof=1), rtol=1e-6)


def test_directional_ratio(backend):
    """Squared length along the mean of the first half over that across it, in the second half."""
    draws = np.random.default_rng(0).normal([1.0, 0.5, 0.0], size=(40, 3))
    batches = iter([draws[:5], *np.split(draws, range(5, 40, 5))])
    measured = module(backend, "_measure").measure(
        batches, 40, direction=None, progress_bar=False, name=""
    )
    unit = draws[:20].mean(axis=0) / np.linalg.norm(draws[:20].mean(axis=0))
    along = draws[20:] @ unit
    across = np.linalg.norm(draws[20:] - np.outer(along, unit), axis=1)
    assert_equal(measured.directional_snr, np.mean(along**2 / across**2))


# --- through a loss ------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["nested_plates", "global_and_local", "scaled"])
def test_the_reference_is_the_exact_gradient(backend, program):
    program = program_for(program)
    measured = statistics(backend.host, backend.package.IWAE(2), program, num_draws=2)
    assert measured.reference == "enumeration"
    exact = flat(program, measured.mean) - flat(program, measured.bias)
    assert_equal(exact, enumeration.exact_gradient(program.problem, 2))


def test_variance_and_bias_of_an_estimator_that_is_biased_by_design(backend):
    """Its exact moments lie within what chance explains of the figures."""
    program, K = program_for("one_bit"), 2
    measured = statistics(backend.host, backend.package.OVIS(K, gamma=1.0), program, num_draws=400)
    problem = program.problem
    moments = enumeration.moments(
        enumeration.estimator_gradients(
            problem,
            K,
            partial(oracle.ovis_gamma_learning_signal, gamma=1.0),
            oracle.normalized_weights,
        ),
        enumeration.tuple_probabilities(problem, K),
    )
    bias = moments.mean - enumeration.exact_gradient(problem, K)
    errors = flat(program, measured.bias_standard_errors)
    # 4.5 standard errors: the draws are those of a fixed seed.
    assert (np.abs(flat(program, measured.bias) - bias) < 4.5 * errors + 1e-12).all()
    assert np.abs(bias).max() > 6 * errors.max()  # informative
    exact_variance = np.diag(moments.covariance)
    np.testing.assert_allclose(flat(program, measured.variance), exact_variance, rtol=0.3)
    assert 1 <= measured.effective_sample_size <= K
    assert "is biased: by" in str(measured)
    assert "wake-phi" in measured.target.words


def test_what_can_not_be_summed_over_has_no_reference(backend):
    measured = statistics(backend.host, backend.package.IWAE(2), program_for("mixed"), num_draws=10)
    assert measured.reference is None and measured.bias is None
    assert "bias" in str(measured)


def test_a_long_run_of_the_unbiased_sibling(backend):
    loss = backend.package.IWAE(2, reparam="stl")
    measured = statistics(
        backend.host, loss, program_for("reparameterised"), num_draws=100, num_reference_draws=200
    )
    assert measured.reference == "200 draws of IWAE"
    assert measured.total_bias > 2 * measured.total_bias_standard_error
    assert loss.reparam == "stl"


def test_a_loss_of_the_host(backend):
    if backend.host == "pyro":
        from pyro.infer import Trace_ELBO as HostELBO
    else:
        from numpyro.infer import TraceGraph_ELBO as HostELBO
    measured = statistics(backend.host, HostELBO(), program_for("one_bit"), num_draws=200)
    assert measured.target == module(backend, "_targets").target_of(backend.package.RLOO(4))
    assert measured.reference == "enumeration"
    assert measured.total_bias < 4 * measured.total_bias_standard_error


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"num_draws": 0}, ValueError, "num_draws >= 1, got 0"),
        ({"reference": "exact"}, ValueError, 'reference="auto"'),
    ],
)
def test_bad_options_are_refused(backend, options, error, match):
    with pytest.raises(error, match=match):
        statistics(backend.host, backend.package.IWAE(2), program_for("one_bit"), **options)


# --- what they say -------------------------------------------------------------------------------


def made_up(backend, name, *, mean=1.0, variance=1.0, seconds=1e-3, target="ELBO", K=1, bias=None):
    report, targets = module(backend, "gradient_report"), module(backend, "_targets")
    as_dict = {"loc": np.array([mean])}
    return report.GradientStatistics(
        name=name,
        family=name.split(",")[0],
        num_particles=K,
        target=targets.Target(target, K, 0.0),
        num_draws=100,
        mean=as_dict,
        variance={"loc": np.array([variance])},
        directional_snr=1.0,
        effective_sample_size=None,
        seconds_per_gradient=seconds,
        reference=None if bias is None else "enumeration",
        bias=None if bias is None else {"loc": np.array([bias])},
        bias_standard_errors=None if bias is None else {"loc": np.array([0.1])},
    )


def sentences(backend, *figures):
    return " ".join(module(backend, "gradient_report").EstimatorComparison(figures).recommendations)


def test_ranks_by_signal_to_noise_per_second(backend):
    quiet = made_up(backend, "quiet", variance=0.25, seconds=1e-2)  # 2 / 0.1
    quick = made_up(backend, "quick", seconds=1e-3)  # 1 / 0.032
    words = sentences(backend, quiet, quick)
    assert "take quick: its SNR per second is the largest, 31.6 against 20 of quiet" in words
    assert "take quick or same" in sentences(backend, quick, quick._replace(name="same"))


def test_never_ranks_different_targets(backend):
    words = sentences(
        backend,
        made_up(backend, "VIMCO(5)", target="5-sample bound", K=5),
        made_up(backend, "RLOO(5)", variance=1e-4),
    )
    assert "different targets" in words and "not ranked" in words
    assert "take" not in words


def test_says_so_when_nothing_shows(backend):
    noise = made_up(backend, "noise", mean=0.05)
    words = sentences(backend, noise, noise._replace(name="more"))
    assert "no signal shows in 100 draws" in words and "take" not in words


@pytest.mark.parametrize(("bias", "shows"), [(0.15, False), (0.25, True)])
def test_reports_a_bias_that_is_no_chance(backend, bias, shows):
    assert ("is biased" in sentences(backend, made_up(backend, "one", bias=bias))) == shows


def test_targets_tell_apart_what_has_another_mean(backend):
    package, target_of = backend.package, module(backend, "_targets").target_of
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


@pytest.fixture
def comparison(backend):
    figures = [
        made_up(backend, f"{family}, K={K}", mean=float(K) ** slope, K=K, bias=0.01)
        for family, slope in [("OVIS", 0.5), ("VIMCO", -0.5)]
        for K in (3, 10, 30)
    ]
    return module(backend, "gradient_report").EstimatorComparison(tuple(figures))


def test_data_frame(comparison):
    frame = comparison.to_frame()
    assert list(frame.index) == [one.name for one in comparison.statistics]
    np.testing.assert_allclose(frame["SNR"], [one.snr for one in comparison.statistics])
    assert str(comparison).count("\n") >= len(frame)


def test_plots(backend, comparison):
    import matplotlib

    matplotlib.use("Agg")
    package = backend.package
    labels = package.plot_snr_against_particles(comparison).get_legend_handles_labels()[1]
    assert labels == ["OVIS, slope +0.50", "VIMCO, slope -0.50", "by chance"]
    assert len(package.plot_bias_and_variance(comparison).get_legend_handles_labels()[1]) == 6
    bars = package.plot_snr_per_second(comparison).patches
    assert len({bar.get_facecolor() for bar in bars}) == 1  # one colour for each target
    matplotlib.pyplot.close("all")


def test_plots_say_what_is_missing(backend):
    alone = module(backend, "gradient_report").EstimatorComparison((made_up(backend, "one"),))
    with pytest.raises(ValueError, match=r"num_particles=\(3, 10, 30\)"):
        backend.package.plot_snr_against_particles(alone)
    with pytest.raises(ValueError, match="reference="):
        backend.package.plot_bias_and_variance(alone)
