"""The optimizer: AdamW with FusedAdam's interface under megatron-core's, and its parameter
groups."""
