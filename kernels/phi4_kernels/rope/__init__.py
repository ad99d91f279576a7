"""Rotary position embedding on packed QKV, in place."""

from phi4_kernels.rope.op import QKVLayout, rope_qkv, rope_tables

__all__ = ["QKVLayout", "rope_qkv", "rope_tables"]
