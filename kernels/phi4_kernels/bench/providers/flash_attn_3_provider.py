"""FlashAttention-3, whose backward adds by atomics."""

from collections.abc import Callable
from typing import Any

from phi4_kernels.bench.providers import documents
from phi4_kernels.registry import Entry


def _attention(entry: Entry) -> Callable[..., Any]:
    from flash_attn_interface import flash_attn_varlen_func

    return documents.varlen(flash_attn_varlen_func, deterministic=False)


FUNCTIONS = {"attention": _attention}
