"""Save a checkpoint, complete or not at all; a full disk does not end the run.

Every data rank writes its share of the shards, in synchronous saves and in asynchronous ones
(`pending.py`); both use the steps of `Save`. Whether a save can begin, and whether it succeeded, is
decided for all ranks together: each rank completes every collective, then all raise the errors of
any of them. No plan is reused from one save to the next: one made for another state would omit
records.
"""

import errno
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint import CheckpointException

from phi4.config import identity_hash
from phi4.engine.agreement import decided_by_writer, raise_together
from phi4.engine.checkpoint.state import degrees, sharded_state
from phi4.engine.checkpoint_capture import InProcess, ToWriterProcess
from phi4.engine.engine import Engine
from phi4.engine.model.fp8.te_state import delayed_states
from phi4.engine.optimizer.build import gather_parameters
from phi4.engine.without_cuda import without_rewriting
from phi4.errors import DiskFullError, Phi4Error, PlatformError
from phi4.rundir.checkpoints import CheckpointDirectory, Retention
from phi4.rundir.manifest import (
    CheckpointManifest,
    FileEntry,
    OptimizerFormat,
    entry_of,
    identity_keys_hash,
)

_RECORD_BYTES = 2560
"""Size of a tensor's header in a shard, and of its entries in `.metadata`."""
_FIXED_BYTES = 1 << 16
"""Size of common.pt, metadata.json, manifest and rounding to blocks."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Answer = TypeVar("Answer")


def predicted_bytes(engine: Engine, form: OptimizerFormat, files: Mapping[str, str]) -> int:
    """Estimate the bytes of a save on disk, a few percent too high; the same on every rank.

    Collectives: one all-reduce of a number over all ranks.
    """
    parallel, layout = engine.recipe.parallel, engine.layout
    num_bytes = 0
    if layout.dp_rank == 0 and layout.cp_rank == 0:
        masters = parallel.distributed_optimizer or engine.recipe.precision.dtype != "fp32"
        num_states = 0 if form == "none" else 3 if masters else 2
        for chunk in engine.bare_chunks:
            for parameter in chunk.parameters():
                per_element = parameter.element_size() + 4 * num_states
                num_bytes += parameter.numel() * per_element + _RECORD_BYTES * (1 + num_states)
    if form != "none":
        num_bytes += torch.get_rng_state().numel() * 4 + _RECORD_BYTES
        if (layout.tp_rank, layout.cp_rank, layout.dp_rank) == (0, 0, 0):
            scalings = delayed_states(engine.bare_chunks).values()
            num_bytes += sum(one.numel() * 4 + _RECORD_BYTES for one in scalings)
    total = torch.tensor(num_bytes, device=engine.platform.device)
    dist.all_reduce(total)
    return int(total) + sum(len(text.encode()) for text in files.values()) + _FIXED_BYTES


def save_checkpoint(
    engine: Engine,
    root: Path,
    step: int,
    *,
    form: OptimizerFormat,
    keep: int,
    files: Mapping[str, str],
    data: Mapping[str, str],
    keep_every: int = 0,
) -> Path:
    """Write `root/step_NNNNNNN` completely or not at all, and wait for it.

    Args:
        engine: engine to save; form `none` saves weights only.
        root: the run's checkpoints directory, seen by all ranks.
        step: optimizer steps done.
        form: optimizer format.
        keep: complete checkpoints to keep, besides the newest `full` one.
        files: small text files (recipe, history, data position) by name.
        data: manifest hash of every data source.
        keep_every: checkpoints whose step is a multiple of this are kept for ever; 0 means none.

    Raises:
        DiskFullError: too little space or quota. Every rank raises it, written files are removed,
            and earlier checkpoints are unaffected.
        PlatformError: the file system fails otherwise; the same holds.

    Collectives: those of dist_checkpointing; one gather of file hashes; broadcasts and all-gathers
    of verdicts, over all ranks.
    """
    retention = Retention(keep, keep_every)
    save = Save(engine, SaveRequest(root, step, form, retention, files, data))
    try:
        save.write()
        manifest = save.manifest(save.sink)
        save.by_writer(lambda: save.directory.commit(save.small_files(), manifest))
    except (DiskFullError, PlatformError):
        save.by_writer(save.directory.discard)
        raise
    save.by_writer(lambda: save.directory.prune(retention))
    return save.directory.final


@dataclass(frozen=True)
class SaveRequest:
    """Content and location of a save; see `save_checkpoint`."""

    root: Path
    step: int
    form: OptimizerFormat
    retention: Retention
    files: Mapping[str, str]
    data: Mapping[str, str]


class Save:
    """A save in progress on one rank; its methods are collective.

    Attributes:
        directory: the checkpoint's directory.
        sink: the files that `write` has written.

    Raises:
        DiskFullError, PlatformError: it cannot begin; as `save_checkpoint`.
    """

    def __init__(self, engine: Engine, request: SaveRequest) -> None:
        self.engine, self.request, self.platform = engine, request, engine.platform
        self.required_bytes = predicted_bytes(engine, request.form, request.files)
        self.sink = InProcess()
        self.directory = CheckpointDirectory(request.root, request.step)
        self.directory = self.by_writer(self._begun)

    def by_writer(self, act: Callable[[], Answer]) -> Answer:
        """Run a function on the writer rank; its error is raised on every rank."""

        def decide() -> Answer:
            try:
                return act()
            except OSError as error:
                raise self.failure(error) from error

        return decided_by_writer(self.platform, decide)

    def write(self) -> None:
        """Write this rank's shards, and wait for the others."""
        caught = None
        self.engine.patches.capture.begin(self.sink)
        try:
            self._planned(waits=True)
        except CheckpointException as error:
            # All ranks raise an error if one of them could not write; only that one knows the
            # reason.
            caught = error
        own = self.sink.error
        raise_together(self.platform, None if own is None else self.failure(own))
        if caught is not None:
            raise caught

    def stage(self, sink: ToWriterProcess) -> AsyncRequest:
        """Stage this rank's shards and start its writer process.

        If memory or the process is not available, the sink records the error.
        """
        self.engine.patches.capture.begin(sink)
        with self.engine.patches:
            request = self._planned(waits=False)
            assert request is not None, "megatron-core plans what it does not wait for"
            with without_rewriting():
                if request.async_fn is not None:
                    rank, _, results = request.async_fn_args
                    request.async_fn(rank, request.preload_fn(), results)
        return request

    def manifest(self, sink: InProcess | ToWriterProcess) -> bytes:
        """Return the encoded manifest of all ranks' files on rank 0; elsewhere empty."""
        mine = {file.name: FileEntry(file.num_bytes, file.sha256) for file in sink.files}
        is_writer, size = self.platform.is_writer, self.platform.world_size
        shares: list[dict[str, FileEntry]] = [{}] * size if is_writer else []
        dist.gather_object(mine, shares if is_writer else None, dst=0)
        if not is_writer:
            return b""
        entries = {name: entry for share in shares for name, entry in share.items()}
        entries |= {name: entry_of(content) for name, content in self.small_files().items()}
        request, recipe = self.request, self.engine.recipe
        manifest = CheckpointManifest(
            step=request.step,
            optimizer_format=request.form,
            layout=degrees(self.engine),
            recipe_sha256=identity_hash(recipe),
            identity_keys_sha256=identity_keys_hash(),
            data=dict(request.data),
            files=dict(sorted(entries.items())),
        )
        return msgspec.json.format(msgspec.json.encode(manifest), indent=1)

    def small_files(self) -> dict[str, bytes]:
        """Return the files other than shards and manifest that rank 0 writes, by name."""
        texts = {name: text.encode() for name, text in self.request.files.items()}
        return self.engine.patches.capture.small_files | texts

    def failure(self, error: Exception) -> Phi4Error:
        """Return this rank's error, for a user."""
        if isinstance(error, Phi4Error):
            return error
        free_bytes = _free_bytes(self.directory.root)
        free = "an unknown number" if free_bytes is None else f"{free_bytes:,}"
        reason = " ".join(str(error).split())[:300]
        what = (
            f"checkpoint {self.directory.final} needs {self.required_bytes:,} bytes, the file "
            f"system has {free} free, and rank {self.platform.rank} met: {reason}"
        )
        if _is_full(error):
            return DiskFullError(
                f"{what}; free space, raise the quota, or lower checkpoint.keep; earlier "
                "checkpoints are intact"
            )
        return PlatformError(f"{what}; check the file system; earlier checkpoints are intact")

    def _begun(self) -> CheckpointDirectory:
        """Return, on the writer, an empty directory, if the disk has enough space."""
        request = self.request
        directory = CheckpointDirectory(request.root, request.step, tag=secrets.token_hex(4))
        directory.begin()
        free_bytes = _free_bytes(directory.root)
        if free_bytes is not None and free_bytes < self.required_bytes:
            directory.discard()
            raise self.failure(OSError(errno.ENOSPC, "too little space to begin"))
        return directory

    def _planned(self, *, waits: bool) -> AsyncRequest | None:
        """Let megatron-core plan the save, and execute it if it is synchronous."""
        strategy = FullyParallelSaveStrategyWrapper(
            TorchDistSaveShardedStrategy("torch_dist", 1), self.engine.layout.groups.dp_cp
        )
        with self.engine.patches:
            gather_parameters(self.engine.chunks, self.engine.optimizer)
            state = sharded_state(self.engine, self.request.form, loading=False)
            # Plans consist of sizes and names: no device is used.
            with without_rewriting():
                return dist_checkpointing.save(
                    state,
                    str(self.directory.partial),
                    strategy,
                    # The strategy writes it, from the files of each rank.
                    validate_access_integrity=False,
                    async_sharded_save=not waits,
                    content_metadata={"phi4": 1},
                )


def _is_full(error: BaseException | None) -> bool:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        # torch's zip writer answers a short write with "unexpected pos", and drops its reason.
        if getattr(error, "errno", None) in _FULL or "unexpected pos" in str(error):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _free_bytes(root: Path) -> int | None:
    """Return the free space for this user's files, or None if the file system does not report
    it."""
    try:
        usage = shutil.disk_usage(root)
    except OSError:
        return None
    return usage.free if usage.total else None
