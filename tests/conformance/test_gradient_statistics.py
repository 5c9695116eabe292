"""Figures of gradient estimators: their moments, their exact reference, and what they say."""

import html
import importlib
import re
import sys
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


def measured_by(host, function, losses, program, **options):
    """A function of the package, of a program that both hosts run."""
    measure = getattr(backend_for(host).package, function)
    if host == "pyro":
        import pyro

        ppl = PyroPrimitives()
        pyro.clear_param_store()
        for name, value in program.problem.params.items():
            ppl.param(name, value)
        return measure(losses, partial(program.model, ppl), partial(program.guide, ppl), **options)
    import jax

    ppl = NumPyroPrimitives()
    params = {name: ppl.array(value) for name, value in program.problem.params.items()}
    model, guide = partial(program.model, ppl), partial(program.guide, ppl)
    return measure(jax.random.key(0), losses, model, guide, params, batch_size=50, **options)


def statistics(host, loss, program, **options):
    return measured_by(host, "gradient_statistics", loss, program, **options)


def compared(host, losses, program, **options):
    return measured_by(host, "compare_estimators", losses, program, **options)


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


def test_enumeration_on_demand_says_why_not(backend):
    """And how many states there are; else there is no reference, and no error."""

    def ask(loss, program):
        options = {"num_draws": 2, "reference": "enumeration"}
        return statistics(backend.host, loss, program_for(program), **options)

    package = backend.package
    assert ask(package.IWAE(2), "one_bit").reference == "enumeration"
    with pytest.raises(ValueError, match=r"There are 1048576 terms.*more than 100000.*particles"):
        ask(package.IWAE(10), "bit_vector")
    with pytest.raises(ValueError, match=r"'y' \(Normal\) can't be enumerated"):
        ask(package.IWAE(2), "mixed")
    with pytest.raises(ValueError, match=r"thermodynamic objective.*not one bound.*long"):
        ask(package.TVO(2), "one_bit")
    with pytest.raises(ValueError, match=r"NVIL divides.*normalize_variance=False"):
        ask(package.NVIL(2), "one_bit")


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


def test_only_some_parameters(backend):
    """Their figures are those among all, and the others have none."""
    program, loss = program_for("nested_plates"), backend.package.IWAE(2)
    names = list(program.problem.params)
    assert len(names) > 1
    every = statistics(backend.host, loss, program, num_draws=20)
    some = statistics(backend.host, loss, program, num_draws=20, only=lambda name: name == names[1])
    assert list(some.mean) == list(some.bias) == [names[1]]
    for figures in ("mean", "variance", "bias"):
        np.testing.assert_array_equal(
            getattr(some, figures)[names[1]], getattr(every, figures)[names[1]]
        )
    with pytest.raises(ValueError, match=f"true of no parameter. There are .*{names[1]}"):
        statistics(backend.host, loss, program, num_draws=2, only=lambda name: False)


def test_figures_as_the_reference(backend):
    program = program_for("one_bit")
    right = statistics(backend.host, backend.package.IWAE(2), program, num_draws=30)
    loss = backend.package.VIMCO(2)
    measured = statistics(backend.host, loss, program, num_draws=20, reference=right)
    assert measured.reference == "30 draws of IWAE(2)"
    for name in right.mean:
        assert_equal(measured.bias[name], measured.mean[name] - right.mean[name])
        variance = measured.variance[name] / 20 + right.variance[name] / 30
        assert_equal(measured.bias_standard_errors[name], np.sqrt(variance))
    of_another = right._replace(mean={"other": np.zeros(1)})
    with pytest.raises(ValueError, match="figures of the parameters other, and looks at "):
        statistics(backend.host, loss, program, num_draws=2, reference=of_another)


