"""Shapes and dtypes of the CUDA ops' outputs, for torch.compile and fake tensors."""

import torch
from torch import Tensor

from phi4_kernels.launch import ceil_div

TILE = 128


def register() -> None:
    """Attach the fake forms to the operators that the library has defined."""
    torch.library.register_fake("phi4::adamw_")(lambda *args: None)
    torch.library.register_fake("phi4::square_sum")(_square_sum)
    torch.library.register_fake("phi4::fp8_cast")(_fp8_cast)


def _square_sum(tensors: list[Tensor], stream: int) -> Tensor:
    return tensors[0].new_empty((), dtype=torch.float64)


def _fp8_cast(
    x: Tensor, scale: Tensor | None, scaling: int, e5m2: bool, columnwise: bool, stream: int
) -> tuple[Tensor, ...]:
    rows, columns = x.shape
    fp8 = torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn
    down, across = ceil_div(rows, TILE), ceil_div(columns, TILE)
    inverse = ((0, 0), (rows, across), (down, across))[scaling]
    by_line = scaling == 1 and columnwise
    return (
        x.new_empty((rows, columns), dtype=fp8),
        x.new_empty((columns, rows) if columnwise else (0, 0), dtype=fp8),
        x.new_empty(inverse, dtype=torch.float32),
        x.new_empty((columns, down) if by_line else (0, 0), dtype=torch.float32),
        x.new_empty((), dtype=torch.float32),
    )
