"""A line's seconds: by bucket, from the attempt's own beginning, and with nothing left out."""

from types import SimpleNamespace

import pytest

from phi4.rundir.goodput import SECONDS
from phi4.train.reliability.phases import Phases
from phi4.train.wall_clock import WallClock


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time, in a list of one number; both clocks show it, one from another beginning."""
    now = [1000.0]
    # The clocks of these two modules alone: other threads of the process read the real ones.
    clocks = SimpleNamespace(monotonic=lambda: now[0] - 400, time=lambda: now[0])
    for module in ("wall_clock", "reliability.phases"):
        monkeypatch.setattr(f"phi4.train.{module}.time", clocks)
    return now


def seconds_of(line: dict[str, float]) -> dict[str, float]:
    return {
        key.removeprefix(SECONDS): value for key, value in line.items() if key.startswith(SECONDS)
    }


@pytest.mark.parametrize(("started", "start"), [(990.0, 17.0), (1004.0, 3.0)])
def test_first_line_counts_from_the_attempts_beginning(clock, started, start):
    """It began with its launcher, before this process; or with a lease that a rank took itself."""
    phases = Phases()
    clock[0] += 7
    with phases.during("load", 0):
        clock[0] += 2
    with phases.during("step", 0):
        clock[0] += 5
    line = WallClock(phases, 3, started).numbers()
    assert seconds_of(line) == {"start": start, "load": 2.0, "step": 5.0}
    assert (line["attempt"], line["unix_seconds"]) == (3, 1014.0)
    assert sum(seconds_of(line).values()) == line["unix_seconds"] - started


def test_lines_follow_each_other_without_a_gap(clock):
    phases = Phases()
    wall = WallClock(phases, 1, 1000.0)
    wall.taken()
    since, found = clock[0], 0.0
    for phase in ("data", "step", "evaluate", "hooks", "save", "roll_back"):
        with phases.during(phase, 1):
            clock[0] += 1.5
            with phases.during("save", 1):
                clock[0] += 0.25
            clock[0] += 0.5
        line = wall.numbers()
        found += sum(seconds_of(line).values())
        assert seconds_of(line)["save"] == (2.25 if phase == "save" else 0.25)
    assert found == clock[0] - since
    assert line["goodput"] == pytest.approx(2.0 / (clock[0] - 1000.0))
