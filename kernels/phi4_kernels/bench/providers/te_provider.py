"""Transformer Engine's modules, optimizer and quantizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from phi4_kernels.adamw.cases import with_fused_adam
from phi4_kernels.bench.providers import losses
from phi4_kernels.registry import Entry


def _rms_norm(entry: Entry) -> Callable[..., Any]:
    from transformer_engine.pytorch import RMSNorm

    def run(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        module = RMSNorm(x.shape[-1], eps=eps, device=x.device, dtype=x.dtype)
        return torch.func.functional_call(module, {"weight": weight}, (x,))

    return run


def _swiglu(entry: Entry) -> Callable[..., Any]:
    from transformer_engine.pytorch.ops import SwiGLU

    return lambda gate_up: SwiGLU()(gate_up)


def _losses(logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    rows = parallel_cross_entropy(logits[None], targets[None], 0.0, False, None, ignored)
    return rows[0]


def _optimizer_step(entry: Entry) -> Callable[..., Any]:
    from transformer_engine.pytorch.optimizers import FusedAdam

    return with_fused_adam(FusedAdam)


def _fp8_cast_transpose(entry: Entry) -> Callable[..., Any]:
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

    def run(x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        quantizer = Float8Quantizer(
            scale.reshape(1), x.new_zeros(1, dtype=torch.float32), tex.DType.kFloat8E4M3
        )
        found = quantizer.quantize(x)
        data, transposed = (t.view(torch.float8_e4m3fn) for t in (found._data, found._transpose))
        return data, transposed.t()

    return run


FUNCTIONS = {
    "cross_entropy": lambda entry: losses.of_logits(_losses),
    "cross_entropy_sharded": lambda entry: losses.with_gradient(_losses),
    "rms_norm": _rms_norm,
    "swiglu": _swiglu,
    "optimizer_step": _optimizer_step,
    "fp8_cast_transpose": _fp8_cast_transpose,
}
