"""Where checkpoints live: `checkpoints/step_0000123/`, written aside, renamed when complete.

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
    """Where a run keeps its checkpoints."""
    return Path(run_dir) / CHECKPOINTS_DIR


def checkpoint_name(step: int) -> str:
    """`step_0000123`."""
    return f"step_{step:07d}"


def step_of(directory: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(directory.name)
    if not match:
        raise CheckpointError(f"{directory} is not a checkpoint; its name is not step_NNNNNNN")
    return int(match.group(1))


def complete_checkpoints(root: Path) -> list[Path]:
    """Checkpoints with a manifest, oldest first."""
    if not root.is_dir():
        return []
    found = [p for p in root.iterdir() if _NAME.fullmatch(p.name) and (p / MANIFEST_FILE).is_file()]
    return sorted(found, key=step_of)


def latest_checkpoint(root: Path) -> Path | None:
    """What `latest` names, else the newest complete checkpoint, else None."""
    complete = complete_checkpoints(root)
    pointer = root / LATEST_FILE
    if pointer.is_file():
        named = root / pointer.read_text(encoding="utf-8", errors="replace").strip()
        if named in complete:
            return named
    return complete[-1] if complete else None


def find_checkpoint(place: Path) -> Path:
    """A checkpoint, or the newest one of a `checkpoints` directory or of a run directory.

    Raises:
        CheckpointError: there is none.
    """
    if _NAME.fullmatch(place.name):
        if not place.is_dir():
            raise CheckpointError(f"{place} does not exist")
        return place
    for root in (place, checkpoints_dir(place)):
        newest = latest_checkpoint(root)
        if newest is not None:
            return newest
    raise CheckpointError(
        f"no checkpoint in {place}; give RUN/checkpoints/step_NNNNNNN, RUN/checkpoints or RUN"
    )


def read_checkpoint_file(checkpoint: Path, name: str) -> str:
    """Text of a small file of a checkpoint.

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
        raise CheckpointError(f"{checkpoint / name} is damaged: {error}") from None


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay when a new one is complete.

    Attributes:
        keep: so many of the newest, and besides them the newest that any layout can load.
        keep_every: those of steps that this divides, for ever; 0 means none.
    """

    keep: int
    keep_every: int = 0


class CheckpointDirectory:
    """One checkpoint being written. Only the writer rank, or its writer process, calls the methods.

    Args:
        root: the run's `checkpoints` directory.
        step: optimizer steps done.
        tag: of this try. A writer that hangs in an earlier try of the same step and goes on later
            then finds its directory gone.
    """

    def __init__(self, root: Path, step: int, tag: str = "") -> None:
        self.root = root
        self.final = root / checkpoint_name(step)
        self.partial = root / f".{self.final.name}{tag and '.'}{tag}.partial"

    def begin(self) -> None:
        """An empty directory to write into; what killed saves left is removed.

        No other save of the run may be under way.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        for stale in self.root.glob(".step_*.partial"):
            shutil.rmtree(stale, ignore_errors=stale != self.partial)
        self.partial.mkdir()

    def discard(self) -> None:
        """Remove what was written; the checkpoints before it stay as they are."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def commit(self, files: Mapping[str, bytes], manifest: bytes) -> None:
        """Write the small files and the manifest, make all durable, rename, point `latest` at it.

        What else the manifest lists is on the disk already.
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
        """Whether this very checkpoint is complete and `latest` names it."""
        try:
            written = (self.final / MANIFEST_FILE).read_bytes()
            named = (self.root / LATEST_FILE).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return False
        return written == manifest and named.strip() == self.final.name

    def prune(self, retention: Retention) -> None:
        """Remove what the retention does not keep."""
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
    """Take it out of sight at once; what cannot be removed now is left to the next `begin`."""
    aside = checkpoint.with_name(f".{checkpoint.name}.old.partial")
    checkpoint.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
