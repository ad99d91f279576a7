"""Replacements for megatron-core's checkpoint writer, installed by `patches.py`.

megatron-core plans a save and synchronises its ranks; the data is written here. Shards go to a
`ShardSink`, which writes them at once or passes them to the writer process. The three small files
that rank 0 writes are kept in memory, to be written with the manifest. The planning and the
collectives of a save thus never access the disk, and an error of one rank never leaves the others
waiting.
"""

import io
import json
import pickle
import queue
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import (
    FileSystemWriterAsync,
    _split_by_size_and_type,
)
from torch.distributed.checkpoint.filesystem import (
    CURRENT_DCP_VERSION,
    DEFAULT_SUFFIX,
    _StorageInfo,
)
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from phi4.errors import Phi4Error
from phi4.writer import (
    Failed,
    ShardFile,
    Staging,
    WriterProcess,
    WriteShards,
    Written,
    WrittenFile,
    write_shard_file,
)

METADATA_NAME = ".metadata"

Bucket = tuple[str, str, tuple[list[tuple[WriteItem, io.BytesIO]], list[tuple[WriteItem, Any]]]]
"""megatron-core's form of a file: path, name, (items with bytes, items with tensors)."""


class ShardSink(Protocol):
    """Destination of this rank's shards.

    Attributes:
        files: the files written.
    """

    files: tuple[WrittenFile, ...]

    def stage(self, buckets: list[Bucket]) -> Any:
        """Take a snapshot of the current content."""

    def write(self, staged: Any, results: queue.SimpleQueue) -> None:
        """Write what was staged, or begin to; `results` gets the locations of the records once they
        are durable, or the error. Never raises."""


class Capture:
    """The captured output of a save; the attributes are those of the newest one.

    Attributes:
        sink: destination of shards.
        small_files: content by name, on rank 0.
    """

    def __init__(self) -> None:
        self.begin(InProcess())

    def begin(self, sink: ShardSink) -> None:
        """Begin a save."""
        self.sink = sink
        self.small_files: dict[str, bytes] = {}

    def prepare_write_data(
        self, writer: FileSystemWriterAsync, plan: SavePlan, planner: SavePlanner
    ) -> None:
        """Replaces FileSystemWriterAsync.prepare_write_data, which clones views."""
        writer.write_buckets = []
        for items in _split_by_size_and_type(writer.thread_count, plan.items):
            resolved = [(item, planner.resolve_data(item)) for item in items]
            if resolved:
                index = len(writer.write_buckets)
                name = f"{plan.storage_data.prefix}{index}{DEFAULT_SUFFIX}"
                objects = [pair for pair in resolved if pair[0].type == WriteItemType.BYTE_IO]
                tensors = [pair for pair in resolved if pair[0].type != WriteItemType.BYTE_IO]
                path = str(Path(writer.checkpoint_dir) / name)
                writer.write_buckets.append((path, name, (objects, tensors)))
        writer.results_queue = queue.SimpleQueue() if writer.write_buckets else None

    def preload_tensors(self, buckets: list[Bucket], non_blocking: bool = True) -> Any:
        """Replaces FileSystemWriterAsync.preload_tensors."""
        return self.sink.stage(buckets)

    def write_preloaded(
        self, transforms: list, use_msc: bool, rank: int, staged: Any, results: queue.SimpleQueue
    ) -> None:
        """Replaces FileSystemWriterAsync.write_preloaded_data_multiproc."""
        self.sink.write(staged, results)

    def finish(self, writer: FileSystemWriterAsync, metadata: Metadata, results: list) -> None:
        """Replaces FileSystemWriter.finish: the index of all records, as torch writes it."""
        metadata.version = CURRENT_DCP_VERSION
        metadata.storage_data = {r.index: r.storage_data for of_rank in results for r in of_rank}
        metadata.storage_meta = writer.storage_meta()
        self.small_files[METADATA_NAME] = pickle.dumps(metadata)

    def save_common(self, strategy: object, state: dict, checkpoint_dir: str) -> None:
        """Replaces TorchCommonSaveStrategy.save_common."""
        if dist.get_rank() == 0:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            self.small_files[COMMON_STATE_FNAME] = buffer.getvalue()

    def save_config(self, config: CheckpointingConfig, checkpoint_dir: str) -> None:
        """Replaces serialization.save_config."""
        self.small_files[CONFIG_FNAME] = json.dumps(asdict(config)).encode()


