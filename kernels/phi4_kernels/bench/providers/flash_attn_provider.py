"""FlashAttention-2, whose backward adds by atomics, its Triton layer norm and fused activation."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from phi4_kernels.bench.providers import documents
from phi4_kernels.registry import Entry


def _rms_norm(entry: Entry) -> Callable[..., Any]:
    from flash_attn.ops.triton.layer_norm import rms_norm_fn

    return lambda x, weight, eps: rms_norm_fn(x, weight, None, eps=eps)


def _add_rms_norm(entry: Entry) -> Callable[..., Any]:
    from flash_attn.ops.triton.layer_norm import rms_norm_fn

    def run(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
        return rms_norm_fn(x, weight, None, residual=residual, eps=eps, prenorm=True)

    return run


def _swiglu(entry: Entry) -> Callable[..., Any]:
    from flash_attn.ops.activations import swiglu

    return lambda gate_up: swiglu(*gate_up.chunk(2, dim=-1))


def _attention(entry: Entry) -> Callable[..., Any]:
    from flash_attn import flash_attn_varlen_func

    return documents.varlen(flash_attn_varlen_func, deterministic=False)


FUNCTIONS = {
    "attention": _attention,
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "swiglu": _swiglu,
}
