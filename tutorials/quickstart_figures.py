"""The quickstart's figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's palette: told apart by colour-blind readers, and by line style in grey.
STYLES = {
    "OVIS": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "VIMCO": {"color": "#E69F00", "linestyle": "--", "marker": "s"},
    "score function": {"color": "#666666", "linestyle": ":", "marker": "^"},
}
STYLE_SHEET = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 2.0,
    "legend.frameon": False,
    "savefig.dpi": 160,
}


def save(
    folder: Path,
    *,
    curves: Mapping[str, Sequence[float]],
    bounds: Mapping[str, float],
    snr_particles: Sequence[int],
    snr: Mapping[str, Sequence[float]],
    originals: np.ndarray,
    reconstructions: np.ndarray,
    samples: np.ndarray,
) -> list[Path]:
    """Write one PNG a panel and one overview with all of them; return their paths."""
    panels = {
        "training": lambda ax: draw_curves(ax, curves, bounds),
        "gradient_snr": lambda ax: draw_snr(ax, snr_particles, snr),
        "reconstructions": lambda ax: draw_reconstructions(ax, originals, reconstructions),
        "samples": lambda ax: draw_samples(ax, samples),
    }
    paths = []
    with plt.rc_context(STYLE_SHEET):
        for name, draw in panels.items():
            figure, ax = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
            draw(ax)
            paths.append(_write(figure, folder / f"{name}.png"))
        figure, axes = plt.subplot_mosaic(
            [["training", "gradient_snr"], ["reconstructions", "samples"]],
            figsize=(10.5, 5.7),
            height_ratios=[3.2, 1],
            layout="constrained",
        )
        for name, draw in panels.items():
            draw(axes[name])
        paths.append(_write(figure, folder / "overview.png"))
    return paths


def draw_curves(
    ax: Axes, curves: Mapping[str, Sequence[float]], bounds: Mapping[str, float]
) -> None:
    """Bound against epoch, with the held-out bound at the right."""
    for name, curve in curves.items():
        style = {**STYLES[name], "marker": None}
        label = f"{name}, held out {bounds[name]:.1f}"
        ax.plot(range(1, len(curve) + 1), curve, label=label, **style)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="epoch", ylabel="bound, nats per image", title="Training on 4,500 digits")
    ax.legend()


def draw_snr(ax: Axes, particles: Sequence[int], snr: Mapping[str, Sequence[float]]) -> None:
    """Signal-to-noise ratio of the guide's gradient against K."""
    for name, values in snr.items():
        ax.loglog(particles, values, label=name, **STYLES[name])
    ax.set_xticks(particles, [str(k) for k in particles])
    ax.minorticks_off()
    ax.set(
        xlabel="particles K",
        ylabel=r"$\Vert\mathrm{E}\,g\Vert\ /\ \sqrt{\mathrm{tr\ Cov}\ g}$",
        title="Signal-to-noise ratio of the guide's gradient",
    )
    ax.legend()


def draw_reconstructions(ax: Axes, originals: np.ndarray, reconstructions: np.ndarray) -> None:
    """Held-out digits above what the network makes of them."""
    _show_images(ax, np.concatenate([originals, reconstructions]), num_columns=len(originals))
    ax.set_title("Held-out digits, and their reconstructions")


def draw_samples(ax: Axes, samples: np.ndarray) -> None:
    """Digits drawn from the model."""
    _show_images(ax, samples, num_columns=10)
    ax.set_title("Drawn from the model")


def _show_images(ax: Axes, images: np.ndarray, *, num_columns: int) -> None:
    rows = np.asarray(images).reshape(-1, num_columns, 28, 28)
    padded = np.pad(rows, ((0, 0), (0, 0), (2, 2), (2, 2)))
    ax.imshow(np.concatenate(np.concatenate(padded, axis=1), axis=1), cmap="gray_r", vmin=0, vmax=1)
    ax.axis("off")


def _write(figure: plt.Figure, path: Path) -> Path:
    figure.savefig(path)
    plt.close(figure)
    return path
