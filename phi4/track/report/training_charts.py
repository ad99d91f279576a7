"""Charts of training with all runs: loss, learning rate, gradient norm, throughput."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from phi4.track.report.colours import EVENTS, run_colour
from phi4.track.report.curves import Curve, Line, curve_of, joined, undone_parts, x_values
from phi4.track.report.figure import Chart, Trace, decimation_note, line, marked_line, markers
from phi4.track.report.reported_run import ReportedRun

HELD_OUT = "held_out_loss"
SKIPPED = "skipped step"

_DASHES = ("dot", "dash", "dashdot", "longdash", "longdashdot")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross")
_FAINT = 0.35

_BLOCKS = 150
"""Number of means of a long curve."""


def training_charts(runs: Sequence[ReportedRun], limit: int) -> list[Chart]:
    """Return the charts with data.

    Args:
        runs: runs to compare.
        limit: maximum number of points of a curve.
    """
    charts = [
        _loss(runs, limit),
        _plain(runs, limit, "learning_rate", "Learning rate"),
        _gradient_norm(runs, limit),
        _throughput(runs, limit),
        _plain(runs, limit, "model_tflops_per_gpu", "Model TFLOP/s per GPU", rangemode="tozero"),
        _utilisation(runs, limit),
    ]
    return [chart for chart in charts if chart.traces]


def _loss(runs: Sequence[ReportedRun], limit: int) -> Chart:
    traces: list[Trace] = []
    shown: list[np.ndarray] = []
    notes: list[str] = []
    for run in runs:
        traces += _undone(runs, run, limit)
    for run in runs:
        curve = run.lines.curve("loss").decimated(limit)
        if curve.values.size:
            traces += _training(runs, run, curve)
            notes += decimation_note([curve], _of(runs, run))
            shown.append(curve.values)
        if curve.num_not_finite:
            where = _of(runs, run)
            notes.append(f"{curve.num_not_finite:,} losses{where} are NaN or infinite: no point.")
        traces += _held_out(runs, run, limit, shown)
    traces += _events(runs)
    is_nats = all(run.record.recipe.run.stage != "dpo" for run in runs)
    axis: dict[str, Any] = {"title": {"text": f"loss{' (nats per token)' if is_nats else ''}"}}
    if (view := _view(shown)) is not None:
        axis |= {"range": list(view)}
        notes.append(
            f"The view ends at {view[1]:.4g}; a double click on the chart shows the values above."
        )
    return Chart("loss", "Loss", traces, {"yaxis": axis}, notes, is_wide=True)


def _training(runs: Sequence[ReportedRun], run: ReportedRun, curve: Curve) -> list[Trace]:
    """Return the curve; for a long one also the mean of blocks of steps, which shows the trend."""
    whole = run.lines.curve("loss")
    num_block = whole.values.size // _BLOCKS
    if num_block < 2:
        return [line(curve, _named(runs, run, "training"), run.colour)]
    every = line(curve, _named(runs, run, "training, every step"), run.colour, width=1)
    means = whole.block_means(num_block)
    name = _named(runs, run, f"training, mean of {num_block:,} steps")
    return [
        Trace(dict(every.plot) | {"opacity": _FAINT}, every.xs),
        line(means, name, run.colour, width=2),
    ]


def _undone(runs: Sequence[ReportedRun], run: ReportedRun, limit: int) -> list[Trace]:
    curve = joined(
        curve_of(part, "loss", run.began_unix).decimated(_share(limit, part, run.undone))
        for part in undone_parts(run.undone)
    )
    if not curve.values.size:
        return []
    trace = line(curve, "undone steps", run.colour, width=1)
    first = next(one for one in runs if one.undone)
    look = {"opacity": _FAINT, "legendgroup": "undone", "showlegend": run is first}
    return [Trace(dict(trace.plot) | look, trace.xs)]


def _held_out(
    runs: Sequence[ReportedRun], run: ReportedRun, limit: int, shown: list[np.ndarray]
) -> list[Trace]:
    traces = []
    keys = run.lines.keys_under(HELD_OUT)
    if HELD_OUT in keys and (len(keys) == 2 or len(runs) > 1):
        keys = [HELD_OUT]  # One source equals the total; too many clutter.
    for index, key in enumerate(keys):
        curve = run.lines.curve(key).decimated(limit)
        if not curve.values.size:
            continue
        name = key.replace(HELD_OUT, "held out").replace("/", ": ", 1)
        # For one run the sources have colours; for several, the runs have them.
        colour = run.colour if len(runs) > 1 or not index else run_colour(index)
        look = {"dash": _DASHES[index % len(_DASHES)], "symbol": _SYMBOLS[index % len(_SYMBOLS)]}
        traces.append(marked_line(curve, _named(runs, run, name), colour, **look))
        shown.append(curve.values)
    return traces


def _events(runs: Sequence[ReportedRun]) -> list[Trace]:
    """Return skipped steps, rollbacks and resumes, at the loss that the curve had there."""
    kinds = (
        (SKIPPED, "x-thin-open", _skipped, _describe_skipped),
        ("roll back", "triangle-left-open", _rolled_back, _describe_roll_back),
        ("resume", "triangle-up-open", _resumed, _describe_resume),
    )
    traces = []
    for name, symbol, find, describe in kinds:
        is_first = True
        for run in runs:
            if lines := find(run):
                xs, y = x_values(lines, run.began_unix), _heights(run, lines)
                colour = run.colour if len(runs) > 1 else EVENTS[name]
                look = {"name": name, "symbol": symbol, "colour": colour}
                trace = markers(xs, y, [describe(one) for one in lines], **look)
                group = {"legendgroup": name, "showlegend": is_first}
                traces.append(Trace(dict(trace.plot) | group, trace.xs))
                is_first = False
    return traces


def _skipped(run: ReportedRun) -> list[Line]:
    every = sorted((*run.record.steps, *run.undone), key=lambda one: one["step"])
    return [one for one in every if one.get("skipped")]


def _rolled_back(run: ReportedRun) -> list[Line]:
    return [one for one in run.record.steps if one.get("rolled_back_from")]


def _resumed(run: ReportedRun) -> list[Line]:
    return [
        after
        for before, after in pairwise(run.record.steps)
        if after.get("attempt") != before.get("attempt") and "attempt" in before
    ]


def _describe_skipped(one: Line) -> str:
    return (
        f"step {one['step']}: update skipped, loss {one.get('loss', math.nan):.4g}, "
        f"gradient norm {one.get('grad_norm', math.nan):.4g}"
    )


def _describe_roll_back(one: Line) -> str:
    return (
        f"rolled back from step {one['rolled_back_from']:.0f} to {one['step'] - 1}, "
        f"{one.get('skipped_rows', 0):.0f} rows skipped"
    )


def _describe_resume(one: Line) -> str:
    return f"attempt {one['attempt']:.0f} resumes with step {one['step']}"


def _heights(run: ReportedRun, lines: Sequence[Line]) -> np.ndarray:
    """Return the last finite loss of the accepted history at each line's step."""
    curve = run.lines.curve("loss")
    if not curve.values.size:
        return np.zeros(len(lines))
    places = np.searchsorted(curve.xs["step"], [one["step"] for one in lines], side="right") - 1
    return curve.values[np.maximum(places, 0)]


