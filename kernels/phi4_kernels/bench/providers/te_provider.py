"""Transformer Engine's modules."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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


FUNCTIONS = {"rms_norm": _rms_norm, "swiglu": _swiglu}
