"""Another run continues the ledger of one that was rolled back behind the skipped data."""

from pathlib import Path

import pytest

from phi4.data.files.atomic_files import write_atomically
from phi4.rundir.names import ROLL_BACK_FILE
from phi4.rundir.roll_back import continued_behind, ledger_of
from phi4.rundir.state import FP8Fallback, RunState, Skip

SKIP = Skip(after_step=4, last_undone=6, units=8, rows=2, reason="spike")
ROLL_BACK = RunState(step=4, data={"drawn": 6}, skips=(SKIP,))


@pytest.mark.parametrize(
    ("saved", "drawn"),
    [
        (RunState(step=4, data={"drawn": 4}), 6),
        (RunState(step=6, data={"drawn": 5}), 6),  # undone, and a kill left it
        (RunState(step=5, data={"drawn": 7}, skips=(SKIP,)), 7),
        (RunState(step=2, data={"drawn": 2}), 2),  # asked for by name
    ],
    ids=["gone back to", "undone", "after it", "before it"],
)
def test_ledger_lies_behind_the_skipped_data(tmp_path: Path, saved: RunState, drawn: int) -> None:
    assert ledger_of(tmp_path, saved) == saved.data
    write_atomically(tmp_path / ROLL_BACK_FILE, ROLL_BACK.to_json().encode())
    assert ledger_of(tmp_path, saved) == {"drawn": drawn}


def test_layers_that_left_fp8_in_undone_steps_stay_out() -> None:
    known = FP8Fallback(2, 1, "before")
    found = FP8Fallback(5, 3, "in the undone steps")
    ledger = {"seed": 1, "unit_tokens": 4, "sources": {}, "blends": [{"weights": {}, "drawn": {}}]}
    saved = RunState(step=4, data=ledger, fp8_fallbacks=(known,))
    drawn = RunState(step=6, data=ledger, fp8_fallbacks=(known, found))
    state = continued_behind(saved, drawn, row_units=1, reason="spike")
    assert (state.step, state.fp8_fallbacks) == (4, (known, found))
