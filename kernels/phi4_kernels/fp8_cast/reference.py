"""The definition of the FP8 casts; fp64 inputs, used as the truth, are not rounded.

A block's inverse scale is its largest magnitude over the format's largest, never below the least
normal fp32, so that its reciprocal is finite; 1 for a block of zeros. Values saturate; an infinity
or a NaN makes its whole block NaN.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from phi4_kernels.reference_arithmetic import widened

BLOCK = 128
_SMALLEST = torch.finfo(torch.float32).smallest_normal


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Saturate, then round to the nearest even FP8 number."""
    limit = torch.finfo(dtype).max
    saturated = values.clamp(-limit, limit)
    return saturated if values.dtype == torch.float64 else saturated.to(dtype)


def cast_tensor(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[R, C], [] -> the bytes [R, C], and max |x| before scaling []."""
    wide = widened(x)
    amax = wide.abs().amax() if x.numel() else wide.new_zeros(())
    return rounded(wide * scale.to(wide.dtype), dtype), amax


def cast_blocks(x: Tensor, block_rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[R, C] -> the bytes [R, C], and inverse scales [ceil(R / block_rows), ceil(C / 128)].

    block_rows is 1 or 128; blocks at the edges are cut.
    """
    rows, columns = x.shape
    padding = (0, -columns % BLOCK, 0, -rows % block_rows)
    # Zeros at the edges change no maximum; they are cut off again.
    padded = F.pad(widened(x), padding)
    down, across = padded.shape[0] // block_rows, padded.shape[1] // BLOCK
    blocks = padded.view(down, block_rows, across, BLOCK)
    # amax = max |x| of the block, inverse = amax / largest, y = round(x / inverse)
    amax = blocks.abs().amax(dim=(1, 3)) if x.numel() else blocks.new_zeros(down, across)
    inverse = (amax / torch.finfo(dtype).max).clamp(min=_SMALLEST)
    inverse = torch.where(amax == 0, 1.0, inverse)
    scaled = blocks * (1 / inverse)[:, None, :, None]
    return rounded(scaled.reshape(padded.shape)[:rows, :columns], dtype), inverse
