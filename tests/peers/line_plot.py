"""What the plots of lines share: axes with names, and a file with the same bytes every time."""

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes


def named_axis(x_label: str, y_label: str) -> Axes:
    """The axis of a new figure, to plot lines on."""
    mpl.rcParams["svg.hashsalt"] = "dbllm"  # the same bytes for the same figures
    _, axis = plt.subplots(figsize=(7, 4.2))
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    return axis


def save_plot(axis: Axes, plot: Path) -> None:
    """Write the axis' figure, with a legend of its lines."""
    axis.legend()
    axis.figure.tight_layout()
    plot.parent.mkdir(exist_ok=True)
    axis.figure.savefig(plot, metadata={"Date": None})
