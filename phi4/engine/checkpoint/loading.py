"""Verify and load a checkpoint without executing any of its content.

A checkpoint may come from an untrusted source. Every rank reads the index and the common state
once, checks these bytes against the manifest, and uses the validated content; tensors and byte
records are read as values only. A failure is raised on all ranks, so that all can fall back to
another checkpoint.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.base import LoadCommonStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from phi4.engine.agreement import decided_by_writer, raise_together, wait_until_visible
from phi4.engine.checkpoint.metadata import METADATA_NAME, parse_metadata
from phi4.engine.checkpoint.state import chunk_key, degrees, set_random_state, sharded_state
from phi4.engine.checkpoint_io import VettedSource, load_values
from phi4.engine.engine import Engine
from phi4.engine.model.fp8.te_state import set_delayed_states
from phi4.errors import CheckpointError, LayoutError, Phi4Error
from phi4.rundir.checkpoints import step_of
from phi4.rundir.manifest import (
    MANIFEST_FILE,
    CheckpointManifest,
    content_names,
    manifest_hash,
    read_manifest,
    read_verified,
    verify_files,
)

_COMMON_NAME = "common.pt"
_FORMAT_NAME = "metadata.json"
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_VETTED_NAMES = (METADATA_NAME, _COMMON_NAME, _FORMAT_NAME)

Result = TypeVar("Result")


@dataclass(frozen=True)
class VerifiedCheckpoint:
    """A checkpoint whose files match its manifest, with its validated content."""

    manifest: CheckpointManifest
    metadata: Metadata
    """Index of the records."""
    common: bytes
    """Content of common.pt."""
    unlisted: tuple[str, ...]
    """Files that the manifest does not list; they are never read."""


@dataclass(frozen=True)
class _Survey:
    """Rank 0's view of a checkpoint."""

    manifest: CheckpointManifest
    manifest_sha256: str
    present: tuple[str, ...]


def verify_checkpoint(engine: Engine, checkpoint: Path) -> VerifiedCheckpoint:
    """Check every file against the manifest, divided among the ranks; all raise together.

    Raises:
        CheckpointError: incomplete, a file is missing, truncated or altered, or the index is not in
            this engine's format.
        PlatformError: a rank does not see rank 0's files in time.

    Collectives: one broadcast of the manifest and two all-gathers of verdicts, over all ranks.
    """
    platform = engine.platform
    survey = decided_by_writer(platform, lambda: _survey(checkpoint))
    manifest = survey.manifest
    share = sorted(manifest.files)[platform.rank :: platform.world_size]
    needed = {MANIFEST_FILE, *share, *_VETTED_NAMES} & {MANIFEST_FILE, *survey.present}
    wait_until_visible(platform, [checkpoint / name for name in sorted(needed)])
    problems, metadata, common = [], Metadata({}), b""
    try:
        if manifest_hash(checkpoint) != survey.manifest_sha256:
            problems.append(f"rank {platform.rank} reads a different {checkpoint / MANIFEST_FILE}")
        problems += verify_files(checkpoint, manifest, share)
        if not problems:
            metadata, common = _vetted(checkpoint, manifest)
    except CheckpointError as error:
        problems.append(str(error))
    except OSError as error:
        problems.append(f"rank {platform.rank} cannot read {checkpoint}: {error}")
    raise_together(platform, CheckpointError("; ".join(problems)) if problems else None)
    unlisted = set(survey.present) - set(manifest.files)
    return VerifiedCheckpoint(manifest, metadata, common, tuple(sorted(unlisted)))


def load_checkpoint(
    engine: Engine, checkpoint: Path, verified: VerifiedCheckpoint, *, optimizer: bool = True
) -> None:
    """Load a checkpoint of any layout into the engine.

    Every data rank reads its share and distributes it.

    Args:
        engine: engine of the same model; its layout may differ from the writer's.
        checkpoint: a `step_NNNNNNN` directory.
        verified: from `verify_checkpoint`.
        optimizer: also load the optimizer and the random states.

    Raises:
        LayoutError: the optimizer format does not fit the layout.
        CheckpointError: the checkpoint has no optimizer, or lacks records that the engine needs;
            the engine's weights are then undefined. Every rank raises it.

    Collectives: those of dist_checkpointing; broadcasts of what was read, over data and context
    ranks; two all-gathers of verdicts over all ranks.
    """
    manifest = verified.manifest
    with_optimizer = optimizer and engine.optimizer is not None
    if with_optimizer:
        _check_optimizer(engine, checkpoint, manifest)
    form = manifest.optimizer_format if with_optimizer else "none"
    same_grid = manifest.layout == degrees(engine)
    source = VettedSource(checkpoint, verified.metadata)

    def read() -> dict[str, Any]:
        return dist_checkpointing.load(
            sharded_state(engine, form, loading=True, random=same_grid and with_optimizer),
            str(checkpoint),
            sharded_strategy=FullyParallelLoadStrategyWrapper(
                _VettedShards(source), engine.layout.groups.dp_cp
            ),
            common_strategy=_VettedCommon(verified.common),
        )

    with engine.patches, torch.no_grad():
        state = _all_or_none(engine, checkpoint, read)
        _all_or_none(engine, checkpoint, lambda: _fill(engine, state, with_optimizer))


