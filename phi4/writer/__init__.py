"""Checkpoint files, and the process per rank that writes them while training continues.

The process is a new interpreter that imports torch but no engine code, started once per run; the
training thread copies the tensors to be saved into memory that both map, and sends a plan.
megatron-core's own way, a fork per save, is not used: a forked child of a process that runs CUDA,
NCCL and gloo threads may inherit locks that are never released, keeps the sockets of a dead rank
open, so that its peers do not notice, and causes a page fault in the training thread for every page
that it changes while the child lives. Its persistent caller waits for the child without a time
limit.

This package has no ranks and no collectives: `phi4.engine.checkpoint` determines whether all ranks
have written.
"""

from phi4.writer.client import WriterProcess
from phi4.writer.messages import (
    Commit,
    Committed,
    Failed,
    Replicate,
    Replicated,
    ShardFile,
    WriteShards,
    Written,
)
from phi4.writer.shard_file import WrittenFile, write_shard_file
from phi4.writer.staging import Staging

__all__ = [
    "Commit",
    "Committed",
    "Failed",
    "Replicate",
    "Replicated",
    "ShardFile",
    "Staging",
    "WriteShards",
    "WriterProcess",
    "Written",
    "WrittenFile",
    "write_shard_file",
]
