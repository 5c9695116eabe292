"""How the tutorials' plots look."""

import matplotlib.pyplot as plt

# Okabe and Ito's palette: told apart by colour-blind readers.
BLUE, SKY, ORANGE, GREEN = "#0072B2", "#56B4E9", "#E69F00", "#009E73"
RED, PINK, GREY = "#D55E00", "#CC79A7", "#666666"

STYLE_SHEET = {
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 2.0,
    "legend.frameon": False,
}


def use() -> None:
    """Draw in this style from here on."""
    plt.rcParams |= STYLE_SHEET
