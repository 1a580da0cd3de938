"""The look of all figures: grey on no background, to be read on a light page and on a dark one."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

__all__ = ["plt", "save"]

_GREY = "#808080"
plt.rcParams.update(
    {
        "axes.edgecolor": _GREY,
        "axes.labelcolor": _GREY,
        "axes.titlecolor": _GREY,
        "figure.constrained_layout.use": True,
        "font.size": 11,
        "grid.alpha": 0.3,
        "legend.framealpha": 0.0,
        "legend.labelcolor": _GREY,
        "savefig.transparent": True,
        "svg.hashsalt": "safegrad_optim",  # the same file from the same numbers
        "xtick.color": _GREY,
        "ytick.color": _GREY,
    }
)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as SVG, and close it."""
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
