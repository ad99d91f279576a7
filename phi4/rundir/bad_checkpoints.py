"""Record checkpoints after which training became NaN; after the second time they are not used
again.

`checkpoints/bad.jsonl` has a line per occurrence. A checkpoint is identified by the hash of its
manifest, so that a later one of the same step is not confused with it.
"""

import os
from pathlib import Path

import msgspec

from phi4.rundir.checkpoints import checkpoint_name
from phi4.rundir.manifest import manifest_hash
from phi4.rundir.names import BAD_CHECKPOINTS_FILE

TIMES = 2
"""Number of times after which a checkpoint is bad: once may be a hardware fault."""


class TurnedBad(msgspec.Struct, frozen=True):
    """An occurrence of NaN soon after a checkpoint."""

    checkpoint: str
    manifest_sha256: str
    at_step: int
    """The first step that was not finite."""


def note_bad(root: Path, step: int, at_step: int) -> int:
    """Record that training from a checkpoint became NaN; only the writer rank calls it.

    Args:
        root: the run's `checkpoints` directory.
        step: step of the checkpoint.
        at_step: the first step that was not finite.

    Returns:
        The number of occurrences, including this one.

    Raises:
        OSError: the line cannot be written.
    """
    checkpoint = root / checkpoint_name(step)
    line = TurnedBad(checkpoint.name, manifest_hash(checkpoint), at_step)
    with (root / BAD_CHECKPOINTS_FILE).open("ab") as stream:
        # A kill may have left an incomplete line.
        stream.write(b"\n" + msgspec.json.encode(line) + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
    return _times(root, checkpoint)


def forget_bad(root: Path) -> None:
    """Allow every checkpoint again: the schedule changed, which may have been the cause."""
    (root / BAD_CHECKPOINTS_FILE).unlink(missing_ok=True)


def is_bad(checkpoint: Path) -> bool:
    """Return whether training from a checkpoint became NaN too often."""
    return _times(checkpoint.parent, checkpoint) >= TIMES


def is_bad_content(root: Path, manifest_sha256: str) -> bool:
    """Return the same for a checkpoint at another path, by the hash of its manifest."""
    return sum(line.manifest_sha256 == manifest_sha256 for line in _lines(root)) >= TIMES


def _times(root: Path, checkpoint: Path) -> int:
    found = [line for line in _lines(root) if line.checkpoint == checkpoint.name]
    if not found:
        return 0
    digest = manifest_hash(checkpoint)
    return sum(line.manifest_sha256 == digest for line in found)


def _lines(root: Path) -> list[TurnedBad]:
    """Return every complete line; a kill may have cut the last one, and invalid lines are
    ignored."""
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