def _fill(engine: Engine, state: dict[str, Any], with_optimizer: bool) -> None:
    for index, chunk in enumerate(engine.bare_chunks):
        # Layers without extra state have no record of it, and expect None.
        empty = {key: None for key in chunk.state_dict() if key.endswith("_extra_state")}
        chunk.load_state_dict(empty | state[chunk_key(engine, index)], strict=True)
    if with_optimizer:
        assert engine.optimizer is not None, "an engine that trains has one"
        engine.optimizer.load_state_dict(state["optimizer"])
        set_delayed_states(engine.bare_chunks, state.get("fp8", {}))
    elif engine.optimizer is not None:
        engine.optimizer.reload_model_params()
    if "random" in state:
        set_random_state(engine, state["random"])


def _all_or_none(engine: Engine, checkpoint: Path, act: Callable[[], Result]) -> Result:
    """Return the result of `act`, or raise CheckpointError on every rank if it fails on one."""
    failure: CheckpointError | LayoutError | None = None
    try:
        result = act()
    except LayoutError as error:
        failure = error
    except (Exception, CheckpointException) as error:
        # torch, megatron-core and the optimizer raise arbitrary errors for unfit records; torch's
        # collective error is not an Exception.
        failure = CheckpointError(f"{checkpoint} cannot be loaded: {_reason(error)}")
    raise_together(engine.platform, failure)
    return result


def _reason(error: BaseException) -> str:
    failures = getattr(error, "failures", None)
    if failures:
        # torch's collective error holds the errors of the failing ranks.
        error = failures[min(failures)][0]
    if isinstance(error, Phi4Error):
        return str(error)
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _survey(checkpoint: Path) -> _Survey:
    manifest = read_manifest(checkpoint)
    if manifest.step != step_of(checkpoint):
        raise CheckpointError(
            f"{checkpoint} contains step {manifest.step}, which does not match its name"
        )
    return _Survey(manifest, manifest_hash(checkpoint), tuple(content_names(checkpoint)))


def _vetted(checkpoint: Path, manifest: CheckpointManifest) -> tuple[Metadata, bytes]:
    """Return the index and the content of common.pt."""
    index, common, form = (read_verified(checkpoint, manifest, name) for name in _VETTED_NAMES)
    try:
        if msgspec.json.decode(form) != _FORMAT:
            raise CheckpointError(
                f"{checkpoint / _FORMAT_NAME} specifies an unsupported format; use another "
                f"checkpoint"
            )
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{checkpoint / _FORMAT_NAME} is damaged: {error}; use another checkpoint"
        ) from None
    file_bytes = {name: entry.bytes for name, entry in manifest.files.items()}
    try:
        return parse_metadata(index, file_bytes), common
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from None


class _VettedShards(TorchDistLoadShardedStrategy):
    """Reads shards by the validated index."""

    def __init__(self, source: VettedSource) -> None:
        super().__init__()
        self._source = source

    def load(self, sharded_state_dict: dict, checkpoint_dir: str) -> dict:
        """See TorchDistLoadShardedStrategy."""
        return super().load(sharded_state_dict, self._source)


class _VettedCommon(LoadCommonStrategy):
    """The state shared by all ranks, from bytes that were verified."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def load_common(self, checkpoint_dir: str) -> dict:
        """See LoadCommonStrategy."""
        return load_values(io.BytesIO(self._content))

    def load_sharded_objects(self, sharded_objects_state_dict: dict, checkpoint_dir: str) -> dict:
        """Never called: the strategy for shards reads these."""
        raise NotImplementedError

    def check_backend_compatibility(self, loaded_version: str) -> None:
        """The format is checked by `verify_checkpoint`."""

    def check_version_compatibility(self, loaded_version: int) -> None:
        """The format is checked by `verify_checkpoint`."""


def _check_optimizer(engine: Engine, checkpoint: Path, manifest: CheckpointManifest) -> None:
    here, there = degrees(engine), manifest.layout
    if manifest.optimizer_format == "none":
        raise CheckpointError(f"{checkpoint} has weights only; it cannot resume a training run")
    key = "distributed_optimizer"
    if here[key] != there[key]:
        raise LayoutError(
            f"{checkpoint} was written with parallel.{key}={bool(there[key])}, but the recipe has "
            f"{bool(here[key])}; resume with parallel.{key}={str(bool(there[key])).lower()}"
        )
    if manifest.optimizer_format == "dp":
        moved = [
            key for key in ("tensor", "pipeline", "virtual_pipeline") if here[key] != there[key]
        ]
        if moved:
            raise LayoutError(
                f"{checkpoint} has optimizer format dp, which requires "
                f"{', '.join(f'{key}={there[key]}' for key in moved)}; resume with these values, "
                f"save once with checkpoint.optimizer_format=full, then change the layout"
            )
