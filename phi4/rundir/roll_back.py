"""A rollback on disk: where the run resumes, and which data it never draws again.

The run returns to an earlier checkpoint and continues after all data that it had drawn. That
checkpoint is not rewritten: `roll_back.json` holds the state that replaces its own. The rollback
takes effect once this file is durable; if a kill interrupts the rest, the next start completes it.
The file is kept, because a later start may have to use that checkpoint again.
"""

from pathlib import Path
from typing import Any

import msgspec

from phi4.data.files.atomic_files import write_atomically
from phi4.data.stream.ledger import parse_state
from phi4.data.stream.replay import units_by_blend
from phi4.errors import CheckpointError
from phi4.rundir.checkpoints import checkpoints_dir, remove_newer
from phi4.rundir.names import ROLL_BACK_FILE
from phi4.rundir.state import RunState, Skip


def continued_behind(
    saved: RunState, drawn: RunState, *, row_units: int, reason: str = ""
) -> RunState:
    """Return a checkpoint's state, moved past all data that was drawn after it.

    Args:
        saved: state of the checkpoint.
        drawn: state at a later position of the same stream, whose steps after the checkpoint are
            undone.
        row_units: units of a row.
        reason: reason for a new rollback; empty for one already in effect whose checkpoint is
            replaced by another: then the reasons of the rollbacks that are undone with it.
    """
    kept = tuple(skip for skip in drawn.skips if skip.after_step <= saved.step)
    folded = [skip for skip in drawn.skips if skip.after_step > saved.step]
    units = _units_drawn(drawn) - _units_drawn(saved)
    # Skips are only ever appended, so those of the checkpoint come first.
    units -= sum(skip.units for skip in kept[len(saved.skips) :])
    if units:
        skip = Skip(
            after_step=saved.step,
            last_undone=max([drawn.step, *(skip.last_undone for skip in folded)]),
            units=units,
            rows=units // row_units,
            reason=reason or "; ".join(skip.reason for skip in folded),
        )
        kept = (*kept, skip)
    return msgspec.structs.replace(
        saved,
        data=drawn.data,
        skips=kept,
        roll_backs=drawn.roll_backs + bool(reason),
        fp8_fallbacks=drawn.fp8_fallbacks,
    )


def commit_roll_back(run_dir: Path, state: RunState) -> None:
    """Make a rollback take effect durably; only the writer rank calls it.

    Args:
        run_dir: run directory of the run.
        state: state that it resumes with; a checkpoint of its step exists.

    Raises:
        DiskFullError: there is no space for the file; the rollback has no effect.
        OSError: the file system fails otherwise.
    """
    write_atomically(run_dir / ROLL_BACK_FILE, state.to_json().encode())
    remove_newer(checkpoints_dir(run_dir), state.step)


def forget_roll_back(run_dir: Path) -> None:
    """Remove the file when a run starts over in the directory; only the writer rank calls it."""
    (run_dir / ROLL_BACK_FILE).unlink(missing_ok=True)


def read_roll_back(run_dir: Path) -> RunState | None:
    """Read the state that the newest rollback resumed with; None without one.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = run_dir / ROLL_BACK_FILE
    try:
        return RunState.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); remove it to train on the data that was skipped"
        ) from None


def is_undone(saved: RunState, roll_back: RunState) -> bool:
    """Return whether a checkpoint is of steps that a rollback undid, so that it lacks the
    rollback's skips."""
    return saved.step > roll_back.step and not _knows(saved, roll_back)


def still_counts(saved: RunState, roll_back: RunState | None) -> bool:
    """Return whether a checkpoint that was kept elsewhere is of steps that no rollback undid.

    A rollback removes checkpoints from the run's directory, but not other copies, so this checks
    all rollbacks: a valid checkpoint contains all skips before its step.
    """
    if roll_back is None:
        return True
    before = tuple(skip for skip in roll_back.skips if skip.after_step < saved.step)
    return not is_undone(saved, roll_back) and saved.skips[: len(before)] == before


def ledger_of(run_dir: Path, saved: RunState) -> dict[str, Any] | None:
    """Return the ledger that another run continues with from a checkpoint of this one; None without
    one.

    If the checkpoint is the one that a rollback returned to, or of a step that it undid, that is
    the ledger after the skipped data.

    Raises:
        CheckpointError: the rollback's file is damaged.
    """
    roll_back = read_roll_back(run_dir)
    if roll_back is None or saved.step < roll_back.step or _knows(saved, roll_back):
        return saved.data
    return roll_back.data


def follows_roll_back(state: RunState) -> bool:
    """Return whether no step was done since a rollback, so that no checkpoint holds this state
    yet."""
    return bool(state.skips) and state.skips[-1].after_step == state.step


def _knows(saved: RunState, roll_back: RunState) -> bool:
    return saved.skips[: len(roll_back.skips)] == roll_back.skips


def _units_drawn(state: RunState) -> int:
    """Return units of the stream before a position of it."""
    return sum(units_by_blend(parse_state(state.data or {})))
