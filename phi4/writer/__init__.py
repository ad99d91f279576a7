"""Checkpoint files, and the process per rank that writes them while training goes on.

The process is a new interpreter that imports torch and nothing of the engine, started once per run;
the training thread copies what is to be saved into memory that both map and hands over a plan.
megatron-core's own way, a fork per save, is not taken: a forked child of a process that runs CUDA,
NCCL and gloo threads may find any lock held for ever, keeps the sockets of a dead rank open, so
that its peers notice nothing, and makes the training thread pay a page fault for every page that it
changes while the child lives. Its persistent caller waits for the child without a limit.

No ranks and no collectives: whether all ranks have written is for `phi4.engine.checkpoint`.
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
