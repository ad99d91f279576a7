"""Quantisation to FP8 in both layouts from one read: one scale, or one per block."""

from phi4_kernels.fp8_cast.op import FP8Blocks, FP8Tensor, cast_blocks, cast_tensor

__all__ = ["FP8Blocks", "FP8Tensor", "cast_blocks", "cast_tensor"]
