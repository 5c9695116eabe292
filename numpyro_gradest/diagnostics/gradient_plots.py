"""Plots of what gradient estimators were measured to do."""

from collections.abc import Callable, Iterable
from itertools import cycle
from typing import Any

import numpy as np

from numpyro_gradest.diagnostics._targets import words_at_any_number
from numpyro_gradest.diagnostics.gradient_report import (
    EstimatorComparison,
    GradientStatistics,
    is_biased,
    shows_signal,
)

# Okabe and Ito's palette: told apart by colour-blind readers, and from each other by the markers.
_COLORS = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#666666"
_MARKERS = "o", "s", "D", "^", "v", "P", "X"
_LINES = "-", "--", ":", "-."


def plot_snr_against_particles(comparison: EstimatorComparison, *, ax: Any = None) -> Any:
    """Draw the signal-to-noise ratio against the number of particles, with fitted slopes.

    A line falls where more particles bury the signal: the slope of log SNR against log K is -1/2
    for VIMCO and the pathwise gradient in the limit, and +1/2 for OVIS and doubly reparameterised
    gradients. Only lines of one style compare: they are of the same target, which the legend names.
    Hollow points are lost in the noise, and the slope is that of the others.

    Args:
        comparison: Of estimators at several numbers of particles.
        ax: matplotlib axes to draw on; new ones if left out.

    Returns:
        The axes.

    Raises:
        ValueError: If no estimator was measured at two numbers of particles.

    Bias and variance:
        Of n draws without signal the ratio is sqrt(2 / (pi n)), drawn as a line: biased by design
        near it.

    Cost:
        Nothing is run.

    Example:
        >>> import matplotlib
        >>> import numpyro
        >>> import numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro_gradest import VIMCO, compare_estimators
        >>> matplotlib.use("Agg")
        >>> def model():
        ...     numpyro.sample("z", dist.Bernoulli(0.3))
        >>> def guide():
        ...     numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logit", 0.1)))
        >>> options = {"num_particles": (2, 4), "num_draws": 20}
        >>> comparison = compare_estimators(
        ...     random.key(0), {"VIMCO": VIMCO}, model, guide, {}, **options
        ... )
        >>> figure = plot_snr_against_particles(comparison).figure

    References:
        Rainforth et al., `Tighter Variational Bounds are Not Necessarily Better
        <https://arxiv.org/abs/1802.04537>`_, 2018, figure 1.
    """
    families = _families(comparison)
    if not families:
        raise ValueError(
            "plot_snr_against_particles needs an estimator at two numbers of particles or more. "
            "Pass num_particles=(3, 10, 30) to compare_estimators, with losses as functions of K."
        )
    ax = _axes(ax)
    targets: dict[str, list[str]] = {}
    for name, group in families.items():
        targets.setdefault(words_at_any_number(group[-1].target), []).append(name)
    styles = _styles(families)
    for (target, names), line in zip(targets.items(), cycle(_LINES), strict=False):
        ax.plot([], [], " ", label=f"{target}:")
        for name in names:
            _plot_family(ax, name, families[name], line, **styles[name])
    ax.axhline(comparison.statistics[0].snr_floor, color="grey", linewidth=1, label="by chance")
    sizes = sorted({one.num_particles or 0 for group in families.values() for one in group})
    ax.set(xscale="log", yscale="log", xlabel="number of particles K")
    ax.set(ylabel="signal-to-noise ratio of one gradient")
    _label_decades(ax.yaxis)
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.minorticks_off()
    _legend_below(ax)
    return ax


def _families(comparison: EstimatorComparison) -> dict[str, list[GradientStatistics]]:
    """The estimators that there are several numbers of particles of."""
    families: dict[str, list[GradientStatistics]] = {}
    for one in comparison.statistics:
        if one.num_particles is not None:
            families.setdefault(one.family, []).append(one)
    return {name: group for name, group in families.items() if len(group) > 1}


def plot_all(comparison: EstimatorComparison) -> Any:
    """Draw every plot that there are figures for, side by side, and return the figure."""
    plots: list[Callable] = [plot_snr_per_second]
    if any(one.bias is not None for one in comparison.statistics):
        plots.append(plot_bias_and_variance)
    if _families(comparison):
        plots.insert(0, plot_snr_against_particles)
    figure, axes = _subplots(len(plots))
    for plot, ax in zip(plots, axes, strict=True):
        plot(comparison, ax=ax)
    return figure


