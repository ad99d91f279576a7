"""Checkpoints after which training turned NaN: noted, and after the second time never taken again.

`checkpoints/bad.jsonl` has a line per time. A checkpoint is known by the hash of its manifest, so
that a later one of the same step is not taken for it.
"""

import os
from pathlib import Path

import msgspec

from phi4.rundir.checkpoints import checkpoint_name
from phi4.rundir.manifest import manifest_hash
from phi4.rundir.names import BAD_CHECKPOINTS_FILE

TIMES = 2
"""So often a checkpoint may turn NaN before it is bad: once may be the machine."""


class TurnedBad(msgspec.Struct, frozen=True):
    """Training from a checkpoint that turned NaN soon."""

    checkpoint: str
    manifest_sha256: str
    at_step: int
    """The first step that was not finite."""


def note_bad(root: Path, step: int, at_step: int) -> int:
    """Note that training from a checkpoint turned NaN; only the writer rank calls it.

    Args:
        root: the run's `checkpoints` directory.
        step: of the checkpoint.
        at_step: the first step that was not finite.

    Returns:
        How often that happened now.

    Raises:
        OSError: the line cannot be written.
    """
    checkpoint = root / checkpoint_name(step)
    line = TurnedBad(checkpoint.name, manifest_hash(checkpoint), at_step)
    with (root / BAD_CHECKPOINTS_FILE).open("ab") as stream:
        # A kill may have left half a line.
        stream.write(b"\n" + msgspec.json.encode(line) + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
    return _times(root, checkpoint)


def forget_bad(root: Path) -> None:
    """Let every checkpoint be tried again: the schedule changed, which may have been the cause."""
    (root / BAD_CHECKPOINTS_FILE).unlink(missing_ok=True)


def is_bad(checkpoint: Path) -> bool:
    """Whether training from a checkpoint turned NaN too often."""
    return _times(checkpoint.parent, checkpoint) >= TIMES


def is_bad_content(root: Path, manifest_sha256: str) -> bool:
    """The same of a checkpoint that lies elsewhere, by the hash of its manifest."""
    return sum(line.manifest_sha256 == manifest_sha256 for line in _lines(root)) >= TIMES


def _times(root: Path, checkpoint: Path) -> int:
    found = [line for line in _lines(root) if line.checkpoint == checkpoint.name]
    if not found:
        return 0
    digest = manifest_hash(checkpoint)
    return sum(line.manifest_sha256 == digest for line in found)


def _lines(root: Path) -> list[TurnedBad]:
    """Every whole line; a kill may have cut the last one, and what is no line says nothing."""
    try:
        text = (root / BAD_CHECKPOINTS_FILE).read_bytes()
    except FileNotFoundError:
        return []
    found = []
    for line in text.splitlines():
        try:
            found.append(msgspec.json.decode(line, type=TurnedBad))
        except msgspec.DecodeError:
            continue
    return found
