"""A checkpoint is bad after the second time that training from it turned NaN."""

from pathlib import Path

import pytest

from phi4.rundir.bad_checkpoints import is_bad, note_bad
from phi4.rundir.names import BAD_CHECKPOINTS_FILE, MANIFEST_FILE


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for step in (2, 4):
        checkpoint = tmp_path / f"step_{step:07}"
        checkpoint.mkdir()
        (checkpoint / MANIFEST_FILE).write_text(f"manifest of {step}")
    return tmp_path


def test_second_time_makes_it_bad(root: Path) -> None:
    checkpoint = root / "step_0000004"
    assert not is_bad(checkpoint)
    assert note_bad(root, 4, 5) == 1 and not is_bad(checkpoint)
    assert note_bad(root, 2, 5) == 1
    assert note_bad(root, 4, 6) == 2 and is_bad(checkpoint)
    assert not is_bad(root / "step_0000002")


def test_another_checkpoint_of_the_same_step_is_not_taken_for_it(root: Path) -> None:
    note_bad(root, 4, 5)
    note_bad(root, 4, 5)
    (root / "step_0000004" / MANIFEST_FILE).write_text("another one")
    assert not is_bad(root / "step_0000004")


def test_line_that_a_kill_cut_says_nothing(root: Path) -> None:
    note_bad(root, 4, 5)
    with (root / BAD_CHECKPOINTS_FILE).open("a") as stream:
        stream.write('{"checkpoint":"step_0000004","mani')
    assert not is_bad(root / "step_0000004")
    assert note_bad(root, 4, 5) == 2
