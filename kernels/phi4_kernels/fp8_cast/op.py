"""Quantisation to FP8: tensor-wise with a given scale, or with a scale per 1x128 or 128x128 block.

Both layouts come from one read. Along rows and along columns a 1x128 block holds other elements, so
the transposed bytes have scales of their own; a 128x128 block serves both.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from phi4_kernels import native
from phi4_kernels.checks import expect_dtype, expect_same_device, expect_shape
from phi4_kernels.errors import DtypeError, ShapeError
from phi4_kernels.fp8_cast import reference
from phi4_kernels.launch import ceil_div

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
_TENSOR, _LINE, _TILE = range(3)


class FP8Tensor(NamedTuple):
    """A matrix times one scale."""

    rowwise: Tensor
    """[R, C]."""
    columnwise: Tensor | None
    """[C, R], the same bytes transposed."""
    amax: Tensor
    """[], fp32: max |x| before scaling, for the next step's scale."""


class FP8Blocks(NamedTuple):
    """A matrix with a scale per block; bytes times the block's inverse give the values back."""

    rowwise: Tensor
    """[R, C]."""
    inverse: Tensor
    """fp32: [R, ceil(C / 128)] of 1x128 blocks, [ceil(R / 128), ceil(C / 128)] of 128x128."""
    columnwise: Tensor | None
    """[C, R]."""
    columnwise_inverse: Tensor | None
    """The transposed matrix's: [C, ceil(R / 128)] or [ceil(C / 128), ceil(R / 128)]."""


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
        implementation: see native.choose.

    Raises:
        DtypeError, ShapeError, DeviceError, ImplementationError: see errors.
    """
    _check("cast_tensor", x, dtype)
    expect_shape("cast_tensor", "scale", scale, (), "pass one scale for the tensor")
    expect_dtype("cast_tensor", "scale", scale, (torch.float32,))
    expect_same_device("cast_tensor", x=x, scale=scale)
    if native.resolve("fp8_cast", implementation, x.device) == "torch":
        rowwise, amax = reference.cast_tensor(x, scale, dtype)
        return FP8Tensor(rowwise, rowwise.t().contiguous() if columnwise else None, amax)
    rowwise, transposed, _, _, amax = _launch(x, scale, _TENSOR, dtype, columnwise)
    return FP8Tensor(rowwise, transposed if columnwise else None, amax)


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
    if native.resolve("fp8_cast", implementation, x.device) == "torch":
        rowwise, inverse = reference.cast_blocks(x, block_rows, dtype)
        if not columnwise:
            return FP8Blocks(rowwise, inverse, None, None)
        return FP8Blocks(
            rowwise, inverse, *reference.cast_blocks(x.t().contiguous(), block_rows, dtype)
        )
    scaling = _LINE if block_rows == 1 else _TILE
    rowwise, transposed, inverse, inverse_t, _ = _launch(x, None, scaling, dtype, columnwise)
    if not columnwise:
        return FP8Blocks(rowwise, inverse, None, None)
    return FP8Blocks(
        rowwise, inverse, transposed, inverse_t if scaling == _LINE else inverse.t().contiguous()
    )


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


def _launch(
    x: Tensor, scale: Tensor | None, scaling: int, dtype: torch.dtype, columnwise: bool
) -> tuple[Tensor, ...]:
    return _fp8_cast(x, scale, scaling, dtype == torch.float8_e5m2, columnwise)


def _fake_cast(
    x: Tensor, scale: Tensor | None, scaling: int, e5m2: bool, columnwise: bool
) -> tuple[Tensor, ...]:
    rows, columns = x.shape
    fp8 = torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn
    down, across = ceil_div(rows, reference.BLOCK), ceil_div(columns, reference.BLOCK)
    inverse = ((0, 0), (rows, across), (down, across))[scaling]
    by_line = scaling == _LINE and columnwise
    return (
        x.new_empty((rows, columns), dtype=fp8),
        x.new_empty((columns, rows) if columnwise else (0, 0), dtype=fp8),
        x.new_empty(inverse, dtype=torch.float32),
        x.new_empty((columns, down) if by_line else (0, 0), dtype=torch.float32),
        x.new_empty((), dtype=torch.float32),
    )


_fp8_cast = native.register(
    "fp8_cast(Tensor x, Tensor? scale, int scaling, bool e5m2, bool columnwise) -> "
    "(Tensor rowwise, Tensor columnwise, Tensor inverse, Tensor inverse_columns, Tensor amax)",
    _fake_cast,
)
