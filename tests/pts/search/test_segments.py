"""Cuts and midpoints: they cover the answer, and lie where its log-probability does."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4.pts.search.segments import cuts, joint_probability, midpoint

LOG_PROBS = st.lists(st.floats(-10, 0), min_size=1, max_size=40)


@given(log_probs=LOG_PROBS, num=st.integers(1, 12))
def test_cuts_cover_the_answer_and_overlap_nowhere(log_probs: list[float], num: int) -> None:
    borders = cuts(log_probs, num)
    assert (borders[0], borders[-1]) == (0, len(log_probs))
    assert all(begin < end for begin, end in itertools.pairwise(borders))
    assert len(borders) <= num + 1


@given(log_probs=LOG_PROBS, num=st.integers(1, 12))
def test_a_piece_is_a_share_or_ends_with_the_token_that_fills_it(
    log_probs: list[float], num: int
) -> None:
    share = -sum(log_probs) / num
    for begin, end in itertools.pairwise(cuts(log_probs, num)):
        assert -sum(log_probs[begin : end - 1]) <= share + 1e-6


@given(log_probs=st.lists(st.floats(-10, 0), min_size=2, max_size=40))
def test_midpoint_leaves_a_token_on_either_side(log_probs: list[float]) -> None:
    middle = midpoint(log_probs, 0, len(log_probs))
    assert 0 < middle < len(log_probs)
    half = -sum(log_probs) / 2
    if middle > 1:
        assert -sum(log_probs[: middle - 1]) < half + 1e-6
    if middle < len(log_probs) - 1:
        assert -sum(log_probs[:middle]) >= half - 1e-6


def test_splits_where_the_sampler_hesitated_and_not_in_the_middle() -> None:
    log_probs = [-0.01] * 20 + [-3.0] + [-0.01] * 2
    assert midpoint(log_probs, 0, 23) == 21
    assert midpoint(log_probs, 20, 22) == 21
    assert cuts([-1.0] * 16, 8) == list(range(0, 17, 2))
    assert cuts([0.0, 0.0], 8) == [0, 2]


def test_joint_probability_is_of_the_piece() -> None:
    log_probs = [math.log(p) for p in (0.5, 0.25, 0.9)]
    assert joint_probability(log_probs, 0, 2) == pytest.approx(0.125)
    assert joint_probability(log_probs, 1, 1) == 1
