"""Charts of a run's machines: utilisation of processors, memory, network and GPUs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from phi4.track.report.colours import run_colour
from phi4.track.report.curves import Curve, curve_of
from phi4.track.report.figure import Chart, Trace, decimation_note, numbers, plot_text
from phi4.track.report.quantities import time_unit
from phi4.track.report.reported_run import MOST_NODES, ReportedRun


class _Unit(NamedTuple):
    """Samples in the same unit, which share a chart.

    Attributes:
        suffix: suffix of their keys.
        title: title of the chart.
        factor: conversion from the unit of the sample to that of the chart.
        axis: axis label of the chart.
    """

    suffix: str
    title: str
    factor: float
    axis: Mapping[str, Any]


_UNITS = (
    _Unit("_percent", "load", 1.0, {"ticksuffix": "%"}),
    _Unit("_bytes_per_second", "network (MB/s)", 1e-6, {}),
    _Unit("_watts", "power (W)", 1.0, {}),
    _Unit("_celsius", "temperature (°C)", 1.0, {}),
)


def system_charts(run: ReportedRun, limit: int) -> list[Chart]:
    """Return the charts of every machine, up to a limit.

    Args:
        run: to draw.
        limit: maximum number of points of a curve.
    """
    return [
        chart
        for number, (node, samples) in enumerate(run.samples.items())
        for chart in _node_charts(run, number, node, list(map(_with_memory, samples)), limit)
    ]


def _with_memory(sample: Mapping[str, Any]) -> Mapping[str, Any]:
    used, total = (sample.get(f"memory_{what}_bytes") for what in ("used", "total"))
    return {**sample, "memory_percent": 100 * used / total} if used and total else sample


def _node_charts(
    run: ReportedRun, number: int, node: str, samples: Sequence[Mapping[str, Any]], limit: int
) -> Iterator[Chart]:
    keys = sorted({key for sample in samples for key in sample})
    for index, unit in enumerate(_UNITS):
        drawn = {
            key.removesuffix(unit.suffix): curve_of(samples, key, run.began_unix).decimated(limit)
            for key in keys
            if key.endswith(unit.suffix)
        }
        drawn = {
            name: curve.scaled(unit.factor)
            for name, curve in drawn.items()
            if np.isfinite(curve.xs["seconds"]).any()
        }
        if not drawn:
            continue
        longest = max(np.nanmax(curve.xs["seconds"]) for curve in drawn.values())
        divisor, time_name = time_unit(longest)
        layout = {
            "xaxis": {"title": {"text": f"{time_name} since the first start"}},
            "yaxis": {"rangemode": "tozero", **unit.axis},
        }
        notes = decimation_note(list(drawn.values()))
        if run.num_nodes > MOST_NODES:
            notes.append(f"The first {MOST_NODES} of {run.num_nodes} machines are shown.")
        yield Chart(
            f"run-{run.index}-system-{number}-{index}",
            f"{node.replace('_', ' ')}: {unit.title}",
            [_trace(at, *found, divisor) for at, found in enumerate(drawn.items())],
            layout,
            notes,
        )


def _trace(index: int, name: str, curve: Curve, divisor: float) -> Trace:
    plot = {
        "type": "scatter",
        "mode": "lines" if curve.values.size > 1 else "markers",
        "name": plot_text(name.replace("_", " ")),
        "x": numbers(curve.xs["seconds"] / divisor),
        "y": numbers(curve.values),
        "line": {"color": run_colour(index), "width": 1.6},
        "marker": {"color": run_colour(index), "size": 7},
    }
    return Trace(plot)
