"""The optimizer's step and the FP8 cast by apex and Transformer Engine."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from phi4_kernels.adamw.cases import with_fused_adam


def apex_optimizer_step() -> Callable[..., Any]:
    """apex's FusedAdam."""
    from apex.optimizers import FusedAdam

    return with_fused_adam(FusedAdam)


def te_optimizer_step() -> Callable[..., Any]:
    """Transformer Engine's FusedAdam."""
    from transformer_engine.pytorch.optimizers import FusedAdam

    return with_fused_adam(FusedAdam)


def te_fp8_cast_transpose() -> Callable[..., tuple[Tensor, ...]]:
    """Transformer Engine's quantizer with a delayed scale."""
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
