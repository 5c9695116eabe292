"""Plots of what gradient estimators were measured to do."""

from typing import Any

import numpy as np

from numpyro_gradest.diagnostics.gradient_report import EstimatorComparison, GradientStatistics


def plot_snr_against_particles(comparison: EstimatorComparison, *, ax: Any = None) -> Any:
    """Draw the signal-to-noise ratio against the number of particles, with fitted slopes.

    A line falls where more particles bury the signal: the slope of log SNR against log K is -1/2
    for VIMCO and the pathwise gradient in the limit, and +1/2 for OVIS and doubly reparameterised
    gradients. Lines of different targets are drawn, not ranked.

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
    families: dict[str, list[GradientStatistics]] = {}
    for one in comparison.statistics:
        if one.num_particles is not None:
            families.setdefault(one.family, []).append(one)
    families = {name: group for name, group in families.items() if len(group) > 1}
    if not families:
        raise ValueError(
            "plot_snr_against_particles needs an estimator at two numbers of particles or more. "
            "Pass num_particles=(3, 10, 30) to compare_estimators, with losses as functions of K."
        )
    ax = _axes(ax)
    for name, group in families.items():
        sizes = [one.num_particles for one in group]
        ratios = [one.snr for one in group]
        slope = np.polyfit(np.log(np.array(sizes, float)), np.log(ratios), 1)[0]
        ax.plot(sizes, ratios, marker="o", label=f"{name}, slope {slope:+.2f}")
    ax.axhline(comparison.statistics[0].snr_floor, color="grey", linestyle=":", label="by chance")
    ax.set(xscale="log", yscale="log", xlabel="particles", ylabel="signal-to-noise ratio")
    ax.legend()
    return ax


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
        An unbiased estimator lies at about its standard error, drawn as a bar.

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
    for one in measured:
        deviation = np.sqrt(one.total_variance)
        ax.errorbar(
            deviation,
            one.total_bias,
            yerr=one.total_bias_standard_error,
            marker="o",
            label=f"{one.name} ({one.target.words})",
        )
    ax.set(xlabel="standard deviation", ylabel="length of the bias", xscale="log")
    ax.legend()
    return ax


def plot_snr_per_second(comparison: EstimatorComparison, *, ax: Any = None) -> Any:
    """Draw the signal-to-noise ratio that a second of gradients has, estimators grouped by target.

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
    ax = _axes(ax)
    ordered = sorted(comparison.statistics, key=lambda one: one.target.words)
    targets = list(dict.fromkeys(one.target.words for one in ordered))
    for row, one in enumerate(ordered):
        ax.barh(row, one.snr_per_second, color=f"C{targets.index(one.target.words)}")
    ax.set_yticks(range(len(ordered)), [f"{one.name}\n{one.target.words}" for one in ordered])
    ax.set(xlabel="signal-to-noise ratio of a second's average")
    return ax


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")[1]
