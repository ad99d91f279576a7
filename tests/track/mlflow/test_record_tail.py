"""Reading a metrics.jsonl while a run appends to it and cuts it."""

from pathlib import Path

import pytest

from phi4.errors import DataError
from phi4.rundir.step_log import StepLog
from phi4.track.mlflow.record_tail import Place, RecordTail


class Writer:
    """A run's record and its reader."""

    def __init__(self, path: Path) -> None:
        self.log, self.tail, self.place = StepLog(path, say=print), RecordTail(path), Place()
        self.clock = 0

    def train(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.clock += 1
            self.log.log(step, {"loss": float("nan"), "unix_seconds": self.clock})

    def steps(self) -> list[int]:
        lines, self.place = self.tail.read(self.place)
        return [line["step"] for line in lines]


@pytest.fixture
def writer(tmp_path) -> Writer:
    return Writer(tmp_path / "metrics.jsonl")


def test_each_line_is_read_once(writer):
    assert writer.steps() == []
    writer.train(1, 3)
    assert writer.steps() == [1, 2, 3]
    assert writer.steps() == []
    writer.train(4, 4)
    assert writer.steps() == [4]


@pytest.mark.parametrize("grown", [1, 2, 3, 9])
def test_cut_is_seen_however_long_the_file_is_again(writer, grown):
    writer.train(1, 5)
    assert writer.steps() == [1, 2, 3, 4, 5]
    writer.log.rewind(3)
    writer.train(4, 3 + grown)
    assert writer.steps() == list(range(1, 4 + grown))


def test_cut_behind_what_was_read_is_none(writer):
    writer.train(1, 3)
    assert writer.steps() == [1, 2, 3]
    writer.train(4, 5)
    writer.log.rewind(3)
    writer.train(4, 4)
    assert writer.steps() == [4]


def test_file_that_begins_anew_is_read_anew(writer):
    writer.train(1, 2)
    assert writer.steps() == [1, 2]
    writer.log.rewind(0)
    assert writer.steps() == []
    writer.train(1, 1)
    assert writer.steps() == [1]


def test_no_file_is_no_lines(tmp_path):
    assert RecordTail(tmp_path / "none").read(Place(5, b"hello")) == ([], Place())


def test_line_in_the_making_waits(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1,"unix_seconds":1.5}\n{"step":2,')
    lines, place = RecordTail(path).read(Place())
    assert lines == [{"step": 1, "unix_seconds": 1.5}]
    with path.open("ab") as file:
        file.write(b'"unix_seconds":2.5}\n')
    assert RecordTail(path).read(place)[0] == [{"step": 2, "unix_seconds": 2.5}]


def test_lines_without_a_time_have_that_of_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1,"loss":"NaN"}\n')
    [line], _ = RecordTail(path).read(Place())
    assert line["unix_seconds"] == path.stat().st_mtime


def test_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"{}\n")
    with pytest.raises(DataError, match=r"metrics.jsonl is not the JSON object of a step"):
        RecordTail(path).read(Place())