def _view(shown: Sequence[np.ndarray]) -> tuple[float, float] | None:
    """Return the range of the axis if a few outliers would flatten the curve; None if all fits."""
    values = np.concatenate(shown) if shown else np.array([])
    if values.size < 20:
        return None
    low, bulk, high = values.min(), np.quantile(values, 0.99), values.max()
    if high - low <= 3 * (bulk - low) or bulk <= low:
        return None
    margin = 0.05 * (bulk - low)
    return float(low - margin), float(bulk + margin)


def _plain(runs: Sequence[ReportedRun], limit: int, key: str, title: str, **axis: Any) -> Chart:
    curves = [(run, run.lines.curve(key).decimated(limit)) for run in runs]
    curves = [(run, curve) for run, curve in curves if curve.values.size]
    traces = [
        line(curve, run.label if len(runs) > 1 else title.lower(), run.colour)
        for run, curve in curves
    ]
    notes = decimation_note([curve for _, curve in curves])
    return Chart(key.replace("_", "-"), title, traces, {"yaxis": axis}, notes)


def _gradient_norm(runs: Sequence[ReportedRun], limit: int) -> Chart:
    chart = _plain(runs, limit, "grad_norm", "Gradient norm", type="log")
    traces, notes = list(chart.traces), list(chart.notes)
    count = 0
    for run in runs:
        curve = run.lines.curve("grad_norm")
        count += curve.num_not_finite
        skipped = _skipped(run)
        if not skipped or not curve.values.size:
            continue
        norms = np.array([float(one.get("grad_norm", math.nan)) for one in skipped])
        # A norm that is not finite is drawn at the largest finite norm.
        y = np.where(np.isfinite(norms), norms, curve.values.max())
        texts = [_describe_skipped(one) for one in skipped]
        colour = run.colour if len(runs) > 1 else EVENTS[SKIPPED]
        look = {"symbol": "x-thin-open", "colour": colour}
        name = _named(runs, run, SKIPPED)
        traces.append(markers(x_values(skipped, run.began_unix), y, texts, name=name, **look))
    if count:
        notes.append(f"{count:,} norms are NaN or infinite; their crosses are at the largest norm.")
    return Chart(chart.name, chart.title, traces, chart.layout, notes)


def _throughput(runs: Sequence[ReportedRun], limit: int) -> Chart:
    return _plain(
        runs, limit, "tokens_per_second", "Tokens per second", rangemode="tozero", tickformat="~s"
    )


def _utilisation(runs: Sequence[ReportedRun], limit: int) -> Chart:
    traces, curves = [], []
    for run in runs:
        for key, words, dash in (
            ("mfu_causal", "causal", "solid"),
            ("mfu_full", "full attention counted", "dot"),
        ):
            curve = run.lines.curve(key).decimated(limit)
            if curve.values.size:
                traces.append(line(curve, _named(runs, run, words), run.colour, dash=dash))
                curves.append(curve)
    layout = {"yaxis": {"tickformat": ".0%", "rangemode": "tozero"}}
    return Chart("mfu", "Model FLOPs utilisation (MFU)", traces, layout, decimation_note(curves))


def _named(runs: Sequence[ReportedRun], run: ReportedRun, what: str) -> str:
    return f"{run.label}: {what}" if len(runs) > 1 else what


def _of(runs: Sequence[ReportedRun], run: ReportedRun) -> str:
    return f" of {run.label}" if len(runs) > 1 else ""


def _share(limit: int, part: Sequence[Line], whole: Sequence[Line]) -> int:
    """Return the share of points of a part of a curve that is drawn in parts."""
    return max(4, limit * len(part) // max(len(whole), 1))