def _plot_family(
    ax: Any, name: str, group: list[GradientStatistics], line: str, *, color: str, marker: str
) -> None:
    group = sorted(group, key=lambda one: one.num_particles or 0)
    sizes, ratios = np.array([[one.num_particles, one.snr] for one in group], float).T
    has_signal = np.array([shows_signal(one) for one in group])
    label = name if has_signal.any() else f"{name}, lost in noise"
    if np.isinf(ratios).all():
        label = f"{name}, no noise"
    # Infinite and zero have no place on a logarithmic axis.
    ratios[~np.isfinite(ratios) | (ratios == 0)] = np.nan
    is_seen = has_signal & np.isfinite(ratios)
    if is_seen.sum() > 1:
        slope = np.polyfit(np.log(sizes[is_seen]), np.log(ratios[is_seen]), 1)[0]
        label = f"{name}, slope {slope:+.2f}"
    ax.plot(sizes, ratios, line, marker=marker, color=color, markerfacecolor="white")
    ax.plot(sizes[is_seen], ratios[is_seen], " ", marker=marker, color=color)
    ax.plot([], [], line, marker=marker, color=color, label=label)


def plot_bias_and_variance(comparison: EstimatorComparison, *, ax: Any = None) -> Any:
    """Draw the length of the bias against the standard deviation, an estimator a point.

    Args:
        comparison: Of estimators whose bias was measured.
        ax: matplotlib axes to draw on; new ones if left out.

    Returns:
        The axes.

    Raises:
        ValueError: If no bias was measured.

    Bias and variance:
        An unbiased estimator lies at about its standard error, drawn as a bar: its point is hollow,
        and those of biased ones are filled.

    Cost:
        Nothing is run.

    Example:
        >>> import matplotlib
        >>> import numpyro
        >>> import numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro_gradest import VIMCO, compare_estimators
        >>> matplotlib.use("Agg")
        >>> def model():
        ...     numpyro.sample("z", dist.Bernoulli(0.3))
        >>> def guide():
        ...     numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logit", 0.1)))
        >>> options = {"num_particles": (2, 4), "num_draws": 20}
        >>> comparison = compare_estimators(
        ...     random.key(0), {"VIMCO": VIMCO}, model, guide, {}, **options
        ... )
        >>> figure = plot_bias_and_variance(comparison).figure

    References:
        Lievin, Dittadi, Christensen and Winther, `Optimal Variance Control of the Score Function
        Gradient Estimator for Importance Weighted Bounds <https://arxiv.org/abs/2008.01998>`_,
        2020.
    """
    measured = [one for one in comparison.statistics if one.bias is not None]
    if not measured:
        raise ValueError(
            "plot_bias_and_variance needs a measured bias. Pass reference=... to "
            "compare_estimators: an unbiased loss that is run for long."
        )
    ax = _axes(ax)
    families: dict[str, str] = {}
    for one in measured:
        families[one.family] = words_at_any_number(one.target)
    styles = _styles(families)
    for name, target in families.items():
        ax.plot([], [], " ", **styles[name], label=f"{name}: {target}")
    for one in measured:
        deviation, bias = np.sqrt(one.total_variance), one.total_bias or 0.0
        error = one.total_bias_standard_error or 0.0
        style = styles[one.family]
        ax.errorbar(
            deviation,
            bias,
            yerr=[[min(bias, error)], [error]],
            fmt=style["marker"],
            color=style["color"],
            markerfacecolor=style["color"] if is_biased(one) else "white",
        )
        if one.family != one.name:
            place = {"xytext": (5, 4), "textcoords": "offset points", "fontsize": "small"}
            ax.annotate(f"K = {one.num_particles}", (deviation, bias), **place)
    ax.set(xscale="log", xlabel="standard deviation of one gradient")
    _label_decades(ax.xaxis)
    ax.set(ylabel="length of the bias, ± s.e. (hollow: by chance)")
    ax.set_ylim(bottom=0)
    _legend_below(ax)
    return ax


