"""Messages between a rank and its writer process."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from phi4.rundir import Lease
from phi4.rundir.checkpoints import CheckpointDirectory, Retention
from phi4.rundir.manifest import FileEntry
from phi4.rundir.replica import ReplicaId
from phi4.writer.shard_file import WrittenFile


@dataclass(frozen=True)
class StagedTensor:
    """A tensor in the shared memory, contiguous at `offset`."""

    offset: int
    num_bytes: int
    dtype: torch.dtype
    shape: torch.Size


@dataclass(frozen=True)
class ShardFile:
    """A file to write: see `write_shard_file`."""

    path: Path
    records: tuple[bytes | StagedTensor, ...]


@dataclass(frozen=True)
class WriteShards:
    """Write this rank's shards."""

    files: tuple[ShardFile, ...]


@dataclass(frozen=True)
class Commit:
    """Commit a checkpoint whose shards all ranks have written; rank 0's writer only.

    Attributes:
        directory: directory of the shards.
        files: content of the small files by name.
        manifest: manifest of all files, encoded.
        retention: which checkpoints are kept afterwards.
        lease: lease of the run; nothing is modified once it is lost. None outside a run.
    """

    directory: CheckpointDirectory
    files: Mapping[str, bytes]
    manifest: bytes
    retention: Retention
    lease: Lease | None


@dataclass(frozen=True)
class Replicate:
    """Copy this rank's files of a committed checkpoint; see `phi4.rundir.replica.replicate`."""

    checkpoint: Path
    place: Path
    of: ReplicaId
    files: Mapping[str, FileEntry]
    with_small_files: bool
    kept: ReplicaId | None


@dataclass(frozen=True)
class Written:
    """This rank's shards are durable."""

    files: tuple[WrittenFile, ...]


@dataclass(frozen=True)
class Committed:
    """The checkpoint is committed."""


@dataclass(frozen=True)
class Replicated:
    """This rank's files of the replica are durable."""


@dataclass(frozen=True)
class Failed:
    """The task failed.

    Attributes:
        reason: message for the user.
        errno: errno of the operating system, or None.
        path: path of the failed operation, or None.
    """

    reason: str
    errno: int | None = None
    path: str | None = None

    def as_error(self) -> OSError:
        """Return the error that this process would have raised."""
        if self.errno is None:
            return OSError(self.reason)
        return OSError(self.errno, self.reason, self.path)


Task = WriteShards | Commit | Replicate
Reply = Written | Committed | Replicated | Failed
