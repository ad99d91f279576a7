"""Rank correlation between scales: do small runs order the variants as large ones do?

Source: technical report, section 3.2, which searches mixtures with smaller models and shorter runs
and reports that their order carries over.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from phi4.track.sweep.results import Result, by_cell, names_of

_DRAWS = 2000
_MOST_PERMUTED = 7
"""Maximum number of variants for which all orders are tried: 7 have 5,040."""


@dataclass(frozen=True)
class RankCorrelation:
    """Agreement of two scales on the order of the variants.

    Attributes:
        spearman, kendall: of the means over seeds; NaN if all variants are equal at a scale.
        spearman_interval, kendall_interval: 95%, by a bootstrap over seeds; NaN with one seed.
        p_value: fraction of the orders of the variants whose Spearman coefficient is at least as
            large.
        is_exact: whether all orders were tried instead of a sample.
    """

    scales: tuple[str, str]
    metric: str
    variants: tuple[str, ...]
    num_seeds: int
    spearman: float
    spearman_interval: tuple[float, float]
    kendall: float
    kendall_interval: tuple[float, float]
    p_value: float
    is_exact: bool


def rank_correlations(results: Sequence[Result], metric: str) -> list[RankCorrelation]:
    """Correlate every pair of scales, over the variants and seeds that both have.

    A variant with a diverged run ranks last at its scale.
    """
    _, scales = names_of(results)
    return [_between(results, metric, pair) for pair in itertools.combinations(scales, 2)]


def _between(results: Sequence[Result], metric: str, pair: tuple[str, str]) -> RankCorrelation:
    cells = by_cell(results, metric)
    variants = [v for v in names_of(results)[0] if all((v, scale) in cells for scale in pair)]
    seeds = [set(cells[v, scale]) for v in variants for scale in pair]
    common = sorted(set.intersection(*seeds)) if seeds else []
    # [scale, variant, seed]
    values = np.array([[[cells[v, s][seed] for seed in common] for v in variants] for s in pair])
    if len(variants) < 2 or not common:
        nan = (math.nan, math.nan)
        empty = (math.nan, nan, math.nan, nan, math.nan, True)
        return RankCorrelation(pair, metric, tuple(variants), len(common), *empty)
    values[np.isnan(values)] = math.inf
    means = values.mean(axis=2)
    spearman, kendall = (f(means[:1], means[1:])[0] for f in (_spearman, _kendall))
    intervals = _bootstrap(values)
    return RankCorrelation(
        pair,
        metric,
        tuple(variants),
        len(common),
        float(spearman),
        intervals[0],
        float(kendall),
        intervals[1],
        *_p_value(means, float(spearman)),
    )


def _bootstrap(values: np.ndarray) -> list[tuple[float, float]]:
    """Return 95% intervals of both coefficients by resampling seeds, separately for each scale.

    A seed is drawn for all variants at once, because they share its weights and data order.
    """
    num_seeds = values.shape[2]
    if num_seeds < 2:
        return [(math.nan, math.nan)] * 2
    draw = np.random.default_rng(0)
    one, other = (
        scale[:, draw.integers(num_seeds, size=(_DRAWS, num_seeds))].mean(axis=2).T
        for scale in values
    )
    intervals = []
    for coefficient in (_spearman, _kendall):
        found = coefficient(one, other)
        found = found[~np.isnan(found)]
        bounds = np.quantile(found, [0.025, 0.975]) if found.size else (math.nan, math.nan)
        intervals.append((float(bounds[0]), float(bounds[1])))
    return intervals


def _p_value(means: np.ndarray, observed: float) -> tuple[float, bool]:
    num_variants = means.shape[1]
    is_exact = num_variants <= _MOST_PERMUTED
    if math.isnan(observed):
        return math.nan, is_exact
    if is_exact:
        orders = np.array(list(itertools.permutations(range(num_variants))))
    else:
        draw = np.random.default_rng(0)
        orders = draw.permuted(np.tile(np.arange(num_variants), (20_000, 1)), axis=1)
    one = np.broadcast_to(means[0], orders.shape)
    found = _spearman(one, means[1][orders])
    return float(np.mean(found >= observed - 1e-12)), is_exact


def _spearman(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return Spearman's coefficient of every row: [draws, variants] twice."""
    from scipy.stats import rankdata

    ranks = [rankdata(side, axis=1) for side in (one, other)]
    left, right = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
    scale = np.sqrt((left**2).sum(axis=1) * (right**2).sum(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (left * right).sum(axis=1) / scale


def _kendall(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return Kendall's tau-b of every row."""
    first, second = np.triu_indices(one.shape[1], 1)

    def signs(side: np.ndarray) -> np.ndarray:
        # Not a difference: two that diverged are equal, and inf - inf is NaN.
        return (side[:, first] > side[:, second]).astype(int) - (side[:, first] < side[:, second])

    left, right = signs(one), signs(other)
    scale = np.sqrt(np.abs(left).sum(axis=1) * np.abs(right).sum(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (left * right).sum(axis=1) / scale
