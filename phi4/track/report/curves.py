"""Curves of a run: the finite values of a key over steps, tokens and time."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from phi4.track.report.decimate import kept_points

Line = Mapping[str, Any]

X_AXES = ("tokens", "step", "seconds")
"""X axes of training curves; seconds since the run's first start."""


@dataclass(frozen=True)
class Curve:
    """A curve that can be drawn.

    Attributes:
        xs: by name of `X_AXES`; NaN where a line has no value.
        values: finite, or NaN where the curve is interrupted.
        num_points: finite values in the record, drawn or not.
        num_not_finite: values in the record that are NaN or infinite.
    """

    xs: Mapping[str, np.ndarray]
    values: np.ndarray
    num_points: int
    num_not_finite: int

    @property
    def is_decimated(self) -> bool:
        """Whether points were omitted."""
        return np.isfinite(self.values).sum() < self.num_points

    def scaled(self, factor: float) -> "Curve":
        """Return the curve in another unit."""
        return replace(self, values=self.values * factor)

    def block_means(self, size: int) -> "Curve":
        """Return the mean of every block of some number of values, including a last, shorter
        block."""
        begins = np.arange(0, self.values.size, size)
        counts = np.diff([*begins, self.values.size])
        means = np.add.reduceat(self.values, begins) / counts
        xs = {name: np.add.reduceat(x, begins) / counts for name, x in self.xs.items()}
        return Curve(xs, means, means.size, 0)

    def decimated(self, limit: int) -> "Curve":
        """Return at most some number of points, including the extremes."""
        kept = kept_points(self.values, limit)
        xs = {name: x[kept] for name, x in self.xs.items()}
        return Curve(xs, self.values[kept], self.num_points, self.num_not_finite)


@dataclass(frozen=True)
class Lines:
    """Lines of metrics.jsonl as columns.

    Attributes:
        lines: steps increasing.
        began_unix: time that seconds are counted from; 0 if not recorded.
    """

    lines: Sequence[Line]
    began_unix: float = 0.0

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Return every key of any line."""
        return tuple(dict.fromkeys(key for line in self.lines for key in line))

    def keys_under(self, prefix: str) -> list[str]:
        """Return keys with this prefix, sorted."""
        return sorted(key for key in self.keys if key.startswith(prefix))

    def curve(self, key: str) -> Curve:
        """Return the finite values of a key; empty if no line has it."""
        return curve_of(self.lines, key, self.began_unix)


def curve_of(lines: Sequence[Line], key: str, began_unix: float) -> Curve:
    """Return the finite values of a key, lines in order."""
    found = [line for line in lines if isinstance(line.get(key), int | float)]
    values = np.array([line[key] for line in found], dtype=float)
    is_finite = np.isfinite(values)
    xs = {name: x[is_finite] for name, x in x_values(found, began_unix).items()}
    num_finite = int(is_finite.sum())
    return Curve(xs, values[is_finite], num_finite, len(found) - num_finite)


def x_values(lines: Sequence[Line], began_unix: float) -> dict[str, np.ndarray]:
    """Return step, tokens and hours of lines; NaN where a line has no value."""
    steps = np.array([line.get("step", math.nan) for line in lines], dtype=float)
    tokens = np.array([line.get("consumed_tokens", math.nan) for line in lines], dtype=float)
    unix = np.array([line.get("unix_seconds", math.nan) for line in lines], dtype=float)
    seconds = unix - began_unix if began_unix else np.full(len(lines), math.nan)
    return {"tokens": tokens, "step": steps, "seconds": seconds}


def joined(curves: Iterable[Curve]) -> Curve:
    """Join curves, with an interruption between each two."""
    parts = [curve for curve in curves if curve.values.size]
    gap = np.array([math.nan])
    xs = {name: _interrupted([curve.xs[name] for curve in parts], gap) for name in X_AXES}
    return Curve(
        xs,
        _interrupted([curve.values for curve in parts], gap),
        sum(curve.num_points for curve in parts),
        sum(curve.num_not_finite for curve in parts),
    )


def _interrupted(parts: Sequence[np.ndarray], gap: np.ndarray) -> np.ndarray:
    pieces = [piece for part in parts for piece in (part, gap)][:-1]
    return np.concatenate(pieces) if pieces else np.array([])


def undone_parts(lines: Sequence[Line]) -> list[list[Line]]:
    """Split undone lines where another attempt or another rollback begins."""
    parts: list[list[Line]] = []
    before: Line | None = None
    for line in sorted(lines, key=_order):
        is_next = (
            before is not None
            and line.get("attempt") == before.get("attempt")
            and line["step"] == before["step"] + 1
        )
        if not is_next:
            parts.append([])
        parts[-1].append(line)
        before = line
    return parts


def _order(line: Line) -> tuple[float, float, int]:
    return line.get("attempt", 0), line.get("unix_seconds", 0.0), line["step"]
