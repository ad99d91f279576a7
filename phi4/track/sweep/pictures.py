"""Plots of a sweep's analyses."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from phi4.track.sweep.learning_rate import OptimumFit, PowerLaw
from phi4.track.sweep.ranks import RankCorrelation
from phi4.track.sweep.results import Result, by_cell
from phi4.track.sweep.table import SweepTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LABELLED = 12
"""Maximum number of points that a legend lists; more would hide them."""


def draw_table(table: SweepTable, metric: str, out: Path) -> Path:
    """Plot every variant's difference to the baseline with its interval, a panel per scale.

    Args:
        table: table to plot.
        metric: metric of its columns.
        out: file (PNG); returned.
    """
    scales = [scale for scale, name in table.columns if name == metric]
    height = 1.6 + 0.32 * len(table.variants)
    figure, axes = _figure(len(scales), height)
    for panel, scale in zip(axes, scales, strict=True):
        for row, variant in enumerate(table.variants):
            cell = table.cells[variant].get((scale, metric))
            if cell is None:
                continue
            if cell.num_diverged:
                text = f"{cell.num_diverged} of {cell.num_runs} diverged"
                panel.text(0.5, row, text, va="center", transform=panel.get_yaxis_transform())
            elif cell.difference is None:
                panel.plot(0, row, "k|", ms=14)
            else:
                half = cell.difference.half_width
                shown = [[0.0 if math.isnan(half) else half]]
                panel.errorbar(cell.difference.mean, row, xerr=shown, fmt="o", ms=5, capsize=3)
        panel.axvline(0, color="0.6", lw=1, zorder=0)
        panel.set_title(scale, fontsize=10)
        panel.set_yticks(range(len(table.variants)), table.variants)
        panel.set_xlabel(f"{metric}, difference to {table.baseline}")
        panel.grid(axis="x", alpha=0.3)
    # The first variant on top, as in the table.
    axes[0].invert_yaxis()
    for panel in axes[1:]:
        panel.set_ylim(axes[0].get_ylim())
        panel.tick_params(labelleft=False)
    figure.savefig(out)
    return out


def draw_ranks(
    results: Sequence[Result], correlations: Sequence[RankCorrelation], out: Path
) -> Path:
    """Plot the variants' means, with standard errors, at one scale over those at another.

    Args:
        results: results of the runs.
        correlations: correlations of their scales, a panel each.
        out: file (PNG); returned.
    """
    figure, axes = _figure(len(correlations), 4.2)
    for panel, found in zip(axes, correlations, strict=True):
        cells = by_cell(results, found.metric)
        num_diverged = 0
        for variant in found.variants:
            pair = [np.array(list(cells[variant, scale].values())) for scale in found.scales]
            if any(np.isnan(values).any() for values in pair):
                num_diverged += 1
                continue
            (x, y), (x_error, y_error) = (
                [values.mean() for values in pair],
                [
                    values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0
                    for values in pair
                ],
            )
            label = variant if len(found.variants) <= _LABELLED else None
            panel.errorbar(x, y, xerr=x_error, yerr=y_error, fmt="o", ms=5, capsize=3, label=label)
        if len(found.variants) <= _LABELLED:
            panel.legend(fontsize=8)
        diverged = f", {num_diverged} diverged" if num_diverged else ""
        panel.set_title(
            f"Spearman {found.spearman:.2f}, Kendall {found.kendall:.2f}{diverged}", fontsize=10
        )
        panel.set_xlabel(f"{found.metric}, {found.scales[0]}")
        panel.set_ylabel(f"{found.metric}, {found.scales[1]}")
        panel.margins(0.15)
        panel.grid(alpha=0.3)
    figure.savefig(out)
    return out


def draw_learning_rates(
    fits: Sequence[OptimumFit],
    law: PowerLaw,
    predict_tokens: int | None,
    metric: str,
    out: Path,
) -> Path:
    """Plot the losses with their parabolas, and the optimum over the token budget.

    Args:
        fits: fits of the scales.
        law: over them.
        predict_tokens: budget to predict the optimum for, or None.
        metric: name of the losses.
        out: file (PNG); returned.
    """
    figure, (curves, optima) = _figure(2, 4.2)
    for number, fit in enumerate(fits):
        colour = f"C{number}"
        curves.plot(fit.rates, fit.means, "o", color=colour, ms=5, label=_budget(fit))
        if fit.problem:
            continue
        grid = np.geomspace(*fit.window, 100)
        height = fit.loss + fit.curvature * np.log(grid / fit.optimum) ** 2
        curves.plot(grid, height, color=colour, lw=1)
        curves.plot(fit.optimum, fit.loss, "v", color=colour, ms=8)
        bars = [[fit.optimum - fit.low], [fit.high - fit.optimum]] if fit.is_bounded else None
        optima.errorbar(fit.tokens, fit.optimum, yerr=bars, fmt="v", color=colour, ms=8, capsize=3)
    if not law.problem:
        _draw_law(optima, law, [fit.tokens for fit in fits], predict_tokens)
    for panel, x, y in (
        (curves, "learning rate", metric),
        (optima, "tokens", "best learning rate"),
    ):
        panel.set_xscale("log")
        panel.set_xlabel(x)
        panel.set_ylabel(y)
        panel.grid(alpha=0.3, which="both")
    optima.set_yscale("log")
    curves.set_xticks(fits[0].rates, [f"{rate:g}" for rate in fits[0].rates], fontsize=8)
    budgets = [fit.tokens for fit in fits] + ([predict_tokens] if predict_tokens else [])
    optima.set_xticks(budgets, [f"{tokens:,}" for tokens in budgets], fontsize=8)
    for panel in (curves, optima):
        # A minor tick's label would overlap its neighbour's.
        panel.xaxis.minorticks_off()
    curves.legend(fontsize=8)
    figure.savefig(out)
    return out


def _draw_law(
    panel: "Axes", law: PowerLaw, budgets: Sequence[int], predict_tokens: int | None
) -> None:
    ends = [*budgets, *([predict_tokens] if predict_tokens else [])]
    grid = np.geomspace(min(ends), max(ends), 50)
    centre, low, high = np.array([law.at(tokens) for tokens in grid]).T
    panel.plot(grid, centre, color="0.3", lw=1, label=f"tokens^{law.exponent:.2f}")
    panel.fill_between(grid, low, high, color="0.3", alpha=0.15, label="95%")
    if predict_tokens:
        panel.plot(predict_tokens, law.at(predict_tokens)[0], "k*", ms=11, label="prediction")
    panel.legend(fontsize=8)


def _budget(fit: OptimumFit) -> str:
    note = " (no optimum)" if fit.problem else ""
    return f"{fit.scale}: {fit.tokens:,} tokens{note}"


def _figure(num_panels: int, height: float) -> tuple["Figure", list["Axes"]]:
    """Return panels next to each other, on a machine without a display."""
    # Importing it takes half a second.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = 1.5 + 4.2 * num_panels
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, num_panels, squeeze=False)[0])
