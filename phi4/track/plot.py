"""Plots: the loss curve of a run from metrics.jsonl, and bar charts."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from phi4.rundir.step_log import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_losses(metrics: Path, out: Path) -> Path:
    """Draw training and held-out loss over tokens; returns `out` (PNG).

    Raises:
        DataError: the metrics file is missing or damaged.
    """
    steps = read_metrics(metrics)
    figure, axes = _axes()
    axes.plot(
        [s["consumed_tokens"] for s in steps], [s["loss"] for s in steps], lw=1, label="training"
    )
    for key in sorted({key for s in steps for key in s if key.startswith("held_out_loss")}):
        points = [(s["consumed_tokens"], s[key]) for s in steps if key in s]
        label = key.replace("held_out_loss", "held out").replace("/", ": ")
        axes.plot(*zip(*points, strict=True), "o--", ms=4, lw=1, label=label)
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out)
    return out


class Bars(NamedTuple):
    """Bars of one colour.

    Attributes:
        label: label in the legend.
        heights: one per group.
        errors: standard errors of the heights.
    """

    label: str
    heights: Sequence[float]
    errors: Sequence[float]


def draw_bars(groups: Sequence[str], bars: Sequence[Bars], title: str, out: Path) -> Path:
    """Draw groups of bars with their standard errors; returns `out` (PNG).

    Args:
        groups: names below the bars.
        bars: bars next to each other in every group.
        title: what the heights are, from 0 to 1.
        out: output file.
    """
    figure, axes = _axes()
    width = 0.8 / len(bars)
    for index, one in enumerate(bars):
        places = [group + (index + 0.5) * width - 0.4 for group in range(len(groups))]
        drawn = axes.bar(places, one.heights, width, yerr=one.errors, capsize=3, label=one.label)
        axes.bar_label(drawn, fmt="%.2f", padding=2, fontsize=8)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylim(0, 1.1)
    axes.set_ylabel(title)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="upper left")
    figure.savefig(out)
    return out


def _axes() -> tuple["Figure", "Axes"]:
    """Return a figure for a machine without a display."""
    # Importing it takes half a second.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()
