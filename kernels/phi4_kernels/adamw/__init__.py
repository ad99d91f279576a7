"""AdamW over a flat shard: gradient scale, update and bf16 weight write in one pass."""

from phi4_kernels.adamw.op import Hyper, Shard, adamw

__all__ = ["Hyper", "Shard", "adamw"]
