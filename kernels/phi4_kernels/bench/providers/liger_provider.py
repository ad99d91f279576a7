"""Liger-Kernel's Triton functions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from phi4_kernels.bench.providers import losses
from phi4_kernels.registry import Entry


def _rms_norm(entry: Entry) -> Callable[..., Any]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    def run(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)

    return run


def _add_rms_norm(entry: Entry) -> Callable[..., Any]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    def run(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
        return LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, 0.0, "llama", False)

    return run


def _swiglu(entry: Entry) -> Callable[..., Any]:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def run(gate_up: Tensor) -> Tensor:
        return LigerSiLUMulFunction.apply(*gate_up.chunk(2, dim=-1))

    return run


def _rope_qkv(entry: Entry) -> Callable[..., Any]:
    from liger_kernel.ops.rope import LigerRopeFunction

    def run(
        qkv: Tensor, layout: Any, cos: Tensor, sin: Tensor, position_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        q, k, v = layout.split(qkv)
        at = slice(len(qkv)) if position_ids is None else position_ids
        tables = (torch.cat((table[at], table[at]), dim=-1)[None] for table in (cos, sin))
        heads = (part.flatten(1, -2)[None].transpose(1, 2) for part in (q, k))
        q_out, k_out = LigerRopeFunction.apply(*heads, *tables)
        return q_out.transpose(1, 2)[0].view(q.shape), k_out.transpose(1, 2)[0], v

    return run


def _losses(logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    outputs = LigerCrossEntropyFunction.apply(
        logits, targets, None, ignored, 0.0, 0.0, "none", None, False
    )
    return outputs[0]


def _total(hidden: Tensor, weight: Tensor, targets: Tensor, ignored: int) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    outputs = LigerFusedLinearCrossEntropyFunction.apply(
        hidden, weight, targets, None, None, ignored, 0.0, 0.0, "sum", None, False, torch.float32
    )
    return outputs[0]


FUNCTIONS = {
    "cross_entropy": lambda entry: losses.of_logits(_losses),
    "cross_entropy_sharded": lambda entry: losses.with_gradient(_losses),
    "linear_cross_entropy": lambda entry: losses.of_hidden(_losses),
    "summed_linear_cross_entropy": lambda entry: losses.with_gradients(_total),
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "swiglu": _swiglu,
    "rope_qkv": _rope_qkv,
}
