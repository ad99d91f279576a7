"""Locations of checkpoints: `checkpoints/step_0000123/`, written under a temporary name and
renamed.

`latest` is a file that names the newest complete one; it is replaced atomically after the rename,
so a kill at any moment leaves a `latest` that can be loaded.
"""

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from phi4.errors import CheckpointError
from phi4.rundir.manifest import read_manifest
from phi4.rundir.names import CHECKPOINTS_DIR, LATEST_FILE, MANIFEST_FILE

_NAME = re.compile(r"step_(\d{7,})")


def checkpoints_dir(run_dir: str | Path) -> Path:
    """Return the directory of a run's checkpoints."""
    return Path(run_dir) / CHECKPOINTS_DIR


def checkpoint_name(step: int) -> str:
    """`step_0000123`."""
    return f"step_{step:07d}"


def step_of(directory: Path) -> int:
    """Return the step in a checkpoint's name."""
    match = _NAME.fullmatch(directory.name)
    if not match:
        raise CheckpointError(f"{directory} is not a checkpoint; its name is not step_NNNNNNN")
    return int(match.group(1))


def complete_checkpoints(root: Path) -> list[Path]:
    """Return checkpoints with a manifest, oldest first."""
    if not root.is_dir():
        return []
    found = [p for p in root.iterdir() if _NAME.fullmatch(p.name) and (p / MANIFEST_FILE).is_file()]
    return sorted(found, key=step_of)


def latest_checkpoint(root: Path) -> Path | None:
    """Return the checkpoint in `latest`, else the newest complete checkpoint, else None."""
    complete = complete_checkpoints(root)
    pointer = root / LATEST_FILE
    if pointer.is_file():
        named = root / pointer.read_text(encoding="utf-8", errors="replace").strip()
        if named in complete:
            return named
    return complete[-1] if complete else None


def find_checkpoint(place: Path) -> Path:
    """Find a checkpoint, or the newest one of a `checkpoints` directory or of a run directory.

    Raises:
        CheckpointError: there is none.
    """
    if _NAME.fullmatch(place.name):
        if not place.is_dir():
            raise CheckpointError(f"{place} does not exist; give RUN for its newest checkpoint")
        return place
    for root in (place, checkpoints_dir(place)):
        newest = latest_checkpoint(root)
        if newest is not None:
            return newest
    raise CheckpointError(
        f"no checkpoint in {place}; give RUN/checkpoints/step_NNNNNNN, RUN/checkpoints or RUN"
    )


def read_checkpoint_file(checkpoint: Path, name: str) -> str:
    """Return the text of a small file of a checkpoint.

    Raises:
        CheckpointError: it is not there, or not text.
    """
    try:
        return (checkpoint / name).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{checkpoint} has no {name}; give a directory like RUN/checkpoints/step_0000100"
        ) from None
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{checkpoint / name} is damaged: {error}; use another checkpoint"
        ) from None


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept when a new one is complete.

    Attributes:
        keep: number of newest checkpoints to keep, in addition to the newest that any layout can
            load.
        keep_every: keep those whose step is a multiple of this for ever; 0 means none.
    """

    keep: int
    keep_every: int = 0


class CheckpointDirectory:
    """A checkpoint that is being written. Only the writer rank, or its writer process, calls the
    methods.

    Args:
        root: the run's `checkpoints` directory.
        step: optimizer steps done.
        tag: identifies this attempt at the save. A writer that hung in an earlier attempt at the
            same step and continues later finds its directory gone.
    """

    def __init__(self, root: Path, step: int, tag: str = "") -> None:
        self.root = root
        self.final = root / checkpoint_name(step)
        self.partial = root / f".{self.final.name}{tag and '.'}{tag}.partial"

    def begin(self) -> None:
        """Return an empty directory to write into; remove leftovers of killed saves.

        No other save of the run may be in progress.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        for stale in self.root.glob(".step_*.partial"):
            shutil.rmtree(stale, ignore_errors=stale != self.partial)
        self.partial.mkdir()

    def discard(self) -> None:
        """Remove what was written; earlier checkpoints are unaffected."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def commit(self, files: Mapping[str, bytes], manifest: bytes) -> None:
        """Write the small files and the manifest, make all durable, rename, point `latest` at it.

        All other files in the manifest must already be durable.
        """
        for name, content in files.items():
            write_durably(self.partial / name, content)
        write_durably(self.partial / MANIFEST_FILE, manifest)
        for directory in [p for p in self.partial.rglob("*") if p.is_dir()] + [self.partial]:
            sync_directory(directory)
        if self.final.exists():
            _remove(self.final)
        self.partial.rename(self.final)
        sync_directory(self.root)
        _point_latest_at(self.final)

    def holds(self, manifest: bytes) -> bool:
        """Return whether this exact checkpoint is complete and `latest` names it."""
        try:
            written = (self.final / MANIFEST_FILE).read_bytes()
            named = (self.root / LATEST_FILE).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return False
        return written == manifest and named.strip() == self.final.name

    def prune(self, retention: Retention) -> None:
        """Remove the checkpoints that the retention policy does not keep."""
        complete = complete_checkpoints(self.root)
        kept = {*complete[-retention.keep :], self.final}
        kept |= set([p for p in complete if _is_reshardable(p)][-1:])
        if retention.keep_every:
            kept |= {p for p in complete if step_of(p) % retention.keep_every == 0}
        for old in complete:
            if old not in kept:
                _remove(old)


def remove_newer(root: Path, step: int) -> None:
    """Make the newest checkpoint up to a step the newest of all; only the writer rank calls it.

    `latest` points there before anything is removed, so a kill leaves one that can be loaded.
    """
    complete = complete_checkpoints(root)
    kept = [path for path in complete if step_of(path) <= step]
    if kept:
        _point_latest_at(kept[-1])
    for path in complete[len(kept) :]:
        _remove(path)


def _point_latest_at(checkpoint: Path) -> None:
    root = checkpoint.parent
    pointer = root / f".{LATEST_FILE}.partial"
    write_durably(pointer, f"{checkpoint.name}\n".encode())
    pointer.replace(root / LATEST_FILE)
    sync_directory(root)


def _is_reshardable(checkpoint: Path) -> bool:
    try:
        return read_manifest(checkpoint).optimizer_format == "full"
    except CheckpointError:
        return False


def _remove(checkpoint: Path) -> None:
    """Hide it at once by a rename; what cannot be removed now is removed by the next `begin`."""
    aside = checkpoint.with_name(f".{checkpoint.name}.old.partial")
    checkpoint.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and fsync it."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
