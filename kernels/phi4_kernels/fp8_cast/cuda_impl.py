"""The FP8 casts by csrc's kernel, registered as `phi4::fp8_cast`."""

import torch
from torch import Tensor

from phi4_kernels import operators
from phi4_kernels.fp8_cast import reference
from phi4_kernels.launch import ceil_div

_TENSOR, _LINE, _TILE = range(3)
"""Granularity of the scales, as csrc numbers it."""


def cast_tensor(
    x: Tensor, scale: Tensor, dtype: torch.dtype, columnwise: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The fields of op.FP8Tensor; see op.cast_tensor, whose checks have passed."""
    rowwise, transposed, _, _, amax = _launch(x, scale, _TENSOR, dtype, columnwise)
    return rowwise, transposed if columnwise else None, amax


def cast_blocks(
    x: Tensor, block_rows: int, dtype: torch.dtype, columnwise: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The fields of op.FP8Blocks; see op.cast_blocks, whose checks have passed."""
    scaling = _LINE if block_rows == 1 else _TILE
    rowwise, transposed, inverse, inverse_t, _ = _launch(x, None, scaling, dtype, columnwise)
    if not columnwise:
        return rowwise, inverse, None, None
    # A tile's scale serves both layouts, so that of the transpose is the transpose.
    if scaling == _TILE:
        inverse_t = inverse.t().contiguous()
    return rowwise, inverse, transposed, inverse_t


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
    # By _TENSOR, _LINE, _TILE.
    inverse = ((0, 0), (rows, across), (down, across))[scaling]
    by_line = scaling == _LINE and columnwise
    return (
        x.new_empty((rows, columns), dtype=fp8),
        x.new_empty((columns, rows) if columnwise else (0, 0), dtype=fp8),
        x.new_empty(inverse, dtype=torch.float32),
        x.new_empty((columns, down) if by_line else (0, 0), dtype=torch.float32),
        x.new_empty((), dtype=torch.float32),
    )


_fp8_cast = operators.register_cuda(
    "fp8_cast(Tensor x, Tensor? scale, int scaling, bool e5m2, bool columnwise) -> "
    "(Tensor rowwise, Tensor columnwise, Tensor inverse, Tensor inverse_columns, Tensor amax)",
    _fake_cast,
)
