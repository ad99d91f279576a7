"""metrics.jsonl survives a kill at any byte and holds every step once."""

import errno
import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi4.errors import DataError, DiskFullError
from phi4.rundir.step_log import StepLog, read_metrics


def write(path: Path, steps: range, resume_step: int = 0, attempt: int = 0) -> None:
    metrics = StepLog(path, resume_step)
    for step in steps:
        metrics.log(step, {"loss": step / 3, "attempt": attempt})
    metrics.finish("failed")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_step_is_there_once_after_kills_and_resumes(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    done, owner = 0, {}
    for attempt in range(data.draw(st.integers(1, 4))):
        end = done + data.draw(st.integers(1, 12))
        write(path, range(done + 1, end + 1), done, attempt)
        owner |= dict.fromkeys(range(done + 1, end + 1), attempt)
        # A kill cuts the file at any byte after the last checkpoint's line.
        lines = path.read_bytes().splitlines(keepends=True)
        done = data.draw(st.integers(done, end))
        kept = sum(map(len, lines[:done]))
        cut = data.draw(st.integers(kept, kept + sum(map(len, lines[done:]))))
        path.write_bytes(b"".join(lines)[:cut])
        read = read_metrics(path)
        assert [line["step"] for line in read] == list(range(1, len(read) + 1))
        assert done <= len(read) <= end
    write(path, range(done + 1, done + 4), done, attempt=99)
    owner = {step: by for step, by in owner.items() if step <= done}
    owner |= dict.fromkeys(range(done + 1, done + 4), 99)
    expected = [{"step": s, "loss": s / 3, "attempt": by} for s, by in owner.items()]
    assert read_metrics(path) == expected


def test_line_is_on_disk_when_log_returns(tmp_path):
    metrics = StepLog(tmp_path / "new" / "metrics.jsonl")
    metrics.log(1, {"loss": 0.1 + 0.2, "consumed_tokens": 10**13, "held_out_loss/code": 2.0})
    line = b'{"step":1,"loss":0.30000000000000004,"consumed_tokens":10000000000000,'
    assert (
        tmp_path / "new" / "metrics.jsonl"
    ).read_bytes() == line + b'"held_out_loss/code":2.0}\n'


def test_numbers_that_are_not_finite_are_valid_json_and_come_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    StepLog(path).log(1, {"nan": math.nan, "up": math.inf, "down": -math.inf})

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    text = json.loads(path.read_text(), parse_constant=refuse)
    assert text == {"step": 1, "nan": "NaN", "up": "Infinity", "down": "-Infinity"}
    (line,) = read_metrics(path)
    assert math.isnan(line["nan"]) and (line["up"], line["down"]) == (math.inf, -math.inf)


def test_step_is_never_logged_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    metrics = StepLog(path, 3)
    with pytest.raises(AssertionError, match="step 3 was logged after step 3"):
        metrics.log(3, {"held_out_loss": 1.0})


def test_start_from_nothing_forgets_an_evaluation_before_the_first_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(0, 3))
    write(path, range(0, 2))
    assert [line["step"] for line in read_metrics(path)] == [0, 1]


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"loss": 1.0}', '{"step": "2"}', ""])
def test_damaged_line_is_refused_by_its_number(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    for attempt in (lambda: read_metrics(path), lambda: StepLog(path, 3)):
        with pytest.raises(DataError, match=r"metrics.jsonl:2 is not"):
            attempt()
    assert path.read_text().count("\n") == 3, "nothing is written over"


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_lines_that_a_full_disk_refuses_are_kept_and_written_in_order(tmp_path, monkeypatch):
    said: list[str] = []
    metrics = StepLog(tmp_path / "metrics.jsonl", say=said.append)
    disk = FullDisk(metrics._file, room=30)
    monkeypatch.setattr(metrics, "_file", disk)
    for step in range(1, 5):
        metrics.log(step, {"loss": 1.0})
    assert len(said) == 1 and "metrics.jsonl: no space" in said[0]
    disk.room = 10_000
    metrics.log(5, {"loss": 1.0})
    assert said[1:] == [f"{tmp_path}/metrics.jsonl is complete again"]
    metrics.finish("finished")
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("room", [0, 10, 30, 60, 75, 10_000])
@pytest.mark.parametrize("step", [0, 1, 2, 4])
def test_undone_steps_are_cut_from_the_file_and_from_memory(tmp_path, monkeypatch, room, step):
    """Whatever part of them a full disk had taken; a line has 22 bytes."""
    metrics = StepLog(tmp_path / "metrics.jsonl", say=lambda _: None)
    disk = FullDisk(metrics._file, room=room)
    monkeypatch.setattr(metrics, "_file", disk)
    for number in range(1, 5):
        metrics.log(number, {"loss": 1.0})
    metrics.rewind(step)
    disk.room = 10_000
    for number in range(step + 1, 4):
        metrics.log(number, {"loss": 2.0})
    metrics.finish("finished")
    found = {line["step"]: line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")}
    kept = dict.fromkeys(range(1, step + 1), 1.0)
    assert found == kept | dict.fromkeys(range(step + 1, 4), 2.0)


@pytest.mark.parametrize("status", ["finished", "failed"])
def test_finished_run_whose_lines_do_not_fit_is_an_error(tmp_path, monkeypatch, status):
    metrics = StepLog(tmp_path / "metrics.jsonl", say=lambda _: None)
    monkeypatch.setattr(metrics, "_file", FullDisk(metrics._file, room=0))
    metrics.log(1, {"loss": 1.0})
    # A run that failed has an error of its own to tell.
    with pytest.raises(DiskFullError) if status == "finished" else nullcontext():
        metrics.finish(status)


class FullDisk:
    """A file on a disk with `room` bytes left."""

    def __init__(self, file: BinaryIO, room: int) -> None:
        self._file, self.room = file, room

    def write(self, content: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self._file.write(content[: self.room])
        self.room -= written
        return written

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()
