"""The optimizer: AdamW with FusedAdam's contract under megatron-core's, and its groups."""
