"""The definition of RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

Half precision is computed in fp32 and rounded once, at the end; fp32 and fp64 stay as they are.
"""

import torch
from torch import Tensor

from phi4_kernels.reference_arithmetic import largest, quantized, widened


def inverse_root(x: Tensor, eps: float) -> Tensor:
    """[..., H] -> [..., 1]: 1 / sqrt(mean(x^2) + eps)."""
    return torch.rsqrt(widened(x).square().mean(-1, keepdim=True) + eps)


def _normalized(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return widened(x) * inverse_root(x, eps) * widened(weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., H], [H] -> [..., H] in the dtype of x."""
    return _normalized(x, weight, eps).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum x + residual, rounded to their dtype, and its norm: (y, sum)."""
    # Rounded before the norm, as it is stored.
    total = x + residual
    return rms_norm(total, weight, eps), total


def rms_norm_fp8(
    x: Tensor, weight: Tensor, eps: float, scale: Tensor, *, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[T, H] -> e4m3 [T, H], its amax before scaling [], the sum [T, H] and rstd [T]."""
    total = x if residual is None else x + residual
    y = _normalized(total, weight, eps)
    return quantized(y, scale), largest(y), total, inverse_root(total, eps).squeeze(-1)


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dtotal: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """dx = rstd * (dy * w - hat * mean(dy * w * hat)) (+ dtotal), dweight = sum(dy * hat)."""
    hat = widened(x) * rstd.unsqueeze(-1)
    scaled = widened(dy) * widened(weight)
    # dx = rstd * (dy w - x^ * mean(dy w x^)), x^ = x * rstd
    dx = rstd.unsqueeze(-1) * (scaled - hat * (scaled * hat).mean(-1, keepdim=True))
    if dtotal is not None:
        dx = dx + widened(dtotal)
    # dw = sum over the rows of dy * x^
    return dx.to(x.dtype), (widened(dy) * hat).sum(0)
