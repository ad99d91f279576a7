"""A step's line is found among any others, and a resumed run writes its own."""

from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phi4.engine.platform import Platform
from phi4.engine.step_values import StepResult
from phi4.errors import DataError
from phi4.rundir.ledger_log import recorded_counts
from phi4.rundir.names import LEDGER_FILE
from phi4.rundir.state import RunState
from phi4.train.hooks import Progress
from phi4.train.ledger_record import LedgerRecord
from tests.support.engines import tiny_recipe

ALONE = Platform("cpu", torch.device("cpu"), 0, 1, "test")


def write(run: Path, steps: range, resume_step: int = 0, factor: int = 1) -> None:
    record = LedgerRecord(tiny_recipe(f"run.dir={run}"), ALONE)
    record.start(RunState(step=resume_step))
    for step in steps:
        drawn = factor * 10**step
        sources = {name: {"drawn": drawn, "loss_tokens": 7 * drawn} for name in ("web", "a/b")}
        state = RunState(step=step, data={"sources": sources})
        record.act(Progress(state, steps[-1], 1, 1.0, 1.0, Mock(spec=StepResult)))
    record.close()


def counts(step: int, factor: int = 1) -> dict[str, tuple[int, int]]:
    drawn = factor * 10**step
    return {"web": (drawn, 7 * drawn), "a/b": (drawn, 7 * drawn)}


@settings(max_examples=30)
@given(first=st.integers(1, 4), length=st.integers(1, 12), lost_bytes=st.integers(0, 40))
def test_every_whole_line_is_found_and_no_other(
    tmp_path: Path, first: int, length: int, lost_bytes: int
) -> None:
    (tmp_path / LEDGER_FILE).unlink(missing_ok=True)
    write(tmp_path, range(first, first + length))
    content = (tmp_path / LEDGER_FILE).read_bytes()
    (tmp_path / LEDGER_FILE).write_bytes(content[: len(content) - lost_bytes])
    last = first + length - 1
    for step in range(first, last + (lost_bytes == 0)):
        assert recorded_counts(tmp_path, step) == counts(step)
    for step in (0, first - 1, last + 1, *([last] if lost_bytes else [])):
        assert recorded_counts(tmp_path, step) is None


def test_resumed_run_writes_over_what_happens_again(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8))
    write(tmp_path, range(4, 6), resume_step=3, factor=2)
    found = [recorded_counts(tmp_path, step) for step in range(1, 8)]
    assert found == [*map(counts, (1, 2, 3)), counts(4, 2), counts(5, 2), None, None]


def test_damaged_line_is_named(tmp_path: Path) -> None:
    assert recorded_counts(tmp_path, 3) is None
    (tmp_path / LEDGER_FILE).write_text('{"step": 1}\nwhat\n{"step": 9}\n')
    with pytest.raises(DataError, match=r"ledger\.jsonl is damaged at byte 12; remove the file"):
        recorded_counts(tmp_path, 9)
