"""Every second of a run in one bucket, and what was done again as lost."""

from pathlib import Path

import msgspec
import pytest

from phi4.config import Recipe
from phi4.rundir.attempts import Attempt
from phi4.rundir.goodput import BUCKETS, Goodput, goodput_of
from phi4.rundir.process import Process
from phi4.rundir.run_record import RunRecord
from phi4.rundir.step_log import StepLog, read_metrics, read_undone

HERE = Process("host", "", 1, 1)


def attempt(started: float, ended: float = 0.0, outcome: str = "", **seconds: float) -> Attempt:
    return Attempt(
        HERE, "", "", started_unix=started, ended_unix=ended, outcome=outcome, seconds=seconds
    )


def line(number: int, step: int, at: float, undone_by: str = "", /, **seconds: float) -> dict:
    mark = {"undone_by": undone_by} if undone_by else {}
    buckets = {f"seconds/{bucket}": value for bucket, value in seconds.items()}
    return {"attempt": number, "step": step, "unix_seconds": at, **buckets, **mark}


def goodput(attempts: dict[int, Attempt], *lines: dict) -> Goodput:
    undone = [entry for entry in lines if "undone_by" in entry]
    steps = [entry for entry in lines if "undone_by" not in entry]
    return goodput_of(RunRecord(Path("run"), Recipe(), steps, undone, attempts, []))


def test_three_attempts_with_a_kill_and_a_roll_back_sum_to_the_wall_time():
    found = goodput(
        {
            1: attempt(100.0, outcome=""),
            2: attempt(130.0, 160.0, "interrupted", save=4.0, other=1.0),
            3: attempt(170.0, 190.0, "finished", other=2.0),
        },
        line(1, 1, 108.0, start=5.0, load=1.0, data=0.5, step=1.5),
        line(1, 2, 110.0, step=2.0),
        line(1, 3, 114.0, "resume", step=2.0, save=2.0),
        # Killed at some time after that; the next attempt goes on from step 2.
        line(2, 3, 140.0, "roll_back", start=6.0, load=2.0, step=2.0),
        line(2, 4, 143.0, "roll_back", step=2.0, evaluation=1.0),
        line(2, 3, 155.0, roll_back=9.0, step=3.0),
        line(3, 4, 188.0, start=9.0, load=3.0, step=5.0, data=1.0),
    )
    assert found.wall_seconds == 90.0
    assert dict(found.seconds) == {
        "start": 6.0,
        "data": 1.5,
        "step": 1.5 + 2.0 + 3.0 + 5.0,
        "evaluation": 0.0,
        "save": 4.0,
        # Step 3 of the first attempt, until the second one starts, and both later start-ups.
        "restart": 4.0 + 16.0 + 8.0 + 10.0 + 12.0,
        "roll_back": 2.0 + 3.0 + 9.0,
        "other": 3.0,
    }
    assert sum(found.seconds.values()) == found.wall_seconds
    assert found.share == pytest.approx(11.5 / 90.0)


def test_attempt_that_was_killed_beside_its_launcher_is_lost_until_the_end_that_it_noted():
    found = goodput({1: attempt(10.0, 30.0)}, line(1, 1, 18.0, start=6.0, step=2.0))
    assert found.seconds["restart"] == 12.0 and found.wall_seconds == 20.0


def test_run_without_times_has_no_wall_time():
    found = goodput({1: Attempt(HERE, "", "")}, {"step": 1, "loss": 2.0})
    assert found.seconds == dict.fromkeys(BUCKETS, 0.0)
    assert (found.wall_seconds, found.share) == (0.0, 0.0)


def test_lines_that_are_cut_off_say_by_what(tmp_path):
    path, undone = tmp_path / "metrics.jsonl", tmp_path / "undone.jsonl"
    log = StepLog(path, undone=undone)
    for step in range(1, 6):
        log.log(step, {"loss": float("nan"), "attempt": 1, "unix_seconds": step / 7})
    log.rewind(3)
    log.log(4, {"loss": 1.0, "attempt": 1, "unix_seconds": 9.0})
    log.finish("failed")
    StepLog(path, 3, undone=undone)
    lines = read_undone(undone)
    assert [(entry["step"], entry["undone_by"]) for entry in lines] == [
        (4, "roll_back"),
        (5, "roll_back"),
        (4, "resume"),
    ]
    assert lines[1]["loss"] != lines[1]["loss"] and lines[2]["loss"] == 1.0
    assert [entry["step"] for entry in read_metrics(path)] == [1, 2, 3]


def test_line_that_a_kill_left_in_both_files_is_read_once(tmp_path):
    undone = tmp_path / "undone.jsonl"
    text = msgspec.json.encode(line(1, 4, 2.5, "resume"))
    undone.write_bytes(text + b"\n" + text + b"\n" + text[:20])
    assert len(read_undone(undone)) == 1
