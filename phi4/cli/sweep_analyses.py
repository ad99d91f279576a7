"""The analyses of `phi4 sweep table`: as tables for people, as numbers, and as a picture."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from phi4.errors import ConfigError
from phi4.launch.sweep import Analysis, SweepFile
from phi4.track.sweep.learning_rate import OptimumFit, PowerLaw, fit_power_law, fit_scale
from phi4.track.sweep.pictures import draw_learning_rates, draw_ranks, draw_table
from phi4.track.sweep.ranks import rank_correlations
from phi4.track.sweep.results import Result, names_of
from phi4.track.sweep.table import Cell, MeanInterval, sweep_table

_RATE_KEY = "optim.learning_rate"


@dataclass(frozen=True)
class ShownAnalysis:
    """What an analysis found.

    Attributes:
        shown: tables and lines, in order.
        numbers: the same for programs; NaN and infinities are None.
        draw: writes the picture into a file, and returns it.
    """

    shown: Sequence[Table | str]
    numbers: dict[str, Any]
    draw: Callable[[Path], Path]


def analysis_of(
    kind: Analysis, sweep: SweepFile, results: Sequence[Result], *, num_missing: int
) -> ShownAnalysis:
    """An analysis of the ended runs.

    Raises:
        ConfigError: the sweep is not of the form that the analysis needs.
    """
    make = {"table": _table, "ranks": _ranks, "learning_rate": _learning_rate}[kind]
    found = make(sweep, results)
    missing = [f"{num_missing} runs have not ended and are left out"] if num_missing else []
    numbers = {"sweep": sweep.name, "analysis": kind, "num_missing": num_missing, **found.numbers}
    return ShownAnalysis([*found.shown, *missing], _finite(numbers), found.draw)


def _table(sweep: SweepFile, results: Sequence[Result]) -> ShownAnalysis:
    found = sweep_table(results, sweep.metrics, baseline=sweep.baseline, maximize=sweep.maximize)
    shown = Table("", *(f"{metric}\n{scale}" for scale, metric in found.columns), box=SIMPLE_HEAD)
    for variant in found.variants:
        cells = [found.cells[variant].get(column) for column in found.columns]
        shown.add_row(variant, *("" if cell is None else _cell(cell) for cell in cells))
    how = "seed by seed" if found.is_paired else "of means over different seeds (Welch)"
    note = (
        f"mean over seeds; in brackets the difference to {found.baseline} ± half of its 95% "
        f"interval, {how}; bold and *: best"
    )
    numbers = {
        "baseline": found.baseline,
        "paired": found.is_paired,
        "cells": [asdict(cell) for row in found.cells.values() for cell in row.values()],
    }
    return ShownAnalysis(
        [shown, note], numbers, lambda out: draw_table(found, sweep.metrics[0], out)
    )


def _cell(cell: Cell) -> str:
    if cell.num_diverged:
        return f"diverged ({cell.num_diverged} of {cell.num_runs})"
    text = f"{cell.mean.mean:.4f}"
    if cell.rank == 1:
        # The star is for where the output has no bold.
        text = f"[bold]{text}[/bold]*"
    if cell.difference is None:
        return text
    return f"{text} ({_with_half_width(cell.difference)})"


def _with_half_width(estimate: MeanInterval) -> str:
    if math.isnan(estimate.mean):
        return "the baseline diverged"
    half = "" if math.isnan(estimate.half_width) else f" ± {estimate.half_width:.4f}"
    return f"{estimate.mean:+.4f}{half}"


def _ranks(sweep: SweepFile, results: Sequence[Result]) -> ShownAnalysis:
    found = rank_correlations(results, sweep.metrics[0])
    if not found:
        raise ConfigError("analysis ranks compares scales; give the sweep two or more")
    shown = Table("scales", "variants", "Spearman", "Kendall", "by chance", box=SIMPLE_HEAD)
    for one in found:
        share = "" if math.isnan(one.p_value) else f"{one.p_value:.3g}"
        shown.add_row(
            " and ".join(one.scales),
            str(len(one.variants)),
            f"{one.spearman:.3f} {_interval(one.spearman_interval)}",
            f"{one.kendall:.3f} {_interval(one.kendall_interval)}",
            share if one.is_exact else f"about {share}",
        )
    note = (
        f"of {sweep.metrics[0]}, means over {found[0].num_seeds} seeds; 95% intervals by "
        "resampling seeds; by chance: share of orders of the variants that agree as well"
    )
    numbers = {"metric": sweep.metrics[0], "pairs": [asdict(one) for one in found]}
    return ShownAnalysis([shown, note], numbers, lambda out: draw_ranks(results, found, out))


def _interval(bounds: tuple[float, float]) -> str:
    return "" if math.isnan(bounds[0]) else f"({bounds[0]:.3f} to {bounds[1]:.3f})"


def _learning_rate(sweep: SweepFile, results: Sequence[Result]) -> ShownAnalysis:
    axes = [name for name, axis in sweep.axes.items() if axis.key == _RATE_KEY]
    if not axes or len(sweep.axes) > 1:
        have = ", ".join(f"{name} ({axis.key or 'sets'})" for name, axis in sweep.axes.items())
        raise ConfigError(
            f"analysis learning_rate takes one axis, with key = {_RATE_KEY!r}; this sweep has "
            f"{have}"
        )
    metric = sweep.metrics[0]
    fits = [fit_scale(results, scale, axes[0], metric) for scale in names_of(results)[1]]
    law = fit_power_law(fits)
    shown = Table("scale", "tokens", "best learning rate", "95% interval", metric, box=SIMPLE_HEAD)
    for fit in fits:
        if fit.problem:
            shown.add_row(fit.scale, f"{fit.tokens:,}", "none", fit.problem, "")
        else:
            interval = _rates(fit)
            shown.add_row(
                *(fit.scale, f"{fit.tokens:,}", f"{fit.optimum:.3g}", interval, f"{fit.loss:.4f}")
            )
    numbers: dict[str, Any] = {
        "metric": metric,
        "fits": [asdict(fit) for fit in fits],
        "power_law": asdict(law),
    }
    lines = [_law_line(law)]
    if sweep.predict_tokens and not law.problem:
        lines.append(_prediction(law, sweep.predict_tokens, max(fit.tokens for fit in fits)))
        centre, low, high = law.at(sweep.predict_tokens)
        numbers["prediction"] = {
            "tokens": sweep.predict_tokens,
            **{"optimum": centre, "low": low, "high": high},
        }
    return ShownAnalysis(
        [shown, *lines],
        numbers,
        lambda out: draw_learning_rates(fits, law, sweep.predict_tokens, metric, out),
    )


def _rates(fit: OptimumFit) -> str:
    if math.isnan(fit.low):
        return "needs more seeds or more rates"
    if math.isinf(fit.high):
        return "unbounded: the losses differ too little"
    return f"{fit.low:.3g} to {fit.high:.3g}"


def _law_line(law: PowerLaw) -> str:
    if law.problem:
        return f"no power law: {law.problem}"
    two = "; two budgets cannot say whether it is one" if law.num_budgets == 2 else ""
    return (
        f"best learning rate = {law.factor:.3g} x tokens^{law.exponent:.3f} (exponent "
        f"{law.exponent_low:.3f} to {law.exponent_high:.3f}){two}"
    )


def _prediction(law: PowerLaw, tokens: int, longest: int) -> str:
    centre, low, high = law.at(tokens)
    beyond = f", {tokens / longest:.1f} times the longest budget" if tokens > longest else ""
    return f"at {tokens:,} tokens{beyond}: {centre:.3g} ({low:.3g} to {high:.3g})"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
