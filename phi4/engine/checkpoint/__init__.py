"""Checkpoints by megatron-core's dist_checkpointing, in directories that are complete or absent."""

from phi4.engine.checkpoint.host_views import newest_complete, views_of_replicas
from phi4.engine.checkpoint.loading import VerifiedCheckpoint, load_checkpoint, verify_checkpoint
from phi4.engine.checkpoint.open import open_checkpoint, recipe_of
from phi4.engine.checkpoint.pending import Durable, PendingSave
from phi4.engine.checkpoint.replica import Replicas
from phi4.engine.checkpoint.saving import SaveRequest, predicted_bytes, save_checkpoint
from phi4.engine.checkpoint.search import checkpoints_newest_first, find_checkpoint_together
from phi4.engine.checkpoint.state import (
    host_memory_bytes,
    optimizer_format,
    predicted_gather_bytes,
)

__all__ = [
    "Durable",
    "PendingSave",
    "Replicas",
    "SaveRequest",
    "VerifiedCheckpoint",
    "checkpoints_newest_first",
    "find_checkpoint_together",
    "host_memory_bytes",
    "load_checkpoint",
    "newest_complete",
    "open_checkpoint",
    "optimizer_format",
    "predicted_bytes",
    "predicted_gather_bytes",
    "recipe_of",
    "save_checkpoint",
    "verify_checkpoint",
    "views_of_replicas",
]
