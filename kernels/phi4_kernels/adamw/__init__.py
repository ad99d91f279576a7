"""AdamW over flat shards: gradient scale, update and weight write in one pass."""

from phi4_kernels.adamw.arguments import FP8Weight, Hyper, ParameterShard
from phi4_kernels.adamw.op import adamw
from phi4_kernels.adamw.optimizer import FusedAdam

__all__ = ["FP8Weight", "FusedAdam", "Hyper", "ParameterShard", "adamw"]
