"""Wall time by bucket over time: bars of equal duration, each split by bucket."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from phi4.rundir.goodput import BUCKETS, Span

NUM_BINS = 240

_FIRST = ("restart", "roll_back", "start", "save")
"""Buckets at the beginning of the time between two lines of a record, in this order: a save follows
the line of its step. The others alternate, and are spread evenly over the rest."""

_Piece = tuple[float, float, float]
"""Begin, end, and the fraction of the time between them that a bucket takes."""


@dataclass(frozen=True)
class Timeline:
    """Wall time in equal bins.

    Attributes:
        edges: seconds since the first start, [n + 1].
        seconds: by bucket of `BUCKETS`, [n]; those of a bin sum to its width, except for
            unaccounted time.
    """

    edges: np.ndarray
    seconds: dict[str, np.ndarray]


def timeline_of(spans: Sequence[Span], num_bins: int = NUM_BINS) -> Timeline | None:
    """Return the spans of a run in bins; None if they take no time."""
    began = min((span.began_unix for span in spans), default=0.0)
    wall = max((span.ended_unix for span in spans), default=0.0) - began
    if wall <= 0:
        return None
    edges = np.linspace(0, wall, num_bins + 1)
    pieces: dict[str, list[_Piece]] = {name: [] for name in BUCKETS}
    for span in spans:
        at, end = span.began_unix - began, span.ended_unix - began
        for name in _FIRST:
            if seconds := span.seconds.get(name):
                pieces[name].append((at, at + seconds, 1.0))
                at += seconds
        for name, seconds in span.seconds.items():
            if name not in _FIRST and seconds:
                # The clock of the buckets and the wall clock may differ slightly.
                left = max(end - at, seconds)
                pieces[name].append((at, at + left, seconds / left))
    return Timeline(edges, {name: _in_bins(edges, found) for name, found in pieces.items()})


def _in_bins(edges: np.ndarray, pieces: Sequence[_Piece]) -> np.ndarray:
    """Return seconds of the pieces in each bin."""
    if not pieces:
        return np.zeros(edges.size - 1)
    begins, ends, parts = np.array(pieces).T
    begins, ends = np.clip(begins, 0, edges[-1]), np.clip(ends, 0, edges[-1])
    return np.diff(_elapsed(edges, begins, parts) - _elapsed(edges, ends, parts))


def _elapsed(edges: np.ndarray, moments: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Return, at the edges, the sum of the elapsed time since each moment, times its fraction."""
    order = np.argsort(moments)
    moments, parts = moments[order], parts[order]
    counts = np.searchsorted(moments, edges)
    sums = np.concatenate([[0.0], np.cumsum(moments * parts)])
    weights = np.concatenate([[0.0], np.cumsum(parts)])
    return weights[counts] * edges - sums[counts]
