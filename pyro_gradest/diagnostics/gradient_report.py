"""Figures of gradient estimators: tables, plots, and what to choose in plain words."""

import math
from html import escape
from typing import Any, NamedTuple

import numpy as np

from pyro_gradest.diagnostics._targets import Target

NOTICEABLE = 2.0
"""A bias shows when it is twice its standard error, and a signal at twice what noise would show."""
CLEARLY_BETTER = 1.1
"""Ratios of signal-to-noise closer to one than that are taken for equal."""


class GradientStatistics(NamedTuple):
    """Figures of one estimator's gradient; those by parameter are arrays of its shape."""

    name: str
    family: str
    """The name without the number of particles."""
    num_particles: int | None
    target: Target
    """What the gradient is an estimate of. Only estimators with the same are compared."""
    num_draws: int
    mean: dict[str, np.ndarray]
    variance: dict[str, np.ndarray]
    directional_snr: float
    """Mean over draws of the squared length along the mean gradient over that across it."""
    effective_sample_size: float | None
    """Mean over the data, of the particles' weights; of the multi-sample objectives here."""
    seconds_per_gradient: float
    """Of wall-clock time, by the median draw; compilation left out."""
    reference: str | None
    """What the bias is measured against."""
    bias: dict[str, np.ndarray] | None
    bias_standard_errors: dict[str, np.ndarray] | None

    @property
    def signal_to_noise(self) -> dict[str, np.ndarray]:
        """|mean| over standard deviation; infinite without noise, 0 without either."""
        return {name: _ratio(np.abs(self.mean[name]), self.variance[name]) for name in self.mean}

    @property
    def snr(self) -> float:
        """The signal-to-noise ratio, averaged over all parameters that have a gradient at all."""
        ratios, moves = _flat(self.signal_to_noise), _flat(self.mean) != 0
        return float(np.mean(ratios[moves])) if moves.any() else 0.0

    @property
    def snr_floor(self) -> float:
        """What the ratio would be by chance, of so many draws without any signal."""
        return math.sqrt(2 / (math.pi * self.num_draws))

    @property
    def snr_per_second(self) -> float:
        """The ratio of the average of as many gradients as a second takes."""
        return self.snr / math.sqrt(self.seconds_per_gradient)

    @property
    def total_variance(self) -> float:
        """The sum over all parameters."""
        return float(np.sum(_flat(self.variance)))

    @property
    def total_bias(self) -> float | None:
        """Length of the bias; chance alone makes it about its standard error."""
        return None if self.bias is None else float(np.linalg.norm(_flat(self.bias)))

    @property
    def total_bias_standard_error(self) -> float | None:
        """Of the length of the bias."""
        errors = self.bias_standard_errors
        return None if errors is None else float(np.linalg.norm(_flat(errors)))

    def __str__(self) -> str:
        return str(EstimatorComparison((self,)))

    def _repr_html_(self) -> str:
        return EstimatorComparison((self,))._repr_html_()


