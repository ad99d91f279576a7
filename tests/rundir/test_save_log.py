"""checkpoints.jsonl: every event of a save, whatever the disk and kills do to it."""

from pathlib import Path
from unittest.mock import patch

import pytest

from phi4.errors import DataError
from phi4.rundir.names import SAVES_FILE
from phi4.rundir.save_log import SaveLog, read_saves


def test_events_are_read_as_they_were_noted(tmp_path: Path) -> None:
    log = SaveLog(tmp_path, 3)
    log.note(5, "scheduled", optimizer_format="full", stall_seconds=0.25)
    log.note(5, "failed", reason='no space left on "/x"')
    first, second = read_saves(tmp_path)
    assert (first.step, first.state, first.attempt, first.stall_seconds) == (
        5,
        "scheduled",
        3,
        0.25,
    )
    assert (second.state, second.reason) == ("failed", 'no space left on "/x"')


def test_line_that_a_kill_cut_off_costs_only_itself(tmp_path: Path) -> None:
    SaveLog(tmp_path, 1).note(5, "durable")
    with (tmp_path / SAVES_FILE).open("ab") as file:
        file.write(b'{"step":6,"sta')
    SaveLog(tmp_path, 2).note(7, "durable")
    assert [(event.step, event.attempt) for event in read_saves(tmp_path)] == [(5, 1), (7, 2)]


def test_event_that_the_disk_refuses_comes_with_the_next(tmp_path: Path) -> None:
    log = SaveLog(tmp_path, 1)
    with patch("phi4.rundir.save_log.Path.open", side_effect=OSError(28, "full")):
        log.note(5, "failed")
    assert not (tmp_path / SAVES_FILE).exists()
    log.note(6, "durable")
    assert [event.step for event in read_saves(tmp_path)] == [5, 6]


def test_run_that_saved_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_saves(tmp_path)
