"""Tables and rank correlations of sweeps, against scipy and against planted numbers."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from phi4.track.sweep.ranks import rank_correlations
from phi4.track.sweep.results import Result
from phi4.track.sweep.table import difference_of, interval_of, ranks_of, sweep_table


def results(
    losses: dict[tuple[str, str], Sequence[float]], seeds: Sequence[int] = (), metric: str = "loss"
) -> list[Result]:
    """By (variant, scale): a loss per seed."""
    return [
        Result(variant, scale, seed, 1000, {}, {metric: value})
        for (variant, scale), values in losses.items()
        for seed, value in zip(seeds or range(len(values)), values, strict=True)
    ]


FLOATS = st.floats(-10, 10).map(lambda x: round(x, 3))


@given(st.lists(FLOATS, min_size=2, max_size=6))
def test_interval_of_a_mean_is_students(values: list[float]) -> None:
    found = interval_of(values)
    error = float(scipy.stats.sem(values))
    assert found.mean == pytest.approx(np.mean(values))
    if error:
        low, high = scipy.stats.t.interval(0.95, len(values) - 1, np.mean(values), error)
        assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.half_width == pytest.approx((found.high - found.low) / 2)


@given(st.lists(st.tuples(FLOATS, FLOATS), min_size=2, max_size=6), FLOATS)
def test_what_a_seed_does_to_all_variants_cancels(
    pairs: list[tuple[float, float]], shift: float
) -> None:
    one, other = ({seed: pair[side] for seed, pair in enumerate(pairs)} for side in (0, 1))
    found = difference_of(one, other)
    shifted = difference_of(
        {seed: value + shift * seed for seed, value in one.items()},
        {seed: value + shift * seed for seed, value in other.items()},
    )
    assert shifted.mean == pytest.approx(found.mean, abs=1e-9)
    assert shifted.half_width == pytest.approx(found.half_width, abs=1e-6)


def test_other_seeds_are_compared_as_welch_does() -> None:
    one, other = [1.0, 2.0, 4.0], [1.5, 1.0]
    found = difference_of(dict(enumerate(one)), dict(enumerate(other)))
    interval = scipy.stats.ttest_ind(one, other, equal_var=False).confidence_interval()
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))


def test_one_seed_has_no_interval() -> None:
    assert interval_of([2.0]).mean == 2.0 and math.isnan(interval_of([2.0]).low)
    assert math.isnan(difference_of({1: 2.0}, {2: 1.0}).high)


def test_a_table_has_differences_ranks_and_what_diverged() -> None:
    losses = {
        ("base", "small"): [3.0, 3.2],
        ("good", "small"): [2.0, 2.4],
        ("wild", "small"): [1.0, math.nan],
        ("base", "large"): [2.0, 2.2],
        ("good", "large"): [2.5, 2.5],
        ("wild", "large"): [2.1, 2.0],
    }
    found = sweep_table(results(losses), ["loss"], baseline=None)
    assert (found.baseline, found.is_paired) == ("base", True)
    assert list(found.columns) == [("small", "loss"), ("large", "loss")]
    small = {v: found.cells[v]["small", "loss"] for v in found.variants}
    assert [small[v].rank for v in ("good", "base", "wild")] == [1, 2, 3]
    assert small["base"].difference is None
    assert small["good"].difference.mean == pytest.approx(-0.9)
    assert small["wild"].num_diverged == 1 and math.isnan(small["wild"].mean.mean)
    assert [found.cells[v]["large", "loss"].rank for v in ("wild", "base", "good")] == [1, 2, 3]
    more = sweep_table(results(losses), ["loss"], baseline="good", maximize=["loss"])
    assert more.cells["good"]["large", "loss"].rank == 1
    assert more.cells["wild"]["small", "loss"].rank == 3


def test_equal_means_share_a_rank() -> None:
    assert ranks_of({"a": 1.0, "b": 1.0, "c": 2.0, "d": math.nan}, False) == {
        **{"a": 1, "b": 1},
        **{"c": 3, "d": 4},
    }


@given(st.data())
def test_coefficients_are_scipys(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 9))
    some = st.lists(st.integers(0, 5).map(float), min_size=size, max_size=size)
    one, other = data.draw(some), data.draw(some)
    losses = {(str(i), "one"): [x] for i, x in enumerate(one)}
    losses |= {(str(i), "other"): [x] for i, x in enumerate(other)}
    [found] = rank_correlations(results(losses), "loss")
    if len(set(one)) == 1 or len(set(other)) == 1:
        assert math.isnan(found.spearman) and math.isnan(found.kendall)
        return
    assert found.spearman == pytest.approx(scipy.stats.spearmanr(one, other).statistic)
    assert found.kendall == pytest.approx(scipy.stats.kendalltau(one, other).statistic)
    assert math.isnan(found.spearman_interval[0])


def test_chance_is_counted_over_all_orders() -> None:
    """Six variants in the same order: one of 720 orders agrees as well."""
    losses = {(str(i), scale): [i + 0.1, i] for i in range(6) for scale in ("one", "other")}
    [found] = rank_correlations(results(losses), "loss")
    assert found.p_value == pytest.approx(1 / 720) and found.is_exact
    assert found.spearman == found.kendall == 1
    assert found.spearman_interval == (1, 1)
    assert found.num_seeds == 2


def test_noise_between_seeds_widens_the_interval() -> None:
    draw = np.random.default_rng(0)
    losses = {
        (str(i), scale): list(i + draw.normal(0, 3, 3)) for i in range(6) for scale in ("a", "b")
    }
    [found] = rank_correlations(results(losses), "loss")
    low, high = found.spearman_interval
    assert low < found.spearman <= high and low < 0.8


def test_variants_that_diverged_are_last_and_equal() -> None:
    losses = {(v, s): [float(v)] for v in "123" for s in ("one", "other")}
    losses |= {(v, s): [math.nan] for v in "45" for s in ("one", "other")}
    [found] = rank_correlations(results(losses), "loss")
    assert found.spearman == pytest.approx(1) and found.kendall == pytest.approx(1)


def test_only_variants_of_both_scales_are_compared() -> None:
    losses = {(v, s): [float(v)] for v in "123" for s in ("one", "other", "third")}
    losses["4", "one"] = [0.0]
    found = rank_correlations(results(losses), "loss")
    assert [one.scales for one in found] == [("one", "other"), ("one", "third"), ("other", "third")]
    assert {one.variants for one in found} == {("1", "2", "3")}
