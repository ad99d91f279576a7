"""The estimated end: all wall time counts, and one stall does not."""

import pytest

from phi4.train.time_left import TimeLeft
from tests.support.engines import tiny_recipe

STEP, EVALUATION, SAVE = 2.0, 60.0, 30.0


class Clock:
    """Seconds that only move when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def estimates(seconds: list[float], *, total: int, first: int = 0, every: int = 0) -> list[float]:
    """What is said after each of these steps."""
    clock = Clock()
    recipe = tiny_recipe(f"evaluation.every={every}", f"checkpoint.every={2 * every}")
    left, found = TimeLeft(recipe, clock), []
    left.begin()
    for step, taken in enumerate(seconds, start=first + 1):
        clock.now += taken
        found.append(left.after_step(total - step))
    return found


def with_saves(first: int, last: int, every: int) -> list[float]:
    """Seconds from record to record; what step n ends with lies before the record of n + 1."""
    return [
        STEP + EVALUATION * (step % every == 0) + SAVE * (step % (2 * every) == 0)
        for step in range(first, last)
    ]


def test_equal_steps_take_as_long_again() -> None:
    assert estimates([STEP] * 4, total=10) == [18.0, 16.0, 14.0, 12.0]


def test_evaluations_and_saves_are_in_it() -> None:
    found = estimates(with_saves(1, 801, 100), total=10_000, every=100)
    per_step = STEP + EVALUATION / 100 + SAVE / 200
    assert found[-1] == pytest.approx(9200 * per_step, rel=0.01)


def test_first_step_of_a_start_does_not_count_for_long() -> None:
    first, second, *_ = estimates([120.0, STEP, STEP], total=100)
    assert first == 99 * 120.0 and second == 98 * STEP


def test_one_stall_or_one_evaluation_after_a_restart_does_not_stretch_the_rest() -> None:
    stalled = estimates([STEP] * 50 + [3600.0] + [STEP], total=1000)
    assert stalled[-1] == 948 * STEP
    restarted = estimates(with_saves(98, 103, 100), total=10_098, first=98, every=100)
    assert restarted[-1] == 9995 * STEP


def test_going_back_is_no_step() -> None:
    clock = Clock()
    left = TimeLeft(tiny_recipe(), clock)
    for _ in range(3):
        # More than once, or it would count as a stall.
        clock.now += 5000.0
        left.begin()
        clock.now += STEP
        assert left.after_step(10) == 10 * STEP


def test_last_step_leaves_nothing() -> None:
    assert estimates([STEP] * 3, total=3)[-1] == 0.0
