"""The table of a sweep, in the form of the report's Table 3: variants, and differences to a
baseline.

Seeds that all variants share are compared in pairs. A seed's initial weights and data order affect
every variant alike, so differences within seeds are much more precise than the means.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from phi4.track.sweep.results import Result, by_cell, names_of

CONFIDENCE = 0.95


@dataclass(frozen=True)
class MeanInterval:
    """A mean with its 95% interval; NaN if there are too few values."""

    mean: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the interval, which is symmetric."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Cell:
    """A variant at a scale, in one metric.

    Attributes:
        mean: mean over its seeds; NaN if one of them diverged, because the mean of the others would
            be biased.
        difference: difference to the baseline; None for the baseline itself.
        rank: 1 is the best of the column; those that diverged share the last rank.
    """

    variant: str
    scale: str
    metric: str
    mean: MeanInterval
    difference: MeanInterval | None
    num_runs: int
    num_diverged: int
    rank: int | None


@dataclass(frozen=True)
class SweepTable:
    """All cells; `cells[variant][scale, metric]`.

    Attributes:
        is_paired: whether differences are taken seed by seed.
    """

    variants: Sequence[str]
    columns: Sequence[tuple[str, str]]
    baseline: str
    cells: Mapping[str, Mapping[tuple[str, str], Cell]]
    is_paired: bool


def sweep_table(
    results: Sequence[Result],
    metrics: Sequence[str],
    *,
    baseline: str | None,
    maximize: Sequence[str] = (),
) -> SweepTable:
    """Return means, differences to the baseline, and ranks.

    Args:
        results: results of all ended runs.
        metrics: columns, at every scale.
        baseline: the variant that the others are compared with; defaults to the first.
        maximize: metrics for which higher is better.
    """
    variants, scales = names_of(results)
    baseline = baseline or variants[0]
    columns = [(scale, metric) for scale in scales for metric in metrics]
    seeds = {cell: set(values) for cell, values in by_cell(results, metrics[0]).items()}
    is_paired = len(set(map(frozenset, seeds.values()))) == 1
    cells: dict[str, dict[tuple[str, str], Cell]] = {variant: {} for variant in variants}
    for scale, metric in columns:
        values = by_cell(results, metric)
        column = {v: values[v, scale] for v in variants if (v, scale) in values}
        ranks = ranks_of({v: _mean(one) for v, one in column.items()}, metric in maximize)
        for variant, one in column.items():
            difference = None
            if variant != baseline and baseline in column:
                difference = difference_of(one, column[baseline])
            num_diverged = sum(map(math.isnan, one.values()))
            cells[variant][scale, metric] = Cell(
                *(variant, scale, metric, interval_of(list(one.values())), difference),
                *(len(one), num_diverged, ranks[variant]),
            )
    return SweepTable(variants, columns, baseline, cells, is_paired)


def interval_of(values: Sequence[float]) -> MeanInterval:
    """Return mean and t interval."""
    return _t_interval(np.asarray(values, float))


def difference_of(values: Mapping[int, float], baseline: Mapping[int, float]) -> MeanInterval:
    """Return the difference of two means over seeds: paired if both have the same seeds, else
    Welch's."""
    if set(values) == set(baseline):
        return _t_interval(np.array([values[seed] - baseline[seed] for seed in sorted(values)]))
    one, other = np.array(list(values.values())), np.array(list(baseline.values()))
    mean = float(one.mean() - other.mean())
    if min(len(one), len(other)) < 2 or math.isnan(mean):
        return MeanInterval(mean, math.nan, math.nan)
    parts = one.var(ddof=1) / len(one), other.var(ddof=1) / len(other)
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / (len(one) - 1) + parts[1] ** 2 / (len(other) - 1))
    half = t_quantile(float(freedom)) * math.sqrt(sum(parts))
    return MeanInterval(mean, mean - half, mean + half)


def ranks_of(means: Mapping[str, float], more_is_better: bool) -> dict[str, int]:
    """Return 1 for the best mean; equal means share a rank, and NaN ranks last."""
    sign = -1.0 if more_is_better else 1.0
    keys = {name: math.inf if math.isnan(m) else sign * m for name, m in means.items()}
    return {name: 1 + sum(other < key for other in keys.values()) for name, key in keys.items()}


def t_quantile(freedom: float) -> float:
    """Return the 97.5% quantile of Student's t."""
    # Importing it takes half a second.
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, freedom))


def _t_interval(values: np.ndarray) -> MeanInterval:
    mean = float(values.mean())
    if len(values) < 2 or math.isnan(mean):
        return MeanInterval(mean, math.nan, math.nan)
    half = t_quantile(len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return MeanInterval(mean, mean - half, mean + half)


def _mean(values: Mapping[int, float]) -> float:
    return float(np.mean(list(values.values())))
