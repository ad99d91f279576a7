"""Saving: a checkpoint is complete or absent, and a disk that is full does not end the run.

Whether a save can begin, and whether it succeeded, is one answer for all ranks: each of them leaves
every collective, then what any of them could not write is raised by all.
"""

import errno
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint import CheckpointException

from phi4.config import identity_hash
from phi4.engine.agreement import decided_by_writer, raise_together, wait_until_visible
from phi4.engine.checkpoint.state import degrees, sharded_state
from phi4.engine.engine import Engine
from phi4.engine.optimizer.build import gather_parameters
from phi4.errors import DiskFullError, Phi4Error, PlatformError
from phi4.rundir.checkpoints import CheckpointDirectory, write_durably
from phi4.rundir.manifest import (
    CheckpointManifest,
    FileEntry,
    OptimizerFormat,
    content_names,
    hash_files,
    identity_keys_hash,
)

_RECORD_BYTES = 2560
"""Header of a tensor in a shard, and its entries in `.metadata`."""
_FIXED_BYTES = 1 << 16
"""common.pt, metadata.json, manifest and rounding to blocks."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def predicted_bytes(engine: Engine, form: OptimizerFormat, files: Mapping[str, str]) -> int:
    """Bytes that a save takes on disk, a few percent too many; the same on every rank.

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
) -> Path:
    """Write `root/step_NNNNNNN` complete or not at all.

    Args:
        engine: what is saved; form `none` saves weights only.
        root: the run's checkpoints directory, seen by all ranks.
        step: optimizer steps done.
        form: optimizer format.
        keep: complete checkpoints to keep, besides the newest `full` one.
        files: small text files (recipe, history, data position) by name.
        data: manifest hash of every data source.

    Raises:
        DiskFullError: too little space or quota. Every rank raises it, what was written is removed,
            and the checkpoints before it stay as they are.
        PlatformError: the file system fails otherwise; the same holds.

    Collectives: those of dist_checkpointing; one gather of file hashes; broadcasts and all-gathers
    of verdicts, over all ranks.
    """
    save = _Save(engine, CheckpointDirectory(root, step), predicted_bytes(engine, form, files))
    save.by_writer(save.begin)
    try:
        save.write_state(form)
        save.by_writer(lambda: save.write_texts(files))
        manifest = CheckpointManifest(
            step=step,
            optimizer_format=form,
            layout=degrees(engine),
            recipe_sha256=identity_hash(engine.recipe),
            identity_keys_sha256=identity_keys_hash(),
            data=dict(data),
            files=save.hash_together(),
        )
        content = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
        save.by_writer(lambda: save.directory.commit(content))
    except (DiskFullError, PlatformError):
        save.by_writer(save.directory.discard)
        raise
    save.by_writer(lambda: save.directory.prune(keep))
    return save.directory.final


class _Save:
    """One save on one rank; its methods are collective."""

    def __init__(self, engine: Engine, directory: CheckpointDirectory, required_bytes: int) -> None:
        self.engine = engine
        self.platform = engine.platform
        self.directory = directory
        self.required_bytes = required_bytes

    def by_writer(self, act: Callable[[], None]) -> None:
        """Do something on the writer rank; what fails there is raised by every rank."""

        def decide() -> None:
            try:
                act()
            except OSError as error:
                raise self._failure(error) from error

        decided_by_writer(self.platform, decide)

    def begin(self) -> None:
        """On the writer: an empty directory, if the disk has space for what is to be written."""
        self.directory.begin()
        free_bytes = _free_bytes(self.directory.root)
        if free_bytes is not None and free_bytes < self.required_bytes:
            self.directory.discard()
            raise self._failure(OSError(errno.ENOSPC, "too little space to begin"))

    def write_state(self, form: OptimizerFormat) -> None:
        """Every rank writes its shards."""
        patches, caught = self.engine.patches, None
        patches.write_errors.clear()
        with patches:
            gather_parameters(self.engine.chunks)
            state = sharded_state(self.engine, form, loading=False)
            try:
                dist_checkpointing.save(
                    state, str(self.directory.partial), content_metadata={"phi4": 1}
                )
            except CheckpointException as error:
                # All ranks raise it once one of them could not write; that one knows the reason.
                caught = error
        first = patches.write_errors[0] if patches.write_errors else None
        raise_together(self.platform, None if first is None else self._failure(first))
        if caught is not None:
            raise caught

    def write_texts(self, files: Mapping[str, str]) -> None:
        """On the writer: the small files."""
        for name, text in files.items():
            write_durably(self.directory.partial / name, text.encode())

    def hash_together(self) -> dict[str, FileEntry]:
        """Size and hash of all files; every rank hashes a share of what rank 0 lists."""
        rank, size, partial = self.platform.rank, self.platform.world_size, self.directory.partial
        names = decided_by_writer(self.platform, lambda: content_names(partial))[rank::size]
        wait_until_visible(self.platform, [partial / name for name in names])
        mine, error = {}, None
        try:
            mine = hash_files(partial, names)
        except OSError as caught:
            error = self._failure(caught)
        raise_together(self.platform, error)
        shares: list[dict[str, FileEntry]] | None = [{}] * size if rank == 0 else None
        dist.gather_object(mine, shares, dst=0)
        merged = {name: entry for share in shares or () for name, entry in share.items()}
        return dict(sorted(merged.items()))

    def _failure(self, error: Exception) -> Phi4Error:
        free_bytes = _free_bytes(self.directory.root)
        free = "an unknown number" if free_bytes is None else f"{free_bytes:,}"
        reason = " ".join(str(error).split())[:200]
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
    """Space for this user's files, or None where the file system does not say."""
    try:
        usage = shutil.disk_usage(root)
    except OSError:
        return None
    return usage.free if usage.total else None
