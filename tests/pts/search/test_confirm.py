"""The test of one candidate, and of many: levels, stopping, what cannot be graded."""

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4.oracles.verdict import Grade
from phi4.pts.search.confirm import Confirmation, EProcess, confirmed
from phi4.pts.search.pivots import pivots_of_tests
from phi4.pts.search.rollouts import Rollout, Share, Start
from phi4.pts.search.settings import SearchMode, settings_of
from phi4.pts.search.tree import CandidateToken, Trajectory

SETTINGS = settings_of(SearchMode.DEFAULT)
NUM_CANDIDATES = 6


def drawn(rng: random.Random, p: float, ungradable: float = 0.0) -> list[Rollout]:
    """A block of completions that succeed with chance p."""
    grades = [
        Grade.UNGRADABLE
        if rng.random() < ungradable
        else (Grade.RIGHT if rng.random() < p else Grade.WRONG)
        for _ in range(SETTINGS.block_draws)
    ]
    return [Rollout(grade, 1, 1) for grade in grades]


def run_test(
    seed: int, q: float, with_token: float, without: float, ungradable: float = 0.0
) -> Confirmation:
    """A test to its end."""
    rng, test = random.Random(seed), Confirmation(q, NUM_CANDIDATES, SETTINGS)
    while test.is_open:
        test.add(drawn(rng, with_token, ungradable), drawn(rng, without, ungradable))
    return test


def is_confirmed(test: Confirmation) -> bool:
    return test.log_e >= math.log(60) and abs(test.effect) >= SETTINGS.min_effect


def test_no_effect_is_confirmed_in_less_than_one_of_a_hundred_tests() -> None:
    shares = (0.05, 0.2, 0.5)
    found = [
        is_confirmed(run_test(seed, q, p, p))
        for seed in range(1000)
        for q, p in zip((0.1, 0.3, 0.6), shares, strict=True)
    ]
    assert len(found) == 3000 and sum(found) <= 30


def test_large_effect_is_confirmed_and_soon() -> None:
    tests = [run_test(seed, 0.4, 0.9, 0.2) for seed in range(100)]
    assert all(map(is_confirmed, tests))
    assert sum(test.num_blocks for test in tests) / len(tests) < 6
    assert all(test.effect == pytest.approx(0.42, abs=0.3) for test in tests)
    assert all(run_test(seed, 0.4, 0.2, 0.9).effect < 0 for seed in range(20))


def test_effect_is_of_the_prefix_and_not_between_the_sides() -> None:
    test = Confirmation(0.75, 1, SETTINGS)
    right, wrong = Rollout(Grade.RIGHT, 1, 1), Rollout(Grade.WRONG, 1, 1)
    test.add([right] * 8, [wrong] * 8)
    assert test.effect == pytest.approx(0.25)
    assert test.shares == (Share(8, 8), Share(0, 8))


def test_null_stops_before_its_last_block() -> None:
    tests = [run_test(seed, 0.5, 0.5, 0.5) for seed in range(200)]
    most = SETTINGS.confirm_draws // SETTINGS.block_draws
    assert max(test.num_blocks for test in tests) <= most
    assert sum(test.num_blocks for test in tests) / len(tests) < most / 2


def test_outcome_without_a_partner_waits_for_the_next_block() -> None:
    right, neither = Rollout(Grade.RIGHT, 1, 1), Rollout(Grade.UNGRADABLE, 1, 1)
    test = Confirmation(0.5, 1, SETTINGS)
    test.add([right] * 8, [right] * 5 + [neither] * 3)
    assert test.shares == (Share(5, 5), Share(5, 5))
    test.add([right] * 5 + [neither] * 3, [right] * 8)
    assert test.shares == (Share(13, 13), Share(13, 13))
    nothing = Confirmation(0.5, 1, SETTINGS)
    nothing.add([neither] * 8, [right] * 8)
    assert (nothing.effect, nothing.log_e) == (0.0, 0.0)


def test_test_without_gradable_completions_ends() -> None:
    test = run_test(0, 0.5, 0.5, 0.5, ungradable=1.0)
    assert test.num_blocks * SETTINGS.block_draws == SETTINGS.confirm_draws


@given(p=st.floats(0.05, 0.95), num=st.integers(0, 5))
def test_expected_e_value_is_at_most_one_under_equal_chances(p: float, num: int) -> None:
    """Exact, over all outcomes of a few pairs: the reason why stopping is free."""

    def expectation(outcomes: tuple[tuple[bool, bool], ...]) -> float:
        if len(outcomes) == num:
            process = EProcess()
            for pair in outcomes:
                process.add(*pair)
            return math.exp(process.log_e)
        return sum(
            (p if one else 1 - p) * (p if other else 1 - p) * expectation((*outcomes, (one, other)))
            for one in (True, False)
            for other in (True, False)
        )

    assert expectation(()) <= 1 + 1e-9


