"""Checkpoints by megatron dist_checkpointing, in directories that are complete or absent."""

from phi4.engine.checkpoint.directory import (
    CheckpointDirectory,
    checkpoint_name,
    complete_checkpoints,
    find_checkpoint,
    latest_checkpoint,
    read_checkpoint_file,
)
from phi4.engine.checkpoint.manifest import Manifest
from phi4.engine.checkpoint.state import (
    host_memory_bytes,
    load_checkpoint,
    optimizer_format,
    predicted_gather_bytes,
    save_checkpoint,
    verify_checkpoint,
)

__all__ = [
    "CheckpointDirectory",
    "Manifest",
    "checkpoint_name",
    "complete_checkpoints",
    "find_checkpoint",
    "host_memory_bytes",
    "latest_checkpoint",
    "load_checkpoint",
    "optimizer_format",
    "predicted_gather_bytes",
    "read_checkpoint_file",
    "save_checkpoint",
    "verify_checkpoint",
]
