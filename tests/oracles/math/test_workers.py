"""Processes of math-verify that hang, die or blow up take no verdict with them."""

import os
import signal
from collections.abc import Iterator

import pytest

from phi4.oracles.math import MathOracle
from phi4.oracles.math.workers import PROGRAM, VerifyWorkers
from phi4.oracles.sandbox.process_use import descendants
from phi4.oracles.verdict import Grade, ToGrade
from tests.support.waiting import wait_until

EASY = (r"\sqrt{8}", r"2\sqrt{2}")


@pytest.fixture(scope="module")
def workers() -> Iterator[VerifyWorkers]:
    opened = VerifyWorkers(1)
    yield opened
    opened.close()


def test_worker_that_dies_is_replaced(workers: VerifyWorkers) -> None:
    before = set(descendants(os.getpid()))
    assert workers.ask(*EASY) == (Grade.RIGHT, "")
    [started] = set(descendants(os.getpid())) - before
    os.kill(started, signal.SIGKILL)
    grade, reason = workers.ask(*EASY)
    assert (grade, "out of time or memory" in reason) == (Grade.UNGRADABLE, True)
    assert workers.ask(*EASY) == (Grade.RIGHT, "")
    workers.close()
    assert wait_until(lambda: set(descendants(os.getpid())) <= before, "their end")


@pytest.mark.slow
def test_blow_up_ends_by_processor_time() -> None:
    first = "from phi4.oracles.math import verify_worker as w; w.CPU_SECONDS = 1\n"
    fresh = VerifyWorkers(1, program=first + PROGRAM)
    try:
        grade, reason = fresh.ask("5", "9^{9^{9^{9}}}")
        assert grade is Grade.UNGRADABLE, reason
        assert fresh.ask(*EASY)[0] is Grade.RIGHT
    finally:
        fresh.close()


def test_wall_clock_ends_a_worker_that_never_answers() -> None:
    stuck = VerifyWorkers(1, wall_seconds=0.1, program="import time; time.sleep(600)\n")
    assert stuck.ask(*EASY)[0] is Grade.UNGRADABLE
    stuck.close()


@pytest.mark.slow
def test_close_leaves_no_process() -> None:
    before = set(descendants(os.getpid()))
    oracle = MathOracle(num_workers=2)
    pairs = [ToGrade(answer, key) for key, answer in (EASY, ("x^2", "x*x"))]
    assert [one.outcome for one in oracle.grade(pairs)] == [Grade.RIGHT, Grade.RIGHT]
    assert set(descendants(os.getpid())) - before
    oracle.close()
    assert wait_until(lambda: set(descendants(os.getpid())) <= before, "their end")


def test_without_math_verify_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    oracle = MathOracle(num_workers=1)
    key, answer = EASY
    seen = oracle.grade([ToGrade(answer, key), ToGrade("0.5", "1/2"), ToGrade("2", "1/2")])
    assert [one.outcome for one in seen] == [Grade.UNGRADABLE, Grade.RIGHT, Grade.WRONG]
    assert "pip install 'phi4[posttraining]'" in seen[0].reason
