"""Quantisation to FP8: tensor-wise with a given scale, or with a scale per 1x128 or 128x128 block.

Both layouts come from one read. A 1x128 block along a row holds other elements than one along a
column, so the transpose has its own scales; a 128x128 block serves both.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from phi4_kernels import dispatch
from phi4_kernels.checks import expect_dtype, expect_same_device, expect_shape
from phi4_kernels.errors import DtypeError, ShapeError
from phi4_kernels.fp8_cast import cuda_impl, reference, torch_impl

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


class FP8Tensor(NamedTuple):
    """A matrix times one scale."""

    rowwise: Tensor
    """[R, C]."""
    columnwise: Tensor | None
    """[C, R], the same bytes transposed."""
    amax: Tensor
    """[], fp32: max |x| before scaling, for the next step's scale."""


class FP8Blocks(NamedTuple):
    """A matrix with a scale per block; value = byte * inverse scale of its block."""

    rowwise: Tensor
    """[R, C]."""
    inverse: Tensor
    """fp32: [R, ceil(C / 128)] of 1x128 blocks, [ceil(R / 128), ceil(C / 128)] of 128x128."""
    columnwise: Tensor | None
    """[C, R]."""
    columnwise_inverse: Tensor | None
    """Inverse scales of the transpose: [C, ceil(R / 128)] or [ceil(C / 128), ceil(R / 128)]."""


def cast_tensor(
    x: Tensor,
    scale: Tensor,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    columnwise: bool = False,
    implementation: str = "auto",
) -> FP8Tensor:
    """Multiply with a delayed scale and cast, saturating.

    Args:
        x: [R, C], fp32 or bf16, contiguous.
        scale: [], fp32.
        dtype: float8_e4m3fn, or float8_e5m2 for gradients.
        columnwise: also give the transpose.
        implementation: see dispatch.choose.

    Raises:
        DtypeError, ShapeError, DeviceError, ImplementationError: see errors.
    """
    _check("cast_tensor", x, dtype)
    expect_shape("cast_tensor", "scale", scale, (), "pass one scale for the tensor")
    expect_dtype("cast_tensor", "scale", scale, (torch.float32,))
    expect_same_device("cast_tensor", x=x, scale=scale)
    chosen = dispatch.resolve("fp8_cast", implementation, x.device)
    run = cuda_impl.cast_tensor if chosen == "cuda" else torch_impl.cast_tensor
    return FP8Tensor(*run(x, scale, dtype, columnwise))


def cast_blocks(
    x: Tensor,
    *,
    block_rows: int = 1,
    dtype: torch.dtype = torch.float8_e4m3fn,
    columnwise: bool = False,
    implementation: str = "auto",
) -> FP8Blocks:
    """Scale each block by its largest magnitude and cast.

    Args:
        x: [R, C], fp32 or bf16, contiguous.
        block_rows: 1 for activations and gradients, 128 for weights.
        dtype, columnwise, implementation: as in cast_tensor.

    Raises:
        As cast_tensor.
    """
    _check("cast_blocks", x, dtype)
    if block_rows not in (1, reference.BLOCK):
        raise ShapeError(
            f"cast_blocks: block_rows is {block_rows}; expected 1 (activations) or 128 (weights)"
        )
    chosen = dispatch.resolve("fp8_cast", implementation, x.device)
    run = cuda_impl.cast_blocks if chosen == "cuda" else torch_impl.cast_blocks
    return FP8Blocks(*run(x, block_rows, dtype, columnwise))


def _check(op: str, x: Tensor, dtype: torch.dtype) -> None:
    expect_dtype(op, "x", x, (torch.float32, torch.bfloat16))
    if dtype not in FP8_DTYPES:
        raise DtypeError(
            f"{op}: dtype is {dtype}; expected one of {FP8_DTYPES}; ask for one of them"
        )
    if x.dim() != 2 or not x.is_contiguous():
        raise ShapeError(
            f"{op}: x has shape {tuple(x.shape)} and stride {x.stride()}; expected [R, C], "
            "contiguous; flatten it, or call contiguous() before"
        )
