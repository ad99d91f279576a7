"""The stretch of rows by a factor."""

from typing import Any

import torch
from phi4_kernels import dispatch
from phi4_kernels.autograd import once_differentiable, without_autocast
from phi4_kernels.checks import FLOAT_DTYPES, expect_dtype, expect_rows, rows_of
from phi4_kernels.operators import register
from phi4_kernels.stretch import torch_impl
from torch import Tensor


@without_autocast
def stretch(x: Tensor, factor: float, *, implementation: str = "auto") -> Tensor:
    """factor * x.

    Args:
        x: [..., H], bf16, fp16 or fp32.
        factor: finite.
        implementation: see dispatch.choose.

    Raises:
        DtypeError, ShapeError, ImplementationError: see errors.
    """
    expect_rows("stretch", "x", x)
    expect_dtype("stretch", "x", x, FLOAT_DTYPES)
    name = dispatch.resolve("stretch", implementation, x.device)
    if name == "torch":
        return torch_impl.stretch(x, factor)
    return _StretchFunction.apply(rows_of(x), factor, name).view(x.shape)


class _StretchFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float, name: str) -> Tensor:
        ctx.factor, ctx.name = factor, name
        return _forward(x, factor, name)

    @staticmethod
    @once_differentiable("stretch")
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        return _forward(rows_of(dout), ctx.factor, ctx.name), None, None


_forward = register(
    "stretch",
    "forward",
    "stretch_forward(Tensor x, float factor) -> Tensor",
    lambda x, factor: x.new_empty(x.shape),
)
