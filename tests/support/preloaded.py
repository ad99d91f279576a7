"""What the server process of the ranks imports before it forks them; see tests.support.ranks."""

import gc

import hypothesis
import megatron.core.dist_checkpointing
import megatron.core.models.gpt
import pytest
import torch.distributed

import phi4.cli.train
import phi4.engine.engine
import phi4.stages.pretrain
import phi4.train.run

__all__ = ["hypothesis", "megatron", "phi4", "pytest", "torch"]

# Else every collection in a rank walks, and so copies, the pages it shares with the server: 0.3 s.
gc.collect()
gc.freeze()
