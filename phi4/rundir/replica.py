"""A second copy of a run's newest checkpoint, on each host's local disk.

REPLICA_DIR/<run>/step_0000100-<16 digits of the manifest's sha256>/ holds the files that the host's
ranks wrote, the small files and the manifest. The directory is named by its content, so that a
checkpoint of the same step after a rollback is another replica. A file gets its name only once it
is complete, durable, and has the hash in the manifest, so no completion marker is needed.
"""

import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from phi4.errors import CheckpointError
from phi4.rundir.checkpoints import checkpoint_name, sync_directory
from phi4.rundir.manifest import (
    CheckpointManifest,
    FileEntry,
    entry_of,
    manifest_hash,
    parse_manifest,
    read_manifest,
    read_verified,
)
from phi4.rundir.names import MANIFEST_FILE, STATE_FILE
from phi4.rundir.state import Numerics, RunState

SHARD_SUFFIX = ".distcp"
"""Suffix of a file that one rank wrote; all other files of a checkpoint are small."""

_NAME = re.compile(r"step_(\d{7,})-([0-9a-f]{16})")
_VISIBLE_SECONDS, _POLL_SECONDS = 40.0, 0.1
"""How long another host's rename may take to become visible over NFS or Lustre."""
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class ReplicaId:
    """Identifies the checkpoint that a replica is a copy of."""

    step: int
    manifest_sha256: str

    @property
    def name(self) -> str:
        """Of its directory."""
        return f"{checkpoint_name(self.step)}-{self.manifest_sha256[:16]}"


@dataclass(frozen=True)
class Held:
    """The part of a replica that one host holds.

    Attributes:
        of: the checkpoint that it is a copy of.
        present: files that are present with the right size.
        num_files: number of files of the checkpoint over all hosts.
        state: state of the checkpoint, without its data and its numerics; None if missing.
    """

    of: ReplicaId
    present: tuple[str, ...]
    num_files: int
    state: RunState | None


def replica_place(replica_dir: str, run_dir: str) -> Path:
    """Return the directory of a run's replicas: named by the run and a hash of its path."""
    where = Path(run_dir).resolve()
    digest = hashlib.sha256(str(where).encode()).hexdigest()
    return Path(replica_dir) / f"{where.name}-{digest[:12]}"


def replicate(
    checkpoint: Path,
    place: Path,
    of: ReplicaId,
    files: Mapping[str, FileEntry],
    *,
    with_small_files: bool,
    kept: ReplicaId | None,
    visible_seconds: float = _VISIBLE_SECONDS,
) -> None:
    """Copy one rank's files of a checkpoint, and wait until they are durable.

    Args:
        checkpoint: a complete one.
        place: from `replica_place`; its parent must exist, because a missing one may be a disk that
            is not mounted.
        of: identifies the checkpoint.
        files: names of the files that the rank wrote.
        with_small_files: also copy the small files, and remove replicas that are not kept; for one
            rank of every host.
        kept: another replica to keep.
        visible_seconds: how long the checkpoint may take to become visible.

    Raises:
        OSError: names the file.
        CheckpointError: the checkpoint does not match `of`, or is damaged.
    """
    place.mkdir(exist_ok=True)
    target = place / of.name
    if with_small_files:
        prune_replicas(place, {of} if kept is None else {of, kept})
    target.mkdir(exist_ok=True)
    deadline = time.monotonic() + visible_seconds
    for name, entry in files.items():
        _wait_for(checkpoint / name, deadline)
        copy_verified(checkpoint / name, target / name, entry)
    if with_small_files:
        _wait_for(checkpoint / MANIFEST_FILE, deadline)
        content = (checkpoint / MANIFEST_FILE).read_bytes()
        if entry_of(content).sha256 != of.manifest_sha256:
            raise CheckpointError(f"{checkpoint} is not the checkpoint that was just saved")
        manifest = parse_manifest(content, checkpoint / MANIFEST_FILE)
        for name, entry in small_files(manifest).items():
            copy_verified(checkpoint / name, target / name, entry)
        copy_verified(checkpoint / MANIFEST_FILE, target / MANIFEST_FILE, entry_of(content))
    sync_directory(target)
    sync_directory(place)


def small_files(manifest: CheckpointManifest) -> dict[str, FileEntry]:
    """Return the files of a checkpoint other than the ranks' shards."""
    return {n: entry for n, entry in manifest.files.items() if not n.endswith(SHARD_SUFFIX)}


def copy_verified(source: Path, target: Path, expected: FileEntry) -> None:
    """Copy a file to a temporary name, verify it, make it durable, and rename it.

    Raises:
        OSError: names the file.
        CheckpointError: the source differs from the expected hash.
    """
    # Hosts may share the directory, and so write the same small files.
    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    digest, num_bytes = hashlib.sha256(), 0
    try:
        with source.open("rb") as reader, aside.open("xb", buffering=0) as writer:
            while block := reader.read(_BLOCK_BYTES):
                digest.update(block)
                num_bytes += len(block)
                _write_all(writer.fileno(), block)
            os.fsync(writer.fileno())
        if FileEntry(num_bytes, digest.hexdigest()) != expected:
            raise CheckpointError(f"{source} has another size or sha256 than its manifest lists")
        aside.replace(target)
    except OSError as error:
        aside.unlink(missing_ok=True)
        # Errors of a write do not name the file.
        raise OSError(error.errno, error.strerror, error.filename or str(target)) from None
    except CheckpointError:
        aside.unlink(missing_ok=True)
        raise


def held_replicas(place: Path) -> list[Held]:
    """Return what this host holds of a run's checkpoints, oldest step first; skips those without a
    manifest.

    Raises:
        OSError: the directory cannot be read.
    """
    if not place.is_dir():
        return []
    found = [_held(path) for path in place.iterdir() if _NAME.fullmatch(path.name)]
    return sorted((held for held in found if held is not None), key=lambda held: held.of.step)


def prune_replicas(place: Path, kept: Iterable[ReplicaId]) -> None:
    """Remove all other replicas; what cannot be removed is left for the next time."""
    names = {replica.name for replica in kept}
    for path in place.iterdir():
        if _NAME.fullmatch(path.name) and path.name not in names:
            shutil.rmtree(path, ignore_errors=True)


def _held(path: Path) -> Held | None:
    try:
        manifest, digest = read_manifest(path), manifest_hash(path)
    except CheckpointError:
        return None
    of = ReplicaId(manifest.step, digest)
    if of.name != path.name:
        return None
    present = tuple(n for n, entry in manifest.files.items() if _has(path / n, entry.bytes))
    return Held(of, present, len(manifest.files), _state(path, manifest))


def _has(path: Path, num_bytes: int) -> bool:
    try:
        return path.stat().st_size == num_bytes
    except OSError:
        return False


def _state(path: Path, manifest: CheckpointManifest) -> RunState | None:
    try:
        state = RunState.from_json(read_verified(path, manifest, STATE_FILE).decode())
    except (CheckpointError, OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return msgspec.structs.replace(state, data=None, numerics=Numerics())


def _wait_for(path: Path, deadline: float) -> None:
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _write_all(descriptor: int, block: bytes) -> None:
    rest = memoryview(block)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