def plot_snr_per_second(comparison: EstimatorComparison, *, ax: Any = None) -> Any:
    """Draw the signal-to-noise ratio that a second of gradients has, estimators grouped by target.

    Only bars of one colour compare: they are of the same target, which the legend names. Hollow
    bars are lost in the noise.

    Args:
        comparison: Of any estimators.
        ax: matplotlib axes to draw on; new ones if left out.

    Returns:
        The axes.

    Bias and variance:
        The time is that of this machine and batch size. For ratios near the floor by chance,
        biased by design.

    Cost:
        Nothing is run.

    Example:
        >>> import matplotlib
        >>> import numpyro
        >>> import numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro_gradest import VIMCO, compare_estimators
        >>> matplotlib.use("Agg")
        >>> def model():
        ...     numpyro.sample("z", dist.Bernoulli(0.3))
        >>> def guide():
        ...     numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logit", 0.1)))
        >>> options = {"num_particles": (2, 4), "num_draws": 20}
        >>> comparison = compare_estimators(
        ...     random.key(0), {"VIMCO": VIMCO}, model, guide, {}, **options
        ... )
        >>> figure = plot_snr_per_second(comparison).figure

    References:
        Rainforth et al., `Tighter Variational Bounds are Not Necessarily Better
        <https://arxiv.org/abs/1802.04537>`_, 2018.
    """
    targets: dict[str, list[GradientStatistics]] = {}
    for one in comparison.statistics:
        targets.setdefault(one.target.words, []).append(one)
    ordered = [
        one
        for group in targets.values()
        for one in sorted(group, key=lambda one: one.snr_per_second, reverse=True)
    ]
    from matplotlib.patches import Patch

    ax = _axes(ax, height=2.0 + 0.3 * len(ordered))
    entries: list[Patch] = []  # full colours, also where the first bar is hollow
    finite = [one.snr_per_second for one in ordered if np.isfinite(one.snr_per_second)]
    longest = 1.2 * max(finite, default=1.0)
    for target, color in zip(targets, cycle(_COLORS), strict=False):
        rows = [row for row, one in enumerate(ordered) if one.target.words == target]
        group = [ordered[row] for row in rows]
        bars = ax.barh(
            rows,
            [min(one.snr_per_second, longest) for one in group],
            color=[color if shows_signal(one) else "none" for one in group],
            edgecolor=color,
        )
        entries.append(Patch(color=color, label=target))
        ax.bar_label(bars, [_ratio_in_words(one) for one in group], padding=3)
    ax.set_yticks(range(len(ordered)), [one.name for one in ordered])
    ax.set_ylim(len(ordered) - 0.5, -0.5)  # the first on top
    ax.margins(x=0.15)
    ax.set_axisbelow(True)
    ax.set(xlabel="signal-to-noise ratio of a second's average")
    title = "compare only within" if len(targets) > 1 else None
    _legend_below(ax, title=title, handles=entries)
    return ax


def _ratio_in_words(one: GradientStatistics) -> str:
    if np.isinf(one.snr_per_second):
        return "no noise"
    return f"{one.snr_per_second:.3g}" if shows_signal(one) else "lost in noise"


def _styles(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Colour and marker of each name."""
    pairs = zip(cycle(_COLORS), cycle(_MARKERS), strict=False)
    return {
        name: {"color": color, "marker": marker}
        for name, (color, marker) in zip(names, pairs, strict=False)
    }


def _label_decades(axis: Any) -> None:
    """Of a logarithmic axis: 1, 2 and 5 in each, so that a short one has labels too."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def _legend_below(ax: Any, **options: Any) -> None:
    """Where no line or bar can be, however many entries there are."""
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=4, **options)


def _axes(ax: Any, *, height: float = 5.6) -> Any:
    return _subplots(1, height=height)[1][0] if ax is None else ax


def _subplots(number: int, *, height: float = 5.6) -> tuple[Any, Any]:
    """A figure with so many plots side by side, and an array of their axes."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "Plots need matplotlib, which is not installed: pip install matplotlib. print and "
            "to_frame do without."
        ) from error
    size = (6.4 * number, height)
    figure, axes = pyplot.subplots(1, number, figsize=size, squeeze=False, layout="constrained")
    return figure, axes[0]
