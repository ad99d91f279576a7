"""Attention over ranges of queries and keys."""

from phi4_kernels.attention.block_table import BlockTable
from phi4_kernels.attention.decoding import attention_decode, plan_decode
from phi4_kernels.attention.op import (
    Attention,
    Ranges,
    attention,
    attention_backward,
    attention_forward,
)

__all__ = [
    "Attention",
    "BlockTable",
    "Ranges",
    "attention",
    "attention_backward",
    "attention_decode",
    "attention_forward",
    "plan_decode",
]