LOG_E = st.lists(st.floats(-20, 40), max_size=12)


@given(log_e=LOG_E, alpha=st.floats(0.001, 0.5), more=st.floats(1, 2))
def test_more_alpha_confirms_no_less(log_e: list[float], alpha: float, more: float) -> None:
    assert set(confirmed(log_e, alpha)) <= set(confirmed(log_e, alpha * more))


@given(log_e=LOG_E, alpha=st.floats(0.001, 0.5))
def test_confirmed_are_the_largest_and_meet_their_own_bound(
    log_e: list[float], alpha: float
) -> None:
    kept = confirmed(log_e, alpha)
    assert kept == sorted(kept)
    rest = [log_e[i] for i in range(len(log_e)) if i not in kept]
    if kept:
        least = min(log_e[index] for index in kept)
        assert least >= math.log(len(log_e) / (alpha * len(kept)))
        assert all(one <= least for one in rest)
    # Nobody who meets the bound of a longer list was left out.
    for rank in range(len(kept) + 1, len(log_e) + 1):
        one = sorted(log_e, reverse=True)[rank - 1]
        assert one < math.log(len(log_e) / (alpha * rank))


def test_many_candidates_raise_the_bound_of_one() -> None:
    alone, among_many = (Confirmation(0.5, num, SETTINGS) for num in (1, 10**9))
    rng = random.Random(0)
    while alone.is_open:
        block = drawn(rng, 0.95), drawn(rng, 0.05)
        alone.add(*block)
        among_many.add(*block)
    assert among_many.is_open
    assert confirmed([alone.log_e], 0.1) == [0]
    assert confirmed([alone.log_e] + [0.0] * 10**3, 1e-9) == []


def test_small_effect_is_confirmed_and_yet_no_pivot() -> None:
    right, wrong = Rollout(Grade.RIGHT, 1, 1), Rollout(Grade.WRONG, 2, 1)
    for q, num in ((0.75, 1), (0.81, 0)):
        trajectory = Trajectory((1, 1), (math.log(q), -0.1), True)
        test = Confirmation(q, 1, SETTINGS)
        for _ in range(4):
            test.add([right] * 8, [wrong] * 8)
        assert confirmed([test.log_e], SETTINGS.alpha) == [0]
        asks = pivots_of_tests([CandidateToken(0, 0)], [test], [trajectory], SETTINGS)
        with pytest.raises(StopIteration) as ended:
            next(asks)
        assert len(ended.value.value) == num


def test_pivots_in_one_place_share_what_follows_a_third_token() -> None:
    """A right and a wrong trajectory part there, and other tokens are seldom drawn."""

    def tested(token: int, is_right: bool, firsts: list[int]) -> Confirmation:
        test, grades = Confirmation(0.3, 2, SETTINGS), (Grade.WRONG, Grade.RIGHT)
        with_token = [Rollout(grades[is_right], token, 1)] * len(firsts)
        test.add(with_token, [Rollout(grades[not is_right], first, 1) for first in firsts])
        return test

    trajectories = [
        Trajectory((1, 1), (math.log(0.3), -0.1), True),
        Trajectory((2, 1), (math.log(0.3), -0.1), False),
    ]
    tests = [
        tested(1, True, [9] * 4 + [101] * 6 + [102] * 6),
        tested(2, False, [9] * 2 + [201] * 7 + [202] * 7),
    ]
    candidates = [CandidateToken(0, 0), CandidateToken(1, 0)]
    asks = pivots_of_tests(candidates, tests, trajectories, SETTINGS)
    blocks = next(asks)
    starts = [block.start for block in blocks]
    assert len(set(starts)) == len(starts)
    third = blocks[starts.index(Start((), forced=9))]
    assert third.n == 6
    answers = [[Rollout(Grade.WRONG, block.start.forced, 1)] * block.n for block in blocks]
    with pytest.raises(StopIteration) as ended:
        asks.send(answers)
    first, second = ended.value.value
    assert first.counterpart is not None
    assert first.counterpart.share.trials >= SETTINGS.counterpart_trials
    assert second.no_pair_reason or second.counterpart.share.trials >= SETTINGS.counterpart_trials


def test_mode_without_confirmation_asks_for_nothing() -> None:
    assert not Confirmation(0.5, 3, replace(SETTINGS, confirm_draws=0)).is_open
