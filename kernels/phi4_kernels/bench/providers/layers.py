"""Norms, SwiGLU and RoPE by Liger-Kernel, Transformer Engine and FlashAttention."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def liger_rms_norm() -> Callable[..., Tensor]:
    """Liger-Kernel's Triton kernel."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    def run(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # Llama's casting: the product with the weight in the dtype of x. Not in place, as ours is
        # not.
        return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)

    return run


def liger_add_rms_norm() -> Callable[..., tuple[Tensor, ...]]:
    """Liger-Kernel's Triton kernel."""
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    def run(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
        return LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, 0.0, "llama", False)

    return run


def liger_swiglu() -> Callable[..., Tensor]:
    """Liger-Kernel's Triton kernel."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return lambda gate_up: LigerSiLUMulFunction.apply(*gate_up.chunk(2, dim=-1))


def liger_rope_qkv() -> Callable[..., tuple[Tensor, ...]]:
    """Liger-Kernel's Triton kernel."""
    from liger_kernel.ops.rope import LigerRopeFunction

    def run(
        qkv: Tensor, layout: Any, cos: Tensor, sin: Tensor, position_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        q, k, v = layout.split(qkv)
        at = slice(len(qkv)) if position_ids is None else position_ids
        # Liger takes tables of full rotary width, gathered by position.
        tables = (torch.cat((table[at], table[at]), dim=-1)[None] for table in (cos, sin))
        heads = (part.flatten(1, -2)[None].transpose(1, 2) for part in (q, k))
        q_out, k_out = LigerRopeFunction.apply(*heads, *tables)
        return q_out.transpose(1, 2)[0].view(q.shape), k_out.transpose(1, 2)[0], v

    return run


def te_rms_norm() -> Callable[..., Tensor]:
    """Transformer Engine's module."""
    from transformer_engine.pytorch import RMSNorm

    def run(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        module = RMSNorm(x.shape[-1], eps=eps, device=x.device, dtype=x.dtype)
        return torch.func.functional_call(module, {"weight": weight}, (x,))

    return run


def te_swiglu() -> Callable[..., Tensor]:
    """Transformer Engine's fusible operation."""
    from transformer_engine.pytorch.ops import SwiGLU

    return lambda gate_up: SwiGLU()(gate_up)


def flash_attn_rms_norm() -> Callable[..., Tensor]:
    """FlashAttention's Triton layer norm."""
    from flash_attn.ops.triton.layer_norm import rms_norm_fn

    return lambda x, weight, eps: rms_norm_fn(x, weight, None, eps=eps)


def flash_attn_add_rms_norm() -> Callable[..., tuple[Tensor, ...]]:
    """FlashAttention's Triton layer norm with its residual."""
    from flash_attn.ops.triton.layer_norm import rms_norm_fn

    def run(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
        return rms_norm_fn(x, weight, None, residual=residual, eps=eps, prenorm=True)

    return run


def flash_attn_swiglu() -> Callable[..., Tensor]:
    """FlashAttention's fused activation."""
    from flash_attn.ops.activations import swiglu

    return lambda gate_up: swiglu(*gate_up.chunk(2, dim=-1))
