import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi4.data.stream.blend import draw_order, drawn_after, integer_shares, loss_order, quota_order

PHI4_BLEND = (0.15, 0.15, 0.4, 0.2, 0.1)
shares_strategy = st.one_of(
    st.lists(st.integers(0, 12), min_size=1, max_size=8),
    st.lists(st.integers(0, 10**12), min_size=1, max_size=5),
).filter(any)


def worst_error(shares, order: np.ndarray) -> float:
    """Largest |drawn - asked| over all sources and prefixes, in units."""
    drawn = np.cumsum(order[:, None] == np.arange(len(shares)), axis=0)
    asked = np.arange(1, order.size + 1)[:, None] * (np.array(shares) / sum(shares))
    return float(np.abs(drawn - asked).max())


@given(shares=shares_strategy)
def test_every_source_stays_within_one_unit_at_every_prefix(shares: list[int]) -> None:
    order = quota_order(shares, [0] * len(shares), 600)
    num_drawn = sum(share > 0 for share in shares)
    bound = 1 - 1 / max(2, 2 * num_drawn - 2)
    assert worst_error(shares, order) <= bound + 1e-9


@given(shares=shares_strategy, cut=st.integers(0, 300))
def test_order_goes_on_from_its_counts(shares: list[int], cut: int) -> None:
    whole = quota_order(shares, [0] * len(shares), 300)
    counts = np.bincount(whole[:cut], minlength=len(shares)).tolist()
    assert np.array_equal(quota_order(shares, counts, 300 - cut), whole[cut:])


@pytest.mark.parametrize("num_sources", [2, 3, 10, 50])
def test_hard_blends_stay_within_one_unit(num_sources: int) -> None:
    harmonic = integer_shares([1 / (index + 2) for index in range(num_sources)])
    order = quota_order(harmonic, [0] * num_sources, 3000)
    assert worst_error(harmonic, order) < 1


def test_largest_deficit_rule_breaks_the_bound_where_ours_holds() -> None:
    shares = (1, 1, 34, 51, 13)
    drawn, order = np.zeros(5), []
    for step in range(1, 101):
        source = int(np.argmax(np.array(shares) / 100 * step - drawn))
        drawn[source] += 1
        order.append(source)
    assert worst_error(shares, np.array(order)) > 1.01
    assert worst_error(shares, quota_order(shares, [0] * 5, 100)) < 1


def test_long_runs_neither_drift_nor_overflow() -> None:
    shares = integer_shares((0.333333333, 0.1, 0.566666667))
    start = [share * 10**15 for share in shares]
    later = quota_order(shares, start, 2000)
    assert np.array_equal(later, quota_order(shares, [0, 0, 0], 2000))


def test_shares_are_the_decimals_of_the_recipe() -> None:
    assert integer_shares(PHI4_BLEND) == (3, 3, 8, 4, 2)
    assert integer_shares((1.0, 1.0)) == integer_shares((0.5, 0.5)) == (1, 1)
    assert integer_shares((0.0, 2.5)) == (0, 1)


@settings(max_examples=20)
@given(num_units=st.integers(0, 200))
def test_a_source_of_weight_zero_is_never_drawn(num_units: int) -> None:
    assert not np.any(quota_order((1, 0, 3), (0, 0, 0), num_units) == 1)


@given(shares=shares_strategy, start=st.integers(0, 500), length=st.integers(0, 300))
def test_looked_up_order_is_the_drawn_one(shares: list[int], start: int, length: int) -> None:
    whole = quota_order(shares, [0] * len(shares), start + length)
    counts = np.bincount(whole[:start], minlength=len(shares)).tolist()
    assert np.array_equal(draw_order(shares, counts, length), whole[start:])
    ends = np.bincount(whole, minlength=len(shares)).tolist()
    assert drawn_after(shares, counts, length) == ends


def test_a_run_of_10t_tokens_is_skipped_by_arithmetic() -> None:
    shares = integer_shares(PHI4_BLEND)
    assert drawn_after(shares, [0] * 5, 20 * 10**9 + 20) == [(10**9 + 1) * s for s in shares]


loss_strategy = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 50), st.integers(0, 2**32)), min_size=1, max_size=6
)


@given(sources=loss_strategy, cut=st.integers(0, 200))
def test_loss_tokens_stay_within_one_largest_sample_at_every_prefix(
    sources: list[tuple[int, int, int]], cut: int
) -> None:
    shares = [share for share, _, _ in sources]
    samples = [np.random.default_rng(seed).integers(1, top + 1, 2048) for _, top, seed in sources]
    source, loss = loss_order(shares, [0] * len(shares), 300, lambda s, a, b: samples[s][a:b])
    served = np.cumsum((source[:, None] == np.arange(len(shares))) * loss[:, None], axis=0)
    asked = served.sum(axis=1)[:, None] * (np.array(shares) / sum(shares))
    assert np.abs(served - asked).max() <= loss.max() + 1e-6
    for index, numbers in enumerate(samples):
        taken = loss[source == index]
        assert np.array_equal(taken, numbers[: taken.size])
    used = np.bincount(source[:cut], minlength=len(shares))
    rest = loss_order(
        shares,
        served[cut - 1].tolist() if cut else [0] * len(shares),
        300 - cut,
        lambda s, a, b: samples[s][used[s] + a : used[s] + b],
    )
    assert np.array_equal(rest[0], source[cut:]) and np.array_equal(rest[1], loss[cut:])
