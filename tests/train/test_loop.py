"""Hooks in the loop: told and closed however it ends, and obeyed in what they decide."""

from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from unittest.mock import Mock, call, patch

import pytest

from phi4.engine.step_values import StepResult
from phi4.errors import CheckpointError, ConfigError
from phi4.rundir.state import RunState
from phi4.train.hooks import CONTINUE, Decision, Hook, Progress, RollBack, SaveAndStop, strongest
from phi4.train.loop import Ending, train
from phi4.train.reliability.phases import Phases
from phi4.train.reliability.requests import Requests
from phi4.train.run_record import Recorder
from tests.support.engines import tiny_recipe

FIRST, SECOND = SaveAndStop("first"), SaveAndStop("second", status="finished")
NEAR, FAR = RollBack(2, "near"), RollBack(5, "far")


class Noted(Hook):
    """Notes its calls, and raises in those it is told to."""

    def __init__(self, name: str, calls: list[str], *raises_in: str) -> None:
        self.name, self.calls, self.raises_in = name, calls, raises_in
        self.decisions: dict[int, Decision] = {}

    def note(self, what: str, detail: object = "") -> None:
        self.calls.append(f"{self.name} {what} {detail}".strip())
        if what in self.raises_in:
            raise RuntimeError(f"{self.name} cannot {what}")

    def start(self, state: RunState) -> None:
        self.note("start")

    def measure(self, progress: Progress) -> dict[str, float]:
        self.note("measure", progress.step)
        return {}

    def act(self, progress: Progress) -> Decision:
        self.note("act", progress.step)
        return self.decisions.pop(progress.step, CONTINUE)

    def rewind(self, state: RunState) -> None:
        self.note("rewind", state.step)

    def on_error(self, error: BaseException) -> None:
        self.note("on_error", error)

    def close(self) -> None:
        self.note("close")


class Loop:
    """The loop with an engine and a loader that do nothing."""

    def __init__(self, total_steps: int = 4) -> None:
        self.calls: list[str] = []
        result = StepResult(loss=1.0, weight=1.0, grad_norm=1.0, updated=True, metrics={})
        self.said: list[str] = []
        self.context = SimpleNamespace(
            recipe=tiny_recipe(f"run.steps={total_steps}"),
            engine=Mock(train_step=Mock(return_value=result)),
            objective=None,
            state=RunState(),
            say=self.said.append,
            phases=Phases(),
            requests=Requests(),
            platform=SimpleNamespace(world_size=1),
        )
        self.loader = Mock(state=Mock(return_value={}))
        self.checkpointer = Mock()
        self.recorder = Mock(spec=Recorder)

    def run(self, *hooks: Hook) -> Ending:
        return train(self.context, self.loader, hooks, self.checkpointer, self.recorder)

    @property
    def saves(self) -> list[tuple[int, bool]]:
        """Step and `is_last` of what the checkpointer was asked."""
        asked = self.checkpointer.save_when_due.call_args_list
        return [(one.args[0].step, one.kwargs["is_last"]) for one in asked]


@pytest.fixture
def loop() -> Loop:
    return Loop()


STARTED = ["a start", "b start", "c start"]


@pytest.mark.parametrize("broken", ["start", "measure", "act", "step", "record", "save"])
def test_all_started_hooks_are_told_and_closed_when_one_thing_raises(
    loop: Loop, broken: str
) -> None:
    calls = loop.calls
    a, c = Noted("a", calls), Noted("c", calls)
    b = Noted("b", calls, *([broken] if broken in ("start", "measure", "act") else []))
    outside = {
        "step": loop.context.engine.train_step,
        "record": loop.recorder.log,
        "save": loop.checkpointer.save_when_due,
    }
    if broken in outside:
        outside[broken].side_effect = RuntimeError(f"b cannot {broken}")
    with pytest.raises(RuntimeError, match=f"b cannot {broken}"):
        loop.run(a, b, c)
    told = f"on_error b cannot {broken}"
    if broken == "start":
        assert calls == [*STARTED[:2], f"a {told}", f"b {told}", "b close", "a close"]
        return
    assert calls[:3] == STARTED
    assert calls[-6:] == [f"{n} {told}" for n in "abc"] + [f"{n} close" for n in "cba"]
    assert not [one for one in calls[3:-6] if one.split()[1] not in ("measure", "act")]


