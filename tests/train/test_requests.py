"""What is asked of a run from outside: files that a user creates, and what the loop makes of it."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, patch

import pytest

from phi4.engine.agreement import Asked
from phi4.errors import REQUEUE_EXIT_CODE
from phi4.rundir.state import RunState
from phi4.train.evaluation import HeldOutLoss
from phi4.train.hooks import RollBack, SaveAndStop
from phi4.train.reliability.phases import Phases
from phi4.train.reliability.requests import Requests
from tests.support.engines import tiny_recipe
from tests.support.waiting import wait_until
from tests.train.test_loop import Loop, Noted, loop

__all__ = ["loop"]

ALONE = SimpleNamespace(world_size=1)


def ask_at(loop: Loop, step: int, asked: Asked) -> None:
    """Let the ranks agree in a step."""
    result = loop.context.engine.train_step.return_value
    results = [replace(result, asked=asked if n == step else Asked()) for n in range(1, 9)]
    loop.context.engine.train_step.side_effect = results


def saves(loop: Loop) -> list[tuple[int, bool, bool]]:
    """Step, is_last and is_asked of what the checkpointer was asked."""
    calls = loop.checkpointer.save_when_due.call_args_list
    return [(c.args[0].step, c.kwargs["is_last"], c.kwargs["is_asked"]) for c in calls]


@pytest.fixture
def quiet(loop: Loop) -> Loop:
    """A run where no save is due."""
    loop.checkpointer.save_when_due.side_effect = lambda _, **asks: (
        "durable" if any(asks.values()) else None
    )
    return loop


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        (Asked(requeue=True), REQUEUE_EXIT_CODE),
        (Asked(end=True), 0),
        (Asked(requeue=True, end=True), 0),
    ],
)
def test_step_in_which_the_run_is_told_to_stop_is_saved_once(
    quiet: Loop, asked: Asked, code: int
) -> None:
    ask_at(quiet, 2, asked)
    ending = quiet.run()
    assert (ending.state.step, ending.status, ending.exit_code) == (2, "interrupted", code)
    assert saves(quiet) == [(1, False, False), (2, True, False)]
    (line,) = quiet.said
    assert line.startswith("stopped after step 2 of 4: ")


def test_step_in_which_a_save_is_asked_for_is_saved_and_the_run_goes_on(quiet: Loop) -> None:
    ask_at(quiet, 2, Asked(save=True))
    ending = quiet.run()
    assert (ending.state.step, ending.exit_code) == (4, 0)
    assert [one for one in saves(quiet) if any(one[1:])] == [(2, False, True), (4, True, False)]


def test_notice_during_a_save_counts_that_save(loop: Loop) -> None:
    noticed = threading.Event()
    loop.context.requests = Requests(noticed)

    def save(progress: object, **asks: bool) -> str:
        noticed.set()
        return "durable"

    loop.checkpointer.save_when_due.side_effect = save
    ending = loop.run()
    assert (ending.state.step, ending.exit_code) == (1, REQUEUE_EXIT_CODE)
    assert saves(loop) == [(1, False, False)]


def test_notice_during_a_save_that_fails_has_the_next_step_saved(loop: Loop) -> None:
    noticed = threading.Event()
    loop.context.requests = Requests(noticed)
    loop.checkpointer.save_when_due.side_effect = [None, "durable"]
    ask_at(loop, 2, Asked(requeue=True))
    assert loop.run().state.step == 2


def test_notice_in_a_step_that_is_rolled_back_is_obeyed_after_the_next(quiet: Loop) -> None:
    ask_at(quiet, 3, Asked(requeue=True))
    a = Noted("a", quiet.calls)
    a.decisions = {3: RollBack(2, "bad")}
    with patch("phi4.train.loop.roll_back", return_value=RunState(step=1)):
        ending = quiet.run(a)
    assert (ending.state.step, ending.exit_code) == (2, REQUEUE_EXIT_CODE)
    assert [step for step, is_last, _ in saves(quiet) if is_last] == [2]


def test_hook_that_stops_in_the_same_step_has_its_own_code(quiet: Loop) -> None:
    ask_at(quiet, 2, Asked(requeue=True))
    a = Noted("a", quiet.calls)
    a.decisions = {2: SaveAndStop("enough", "finished")}
    ending = quiet.run(a)
    assert (ending.status, ending.exit_code) == ("finished", 0)


def test_notice_in_the_last_step_is_a_finished_run(quiet: Loop) -> None:
    ask_at(quiet, 4, Asked(requeue=True))
    ending = quiet.run()
    assert (ending.status, ending.exit_code) == ("finished", 0)


def test_evaluation_is_left_when_the_run_is_told_to_stop() -> None:
    requests = Requests()
    told = [Asked(), Asked(requeue=True)]
    result = SimpleNamespace(loss=1.0, weight=1.0, metrics={})
    engine = Mock(layout=Mock(dp_rank=0, dp_size=1))
    engine.evaluate.side_effect = [SimpleNamespace(**vars(result), asked=one) for one in told]
    held_out = Mock(batches=Mock(return_value=[1, 2, 3]))
    hook = HeldOutLoss(
        tiny_recipe(), engine, Mock(), {"a": held_out, "b": held_out}, requests, Phases()
    )
    assert hook.evaluate() == {}
    assert engine.evaluate.call_count == 2


@pytest.fixture
def look_often() -> Callable[[], object]:
    with patch("phi4.train.reliability.requests.LOOK_SECONDS", 0.01):
        yield


def test_files_ask_and_are_removed_once_they_are_answered(
    tmp_path: Path, look_often: object
) -> None:
    requests = Requests()
    with requests.watching(tmp_path, is_writer=True):
        assert requests.asked() == Asked()
        (tmp_path / "save_now").touch()
        wait_until(lambda: requests.asked() == Asked(save=True), "the request to save")
        assert not requests.agree(ALONE)
        requests.saved()
        assert requests.asked() == requests.agreed == Asked()
        assert not (tmp_path / "save_now").exists()
        (tmp_path / "stop").touch()
        wait_until(lambda: requests.asked() == Asked(end=True), "the request to stop")
        assert requests.agree(ALONE)
        requests.ended()
        assert not (tmp_path / "stop").exists()


def test_only_the_writer_looks_and_it_sees_what_was_there_before(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    for is_writer in (False, True):
        requests = Requests()
        with requests.watching(tmp_path, is_writer=is_writer):
            assert requests.asked().end == is_writer


def test_slow_saves_under_torchrun_are_named_once() -> None:
    said: list[str] = []
    requests = Requests(kill_seconds=30)
    requests.warn_of_slow_saves(10, 14, said.append)
    assert not said
    for _ in range(2):
        requests.warn_of_slow_saves(10, 15.5, said.append)
    (line,) = said
    assert "step takes 10.0 s and a save 15.5 s" in line and "30 s after a SIGTERM" in line
    Requests().warn_of_slow_saves(1000, 1000, said.append)
    assert len(said) == 1
