"""Charts of a single run: timeline of the wall time, data by source, norms, memory."""

from collections.abc import Mapping, Sequence
from typing import Any

from phi4.rundir.goodput import spans_of
from phi4.track.report.colours import BUCKETS, HATCHES, run_colour
from phi4.track.report.curves import curve_of
from phi4.track.report.figure import Chart, Trace, decimation_note, line, numbers, plot_text
from phi4.track.report.quantities import time_unit
from phi4.track.report.reported_run import ReportedRun
from phi4.track.report.system_charts import system_charts
from phi4.track.report.timeline import timeline_of

MOST_LABELS = 30
"""Maximum number of attempts that the timeline labels; more would overlap."""


_GIB = 2.0**30
_MEMORY_AXIS = {"title": {"text": "GiB"}, "rangemode": "tozero"}


def run_charts(run: ReportedRun, limit: int) -> dict[str, list[Chart]]:
    """Return the charts with data, by their section.

    Args:
        run: to draw.
        limit: maximum number of points of a curve.
    """
    sections = {
        "goodput": [_timeline(run)],
        "data": [_ledger(run, limit)],
        "model": [
            _family(run, limit, "grad_norm/", "Gradient norm by group", {"type": "log"}),
            _family(run, limit, "memory/", "Memory by kind", _MEMORY_AXIS),
            _family(run, limit, "rewards/", "Rewards", {}),
            _family(run, limit, "logps/", "Log-probabilities of answers", {}),
        ],
        "system": system_charts(run, limit),
    }
    return {name: [chart for chart in charts if chart.traces] for name, charts in sections.items()}


def _name(run: ReportedRun, name: str) -> str:
    return f"run-{run.index}-{name}"


def _timeline(run: ReportedRun) -> Chart:
    spans = list(spans_of(run.record))
    timeline = timeline_of(spans)
    title = "Wall time by bucket, over time"
    if timeline is None:
        return Chart(_name(run, "timeline"), title, [])
    divisor, unit = time_unit(timeline.edges[-1])
    width = timeline.edges[1]
    middles = (timeline.edges[:-1] + timeline.edges[1:]) / 2 / divisor
    traces = []
    for name, seconds in timeline.seconds.items():
        if not seconds.any():
            continue
        marker: dict[str, Any] = {"color": BUCKETS[name], "line": {"width": 0}}
        if name in HATCHES:
            marker["pattern"] = {
                **{"shape": HATCHES[name], "size": 6, "solidity": 0.3},
                **{"fillmode": "overlay", "fgcolor": "rgba(255,255,255,0.55)"},
            }
        plot = {
            "type": "bar",
            "name": name.replace("_", " "),
            "x": numbers(middles),
            "y": numbers(seconds / width),
            "width": float(f"{width / divisor:.8g}"),
            "marker": marker,
        }
        traces.append(Trace(plot))
    starts = [
        (number, (attempt.started_unix - spans[0].began_unix) / divisor)
        for number, attempt in sorted(run.record.attempts.items())
        if attempt.started_unix
    ]
    layout = {
        "barmode": "stack",
        "bargap": 0,
        "xaxis": {"title": {"text": f"{unit} since the first start"}},
        "yaxis": {"tickformat": ".0%", "range": [0, 1.0], "title": {"text": "share of wall time"}},
        **_start_marks(starts),
    }
    notes = ("Dashed lines and numbers: the start of each attempt.",)
    return Chart(_name(run, "timeline"), title, traces, layout, notes, is_wide=True)


def _start_marks(starts: Sequence[tuple[int, float]]) -> dict[str, Any]:
    shapes = [
        {
            **{"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper"},
            "line": {"width": 1, "dash": "dash", "color": "#7a8290"},
        }
        for _, x in starts
    ]
    labels = [
        {
            **{"x": x, "y": 1, "yref": "paper", "yanchor": "bottom", "showarrow": False},
            "text": str(number),
        }
        for number, x in starts
    ]
    return {"shapes": shapes, "annotations": labels if len(labels) <= MOST_LABELS else []}


def _ledger(run: ReportedRun, limit: int) -> Chart:
    """Return the fraction of every source: from the meter, or else from the lines of the ledger."""
    keys = run.lines.keys_under("data/")
    lines, names = run.record.steps, {key: key.removeprefix("data/") for key in keys}
    what = "tokens drawn"
    if not keys:
        lines, names = _fractions(run.ledger_lines)
        what = "loss tokens drawn"
    traces, curves = [], []
    for index, (key, name) in enumerate(sorted(names.items())):
        curve = curve_of(lines, key, 0.0).decimated(limit)
        if not curve.values.size:
            continue
        plot = {
            "type": "scatter",
            "mode": "lines" if curve.values.size > 1 else "markers",
            "name": plot_text(name),
            "x": numbers(curve.xs["step"]),
            "y": numbers(curve.values),
            "line": {"color": run_colour(index), "width": 1.6},
            "marker": {"color": run_colour(index), "size": 7},
        }
        traces.append(Trace(plot))
        curves.append(curve)
    layout = {
        "xaxis": {"title": {"text": "step"}},
        "yaxis": {"tickformat": ".0%", "rangemode": "tozero"},
    }
    notes = [f"Of all {what} since the data ledger began.", *decimation_note(curves)]
    return Chart(_name(run, "ledger"), "Data drawn, by source", traces, layout, notes)


def _fractions(
    lines: Sequence[Mapping[str, Any]],
) -> tuple[list[dict[str, float]], dict[str, str]]:
    """Return fractions of the loss tokens since the beginning, from lines of ledger.jsonl."""
    prefix = "loss_tokens/"
    found: list[dict[str, float]] = []
    names: dict[str, str] = {}
    for one in lines:
        counts = {key: value for key, value in one.items() if key.startswith(prefix)}
        total = sum(counts.values())
        if total:
            found.append({"step": one["step"]} | {k: v / total for k, v in counts.items()})
            names |= {key: key.removeprefix(prefix) for key in counts}
    return found, names


def _family(
    run: ReportedRun, limit: int, prefix: str, title: str, axis: Mapping[str, Any]
) -> Chart:
    """Return curves of all keys under a prefix."""
    traces, curves = [], []
    for index, key in enumerate(run.lines.keys_under(prefix)):
        curve = run.lines.curve(key).decimated(limit)
        if prefix == "memory/":
            curve = curve.scaled(1 / _GIB)
        if curve.values.size:
            name = key.removeprefix(prefix).replace("_", " ")
            traces.append(line(curve, name, run_colour(index)))
            curves.append(curve)
    name = _name(run, prefix.strip("/").replace("_", "-"))
    return Chart(name, title, traces, {"yaxis": dict(axis)}, decimation_note(curves))
