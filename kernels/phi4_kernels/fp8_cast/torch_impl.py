"""The FP8 casts by torch's operations: the definition, and a copy for the transpose."""

import torch
from torch import Tensor

from phi4_kernels.fp8_cast import reference


def cast_tensor(
    x: Tensor, scale: Tensor, dtype: torch.dtype, columnwise: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The fields of op.FP8Tensor; see op.cast_tensor, whose checks have passed."""
    rowwise, amax = reference.cast_tensor(x, scale, dtype)
    return rowwise, rowwise.t().contiguous() if columnwise else None, amax


def cast_blocks(
    x: Tensor, block_rows: int, dtype: torch.dtype, columnwise: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The fields of op.FP8Blocks; see op.cast_blocks, whose checks have passed."""
    rowwise, inverse = reference.cast_blocks(x, block_rows, dtype)
    if not columnwise:
        return rowwise, inverse, None, None
    # A line of the transpose holds other elements, so it is cast separately.
    return rowwise, inverse, *reference.cast_blocks(x.t().contiguous(), block_rows, dtype)
