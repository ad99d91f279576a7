"""Results of the runs of a sweep, and the metrics that are read from a run's record."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phi4.errors import DataError
from phi4.rundir.names import METRICS_FILE
from phi4.rundir.step_log import read_metrics

SPIKES = "spikes"
LOSS_RISE = "loss_rise"


@dataclass(frozen=True)
class Result:
    """Metrics of one run that ended.

    Attributes:
        variant: row of the table.
        scale: column.
        tokens: tokens that it trained on.
        values: values of the axes, by name.
        metrics: by name; NaN for a run that diverged.
    """

    variant: str
    scale: str
    seed: int
    tokens: int
    values: Mapping[str, Any]
    metrics: Mapping[str, float]


def metrics_of(run_dir: Path, names: Sequence[str]) -> dict[str, float]:
    """Return metrics of a finished run; values that are not finite are NaN.

    Raises:
        DataError: the run has no such metric.
    """
    path = run_dir / METRICS_FILE
    steps = read_metrics(path)
    found = {}
    for name in names:
        value = _value(steps, name)
        if value is None:
            known = sorted({key for step in steps for key in step})
            raise DataError(
                f"{path} has no {name}; it has {', '.join(known)}, and the derived {SPIKES} and "
                f"{LOSS_RISE}"
            )
        found[name] = value if math.isfinite(value) else math.nan
    return found


def by_cell(results: Sequence[Result], metric: str) -> dict[tuple[str, str], dict[int, float]]:
    """Return values of a metric by (variant, scale), then by seed."""
    cells: dict[tuple[str, str], dict[int, float]] = {}
    for result in results:
        cell = cells.setdefault((result.variant, result.scale), {})
        cell[result.seed] = result.metrics[metric]
    return cells


def names_of(results: Sequence[Result]) -> tuple[list[str], list[str]]:
    """Return variants and scales, each in the order of their first result."""
    variants = list(dict.fromkeys(result.variant for result in results))
    return variants, list(dict.fromkeys(result.scale for result in results))


def _value(steps: Sequence[Mapping[str, float]], name: str) -> float | None:
    if name == SPIKES:
        return float(sum(("skipped" in s) + ("rolled_back_from" in s) for s in steps))
    if name == LOSS_RISE:
        losses = np.array([step["loss"] for step in steps])
        losses = losses[np.isfinite(losses)]
        return float(np.max(losses - np.minimum.accumulate(losses), initial=0.0))
    return next((step[name] for step in reversed(steps) if name in step), None)