def test_a_reference_is_run_once_for_each_number_of_particles(backend):
    program, asked = program_for("one_bit"), []

    def reference(num_particles):
        asked.append(num_particles)
        return backend.package.OVIS(num_particles)

    losses = {name: getattr(backend.package, name) for name in ("IWAE", "VIMCO")}
    options = {"num_draws": 10, "num_reference_draws": 30, "reference": reference}
    measured = compared(backend.host, losses, program, num_particles=(2, 3), **options).statistics
    assert asked == [2, 3]
    assert {one.reference for one in measured} == {"30 draws of OVIS"}
    by_name = {one.name: flat(program, one.mean) - flat(program, one.bias) for one in measured}
    assert_equal(by_name["IWAE, K=2"], by_name["VIMCO, K=2"])
    assert not np.allclose(by_name["IWAE, K=2"], by_name["IWAE, K=3"])
    with pytest.raises(TypeError, match="a function of K as reference and no num_particles"):
        compared(backend.host, {"OVIS": backend.package.OVIS(2)}, program, **options)


def test_a_loss_of_the_host(backend):
    if backend.host == "pyro":
        from pyro.infer import Trace_ELBO as HostELBO
    else:
        from numpyro.infer import TraceGraph_ELBO as HostELBO
    measured = statistics(backend.host, HostELBO(), program_for("one_bit"), num_draws=200)
    assert measured.target.words == "ELBO"
    assert measured.reference == "enumeration"
    assert measured.total_bias < 4 * measured.total_bias_standard_error


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"num_draws": 0}, ValueError, "num_draws >= 1, got 0"),
        ({"reference": "exact"}, ValueError, 'reference="auto", "enumeration", a loss'),
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


def test_time_is_that_of_the_median_batch(backend, monkeypatch):
    """Other work on the machine makes a batch slow now and then."""
    times = iter([0.0, 1.0, 1.0, 2.0, 2.0, 100.0])  # before and after each of three
    measuring = module(backend, "_measure")
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(times))
    draws = np.ones((2, 1))
    measured = measuring.measure(iter([draws] * 4), 6, direction=None, progress_bar=False, name="")
    assert measured.seconds == 0.5


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


def test_does_not_rank_what_is_lost_in_the_noise(backend):
    """It has the ratio of chance, which a low cost would make the largest per second."""
    lost = made_up(backend, "lost", mean=0.05, seconds=1e-9)
    words = sentences(backend, lost, made_up(backend, "seen"))
    assert "take seen: the signal of the others is lost in the noise" in words
    seen = [made_up(backend, "seen"), made_up(backend, "slow", seconds=1.0)]
    assert "take seen: its SNR per second is the largest" in sentences(backend, lost, *seen)


@pytest.mark.parametrize(("bias", "shows"), [(0.15, False), (0.25, True)])
def test_reports_a_bias_that_is_no_chance(backend, bias, shows):
    assert ("is biased" in sentences(backend, made_up(backend, "one", bias=bias))) == shows


@pytest.fixture
def comparison(backend):
    figures = [
        made_up(
            backend,
            f"{family}, K={K}",
            mean=float(K) ** slope,
            K=K,
            bias=0.01,
            target=f"{K}-sample bound",
        )
        for family, slope in [("OVIS", 0.5), ("VIMCO", -0.5)]
        for K in (3, 10, 30)
    ]
    return module(backend, "gradient_report").EstimatorComparison(tuple(figures))


def test_data_frame(comparison):
    frame = comparison.to_frame()
    assert list(frame.index) == [one.name for one in comparison.statistics]
    np.testing.assert_allclose(frame["SNR"], [one.snr for one in comparison.statistics])
    assert str(comparison).count("\n") >= len(frame)


def test_a_notebook_shows_what_print_does(comparison):
    cells = re.findall(r"<t[hd]>(.*?)</t[hd]>", comparison._repr_html_())
    assert "".join("".join(cells).split()) in "".join(str(comparison).split())
    assert re.findall("<li>(.*?)</li>", comparison._repr_html_()) == [
        html.escape(sentence) for sentence in comparison.recommendations
    ]
    one = comparison.statistics[0]
    assert html.escape(one.name) in one._repr_html_()