def test_error_while_telling_or_closing_hides_nothing_and_stops_nobody(
    loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    a = Noted("a", loop.calls, "on_error", "close")
    b = Noted("b", loop.calls, "measure", "close")
    with pytest.raises(RuntimeError, match="b cannot measure"):
        loop.run(a, b)
    assert [one.split()[:2] for one in loop.calls[-4:]] == [
        ["a", "on_error"],
        ["b", "on_error"],
        ["b", "close"],
        ["a", "close"],
    ]
    for what in ("a cannot on_error", "b cannot close", "a cannot close"):
        assert what in caplog.text


def test_error_of_a_close_at_a_normal_end_is_raised_once_all_are_closed(loop: Loop) -> None:
    a, b = Noted("a", loop.calls), Noted("b", loop.calls, "close")
    with pytest.raises(RuntimeError, match="b cannot close"):
        loop.run(a, b)
    assert loop.calls[-2:] == ["b close", "a close"]
    assert not [one for one in loop.calls if "on_error" in one]


def test_run_to_its_last_step_is_finished(loop: Loop) -> None:
    ending = loop.run(Noted("a", loop.calls))
    assert (ending.state.step, ending.status) == (4, "finished")
    assert loop.saves == [(1, False), (2, False), (3, False), (4, True)]


@pytest.mark.parametrize(
    ("decisions", "expected"),
    [
        ([], CONTINUE),
        ([CONTINUE, NEAR], NEAR),
        ([NEAR, FAR, CONTINUE], FAR),
        ([NEAR, FIRST, SECOND, FAR], FIRST),
    ],
)
def test_stop_beats_roll_back_beats_continue(decisions: list[Decision], expected: Decision) -> None:
    assert strongest(decisions) is expected


@pytest.mark.parametrize("stop", [FIRST, SECOND])
def test_hook_that_stops_has_its_step_saved_and_the_others_act(
    loop: Loop, stop: SaveAndStop
) -> None:
    a, b = Noted("a", loop.calls), Noted("b", loop.calls)
    a.decisions, b.decisions = {2: stop}, {2: FAR}
    ending = loop.run(a, b)
    assert (ending.state.step, ending.status) == (2, stop.status)
    assert loop.saves == [(1, False), (2, True)]
    assert loop.calls[-4:] == ["a act 2", "b act 2", "b close", "a close"]
    (line,) = loop.said
    assert f"stopped after step 2 of 4: {stop.reason}" in line and "same command" in line


def test_stop_at_the_last_step_is_a_finished_run(loop: Loop) -> None:
    a = Noted("a", loop.calls)
    a.decisions = {4: FIRST}
    assert loop.run(a).status == "finished"
    assert loop.saves[-1] == (4, True) and not loop.said


@pytest.fixture
def rolled_back() -> Iterator[Mock]:
    with ExitStack() as stack:
        yield stack.enter_context(patch("phi4.train.loop.roll_back"))


def test_step_that_is_rolled_back_is_not_saved(loop: Loop, rolled_back: Mock) -> None:
    a, b = Noted("a", loop.calls), Noted("b", loop.calls)
    b.decisions = {3: NEAR}
    rolled_back.return_value = RunState(step=1, consumed_tokens=5)
    ending = loop.run(a, b)
    assert ending.state.step == 4 and ending.state.consumed_tokens == 5 + 3 * 8 * 32
    assert [step for step, _ in loop.saves] == [1, 2, 2, 3, 4]
    at = loop.calls.index("b act 3")
    assert loop.calls[at + 1 : at + 4] == ["a rewind 1", "b rewind 1", "a measure 2"]
    assert loop.checkpointer.rewind.mock_calls == [call()]
    (_, now, asked), options = rolled_back.call_args
    assert (now.step, asked, options) == (3, NEAR, {"rewind_records": loop.recorder.rewind})


def test_failed_roll_back_is_told(loop: Loop, rolled_back: Mock) -> None:
    a = Noted("a", loop.calls)
    a.decisions = {1: NEAR}
    rolled_back.side_effect = CheckpointError("none is old enough")
    with pytest.raises(CheckpointError):
        loop.run(a)
    assert loop.calls[-2:] == ["a on_error none is old enough", "a close"]


def test_roll_back_of_no_step_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"RollBack\(steps=0\) undoes nothing; use at least 1"):
        RollBack(0, "spike")
