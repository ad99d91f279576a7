"""Checkpoints by megatron dist_checkpointing, in directories that are complete or absent."""

from phi4.engine.checkpoint.directory import (
    CheckpointDirectory,
    checkpoint_name,
    complete_checkpoints,
    find_checkpoint,
    latest_checkpoint,
    read_checkpoint_file,
)
from phi4.engine.checkpoint.loading import VerifiedCheckpoint, load_checkpoint, verify_checkpoint
from phi4.engine.checkpoint.manifest import Manifest, check_recipe
from phi4.engine.checkpoint.saving import predicted_bytes, save_checkpoint
from phi4.engine.checkpoint.search import (
    checkpoints_newest_first,
    find_checkpoint_together,
)
from phi4.engine.checkpoint.state import (
    host_memory_bytes,
    optimizer_format,
    predicted_gather_bytes,
)

__all__ = [
    "CheckpointDirectory",
    "Manifest",
    "VerifiedCheckpoint",
    "check_recipe",
    "checkpoint_name",
    "checkpoints_newest_first",
    "complete_checkpoints",
    "find_checkpoint",
    "find_checkpoint_together",
    "host_memory_bytes",
    "latest_checkpoint",
    "load_checkpoint",
    "optimizer_format",
    "predicted_bytes",
    "predicted_gather_bytes",
    "read_checkpoint_file",
    "save_checkpoint",
    "verify_checkpoint",
]