def test_plots(backend, comparison):
    import matplotlib

    matplotlib.use("Agg")
    package = backend.package
    assert legend(package.plot_snr_against_particles(comparison)) == [
        "K-sample bound:",
        "OVIS, slope +0.50",
        "VIMCO, slope -0.50",
        "by chance",
    ]
    families = ["OVIS: K-sample bound", "VIMCO: K-sample bound"]
    assert legend(package.plot_bias_and_variance(comparison)) == families
    ax = package.plot_snr_per_second(comparison)
    of_bars = {bar.get_edgecolor() for bar in ax.patches}
    of_targets = [entry.get_facecolor() for entry in ax.get_legend().get_patches()]
    assert len(of_bars) == len(of_targets) == 3 and of_bars == set(of_targets)
    matplotlib.pyplot.close("all")


def test_all_plots_that_there_are_figures_for(backend, comparison):
    import matplotlib

    matplotlib.use("Agg")
    assert [ax.get_xlabel() for ax in comparison.plot().axes] == [
        "number of particles K",
        "signal-to-noise ratio of a second's average",
        "standard deviation of one gradient",
    ]
    alone = comparison._replace(statistics=(made_up(backend, "one"),))
    assert [ax.get_xlabel() for ax in alone.plot().axes] == [
        "signal-to-noise ratio of a second's average"
    ]
    matplotlib.pyplot.close("all")


def test_plots_without_matplotlib(backend, comparison, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for plot in (comparison.plot, partial(backend.package.plot_snr_per_second, comparison)):
        with pytest.raises(ImportError, match="pip install matplotlib"):
            plot()


def legend(ax):
    return ax.get_legend_handles_labels()[1]


def test_lines_of_different_targets_are_told_apart(backend, comparison):
    import matplotlib

    matplotlib.use("Agg")
    other = [
        made_up(backend, f"RLOO, K={K}", mean=K**0.5, K=K, target="ELBO")._replace(num_particles=K)
        for K in (3, 10, 30)
    ]
    ax = backend.package.plot_snr_against_particles(
        comparison._replace(statistics=(*comparison.statistics, *other))
    )
    assert legend(ax)[3:5] == ["ELBO:", "RLOO, slope +0.50"]
    handles = ax.get_legend_handles_labels()[0]
    style = dict(zip(legend(ax), (one.get_linestyle() for one in handles), strict=True))
    assert style["OVIS, slope +0.50"] == style["VIMCO, slope -0.50"] != style["RLOO, slope +0.50"]
    matplotlib.pyplot.close("all")


def test_the_slope_is_that_of_the_points_that_show_a_signal(backend):
    import matplotlib

    matplotlib.use("Agg")
    means = {3: 2.0, 12: 1.0, 1000: 0.08}  # by chance alone the ratio would be 0.08
    figures = [made_up(backend, f"VIMCO, K={K}", mean=mean, K=K) for K, mean in means.items()]
    comparison = module(backend, "gradient_report").EstimatorComparison(tuple(figures))
    assert "VIMCO, slope -0.50" in legend(backend.package.plot_snr_against_particles(comparison))
    noiseless = comparison._replace(
        statistics=tuple(one._replace(variance={"loc": np.zeros(1)}) for one in figures)
    )
    assert "VIMCO, no noise" in legend(backend.package.plot_snr_against_particles(noiseless))
    texts = [text.get_text() for text in backend.package.plot_snr_per_second(noiseless).texts]
    assert texts == ["no noise"] * 3
    matplotlib.pyplot.close("all")


def test_plots_say_what_is_missing(backend):
    alone = module(backend, "gradient_report").EstimatorComparison((made_up(backend, "one"),))
    with pytest.raises(ValueError, match=r"num_particles=\(3, 10, 30\)"):
        backend.package.plot_snr_against_particles(alone)
    with pytest.raises(ValueError, match="reference="):
        backend.package.plot_bias_and_variance(alone)
