"""Numeric conventions that all reference definitions share."""

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max


def widened(x: Tensor) -> Tensor:
    """`x` in the dtype of its arithmetic: fp64 for fp64, else fp32."""
    return x if x.dtype == torch.float64 else x.float()


def quantized(values: Tensor, scale: Tensor) -> Tensor:
    """values * scale as e4m3, saturating; fp64, used as the truth, is not rounded."""
    # e4m3 has no infinity: torch's cast gives NaN for values that are too large, kernels saturate.
    scaled = (values * scale.to(values.dtype)).clamp(-FP8_MAX, FP8_MAX)
    return scaled if values.dtype == torch.float64 else scaled.to(FP8)


def largest(values: Tensor) -> Tensor:
    """max |values|; 0 for an empty tensor."""
    return values.abs().amax() if values.numel() else values.new_zeros(())