class InProcess:
    """Writes shards at once, in this process.

    Attributes:
        files: the files written.
        error: the error, if writing failed.
    """

    def __init__(self) -> None:
        self.files: tuple[WrittenFile, ...] = ()
        self.error: Exception | None = None

    def stage(self, buckets: list[Bucket]) -> list[Bucket]:
        """Do nothing: the content cannot change before it is written."""
        return buckets

    def write(self, staged: list[Bucket], results: queue.SimpleQueue) -> None:
        """See ShardSink."""
        try:
            self.files = tuple(
                write_shard_file(Path(path), _on_host(objects, tensors))
                for path, _, (objects, tensors) in staged
            )
            results.put(_write_results(staged, self.files))
        except (OSError, RuntimeError) as error:
            self.error = error
            results.put(error)


class ToWriterProcess:
    """Stages shards in shared memory and has the writer process write them.

    Args:
        writer: writer process of this rank.

    Attributes:
        files: the files written.
        error: the error, if staging or writing failed.
    """

    def __init__(self, writer: WriterProcess) -> None:
        self.files: tuple[WrittenFile, ...] = ()
        self.error: Exception | None = None
        self._writer = writer
        self._buckets: list[Bucket] = []
        self._results: queue.SimpleQueue | None = None

    def stage(self, buckets: list[Bucket]) -> WriteShards | None:
        """Copy all tensors; return None if there is too little memory."""
        # Kept for their names and order; the tensors in them belong to training.
        self._buckets = buckets
        try:
            return staged_task(self._writer.staging, buckets)
        except (Phi4Error, OSError) as error:
            self.error = error
        return None

    def write(self, staged: WriteShards | None, results: queue.SimpleQueue) -> None:
        """See ShardSink."""
        self._results = results
        try:
            if staged is not None:
                self._writer.submit(staged)
        except OSError as error:
            self.error = error

    def is_written(self) -> bool:
        """Return whether the writer process is done, successfully or not; polls once."""
        if self._results is None or self.error is not None or self.files:
            return True
        reply = self._writer.reply()
        if isinstance(reply, Written):
            self.files = reply.files
            self._results.put(_write_results(self._buckets, self.files))
            self._buckets = []
        elif isinstance(reply, Failed):
            self.error = reply.as_error()
        return reply is not None


def staged_task(staging: Staging, buckets: Sequence[Bucket]) -> WriteShards:
    """Return the files of a save, with their tensors copied into shared memory.

    Raises:
        PlatformError: the machine has too little memory.
    """
    tensors = [tensor for bucket in buckets for _, tensor in bucket[2][1]]
    staged = iter(staging.stage(tensors))
    return WriteShards(
        tuple(
            ShardFile(
                Path(path),
                (*(data.getvalue() for _, data in objects), *(next(staged) for _ in held)),
            )
            for path, _, (objects, held) in buckets
        )
    )


def _on_host(objects: list, tensors: list) -> Iterator[bytes | torch.Tensor]:
    """Return the content of the records in host memory, one after the other."""
    yield from (data.getvalue() for _, data in objects)
    yield from (tensor.detach().cpu() for _, tensor in tensors)


def _items(bucket: Bucket) -> list[tuple[WriteItem, Any]]:
    objects, tensors = bucket[2]
    return [*objects, *tensors]


def _write_results(
    buckets: Sequence[Bucket], files: Sequence[WrittenFile]
) -> dict[int, list[WriteResult]]:
    return {
        index: [
            WriteResult(item.index, length, _StorageInfo(file.name, offset, length))
            for (item, _), (offset, length) in zip(_items(bucket), file.places, strict=True)
        ]
        for index, (bucket, file) in enumerate(zip(buckets, files, strict=True))
    }
