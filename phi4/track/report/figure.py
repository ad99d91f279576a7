"""Charts of the page: plotly's traces and layout as plain JSON values."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from phi4.track.report.curves import Curve

DIGITS = 6
"""Significant digits of a drawn value."""

_LONGEST_TEXT = 120


@dataclass(frozen=True)
class Trace:
    """One curve or one set of markers.

    Attributes:
        plot: plotly's trace.
        xs: its x by name of `curves.X_AXES`, if the reader may choose the axis; else empty.
    """

    plot: Mapping[str, Any]
    xs: Mapping[str, Sequence[float | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        name: id of its element; of letters, digits and `-`.
        title: title above it.
        traces: traces in drawing order.
        layout: plotly's layout, in addition to the settings of all charts.
        notes: lines below it.
        is_wide: whether it spans the width of the page.
    """

    name: str
    title: str
    traces: Sequence[Trace]
    layout: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    is_wide: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the input of the page's script."""
        return {
            "name": self.name,
            "data": [dict(trace.plot) for trace in self.traces],
            "xs": [dict(trace.xs) for trace in self.traces],
            "layout": dict(self.layout),
        }


def numbers(values: np.ndarray) -> list[float | None]:
    """Convert values to JSON: NaN to null, integers exact, others with six digits."""
    return [_number(value) for value in values.tolist()]


def _number(value: float) -> float | None:
    if not math.isfinite(value):
        return None
    if value.is_integer() and abs(value) < 2**53:
        return int(value)
    return float(f"{value:.{DIGITS}g}")


def plot_text(text: str) -> str:
    """Escape text that plotly would interpret as HTML; truncate long text."""
    short = text if len(text) <= _LONGEST_TEXT else f"{text[: _LONGEST_TEXT - 1]}…"
    return html.escape(short, quote=False)


def line(curve: Curve, name: str, colour: str, *, dash: str = "solid", width: float = 1.6) -> Trace:
    """Make a curve over the axis that the reader chooses."""
    mode = "lines" if np.isfinite(curve.values).sum() > 1 else "markers"
    plot = {
        "type": "scatter",
        "mode": mode,
        "name": plot_text(name),
        "line": {"color": colour, "width": width, "dash": dash},
        "marker": {"color": colour, "size": 7},
        "x": numbers(curve.xs["tokens"]),
        "y": numbers(curve.values),
    }
    return Trace(plot, _choices(curve.xs))


def marked_line(curve: Curve, name: str, colour: str, *, dash: str, symbol: str) -> Trace:
    """Make a curve of few points, each with a marker."""
    drawn = line(curve, name, colour, dash=dash)
    marker = {"color": colour, "size": 7, "symbol": symbol}
    return Trace(dict(drawn.plot) | {"mode": "lines+markers", "marker": marker}, drawn.xs)


def markers(
    xs: Mapping[str, np.ndarray], y: np.ndarray, texts: Sequence[str], **style: Any
) -> Trace:
    """Make events, each with its own text.

    Args:
        xs: by name of `curves.X_AXES`.
        y: heights of the markers.
        texts: shown on hover.
        style: name, symbol, colour.
    """
    plot = {
        "type": "scatter",
        "mode": "markers",
        "name": plot_text(style["name"]),
        "marker": {
            "symbol": style["symbol"],
            "color": style["colour"],
            "size": 10,
            "line": {"width": 1.5, "color": style["colour"]},
        },
        "text": [plot_text(text) for text in texts],
        "hovertemplate": "%{text}<extra></extra>",
        "x": numbers(xs["tokens"]),
        "y": numbers(y),
    }
    return Trace(plot, _choices(xs))


def _choices(xs: Mapping[str, np.ndarray]) -> dict[str, list[float | None]]:
    return {name: numbers(x) for name, x in xs.items()}


def decimation_note(curves: Sequence[Curve], what: str = "") -> list[str]:
    """Return a note about how much of the record is drawn; None if all of it is."""
    longest = max(
        (curve for curve in curves if curve.is_decimated),
        key=lambda curve: curve.num_points,
        default=None,
    )
    if longest is None:
        return []
    drawn = int(np.isfinite(longest.values).sum())
    return [
        f"Decimated{what}: up to {drawn:,} of {longest.num_points:,} points of a curve are drawn, "
        "the smallest and the largest value of every bin among them."
    ]