class EstimatorComparison(NamedTuple):
    """Figures of several estimators; print it for a table and what it says."""

    statistics: tuple[GradientStatistics, ...]

    def to_frame(self) -> Any:
        """A pandas data frame with a row for each estimator."""
        import pandas

        rows = {one.name: _figures(one) for one in self.statistics}
        return pandas.DataFrame.from_dict(rows, orient="index")

    def plot(self) -> Any:
        """A matplotlib figure with every plot that there are figures for, side by side.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        from pyro_gradest.diagnostics.gradient_plots import plot_all

        return plot_all(self)

    @property
    def recommendations(self) -> tuple[str, ...]:
        """What to choose among estimators of the same gradient, and what that rests on."""
        groups: dict[Target, list[GradientStatistics]] = {}
        for one in self.statistics:
            groups.setdefault(one.target, []).append(one)
        sentences = [_recommend(group) for group in groups.values() if len(group) > 1]
        sentences += [_warn_of_bias(one) for one in self.statistics if is_biased(one)]
        if len(groups) > 1:
            targets = "; ".join(
                f"{', '.join(dict.fromkeys(one.family for one in group))}: {target.words}"
                for target, group in groups.items()
            )
            sentences.append(
                f"These are gradients of {len(groups)} different targets ({targets}). They are not "
                "ranked against each other: a large signal-to-noise ratio of one target says "
                "nothing about another. Compare what training with them ends at."
            )
        return tuple(sentences)

    def __str__(self) -> str:
        rows = self._rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, *(f"- {sentence}" for sentence in self.recommendations)])

    def _repr_html_(self) -> str:
        """What a notebook shows: the same as ``print``, whose lines are long."""
        header, *rows = self._rows()
        table = _html_row("th", header) + "".join(_html_row("td", row) for row in rows)
        sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in self.recommendations)
        return f"<table>{table}</table><ul>{sentences}</ul>"

    def _rows(self) -> list[list[str]]:
        header = ["", *_figures(self.statistics[0])]
        return [header] + [
            [one.name, *map(_cell, _figures(one).values())] for one in self.statistics
        ]


def _figures(one: GradientStatistics) -> dict[str, Any]:
    return {
        "target": one.target.words,
        "K": one.num_particles,
        "SNR": one.snr,
        "directional SNR": one.directional_snr,
        "variance": one.total_variance,
        "bias": one.total_bias,
        "± s.e.": one.total_bias_standard_error,
        "ESS": one.effective_sample_size,
        "ms": 1e3 * one.seconds_per_gradient,
        "SNR per s": one.snr_per_second,
    }


def _cell(figure: Any) -> str:
    if figure is None:
        return "-"
    return f"{figure:.3g}" if isinstance(figure, float) else str(figure)


def _html_row(tag: str, cells: list[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _recommend(group: list[GradientStatistics]) -> str:
    words = group[0].target.words
    seen = [one for one in group if shows_signal(one)]
    if not seen:
        return (
            f"For the {words} no signal shows in {group[0].num_draws} draws (by chance alone the "
            f"ratio would be {group[0].snr_floor:.2g}): raise num_draws before choosing."
        )
    if len(seen) == 1:
        return (
            f"For the {words} take {seen[0].name}: the signal of the others is lost in the noise."
        )
    # What is lost in the noise has the ratio of chance, which would rank what is cheap first.
    best, second, *_ = sorted(seen, key=lambda one: one.snr_per_second, reverse=True)
    basis = (
        f"{best.snr_per_second:.3g} against {second.snr_per_second:.3g} of {second.name}, at "
        f"{1e3 * best.seconds_per_gradient:.3g} and {1e3 * second.seconds_per_gradient:.3g} ms a "
        f"gradient"
    )
    if best.snr_per_second < CLEARLY_BETTER * second.snr_per_second:
        return f"For the {words} take {best.name} or {second.name}: SNR per second is {basis}."
    return f"For the {words} take {best.name}: its SNR per second is the largest, {basis}."


def shows_signal(one: GradientStatistics) -> bool:
    """Whether the ratio is beyond what chance would make it."""
    return one.snr >= NOTICEABLE * one.snr_floor


def is_biased(one: GradientStatistics) -> bool:
    """Whether the bias is beyond its standard error."""
    bias, error = one.total_bias, one.total_bias_standard_error
    return bias is not None and error is not None and bias > NOTICEABLE * error + 1e-12


def _warn_of_bias(one: GradientStatistics) -> str:
    return (
        f"{one.name} is biased: by {one.total_bias:.3g} ± {one.total_bias_standard_error:.2g}, "
        f"against {one.reference}; its mean has length {np.linalg.norm(_flat(one.mean)):.3g}."
    )


def _flat(by_parameter: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([np.ravel(value) for value in by_parameter.values()])


def _ratio(size: Any, variance: Any) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(size == 0, 0.0, size / np.sqrt(variance))
