"""RMSNorm, alone or after a residual add: y = x / sqrt(mean(x^2) + eps) * weight.

The fused add writes the sum that the next residual add reads, so a block's stream crosses memory
once. Statistics and the weight gradient accumulate in fp32; backward keeps the normalised input
and one fp32 per row. The weight gradient is summed in a fixed order, so it is bitwise repeatable.

FP8 output has no autograd (a gradient in e4m3 would be useless): the FP8 linear that consumes it
implements the backward and calls `rms_norm_backward`.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from phi4_kernels import dispatch
from phi4_kernels.autograd import needs_graph, once_differentiable, without_autocast
from phi4_kernels.checks import (
    FLOAT_DTYPES,
    expect_dtype,
    expect_rows,
    expect_same_device,
    expect_shape,
    rows_of,
    vector,
)
from phi4_kernels.operators import register
from phi4_kernels.reference_arithmetic import FP8
from phi4_kernels.rms_norm import torch_impl


class FP8Norm(NamedTuple):
    """A normalised activation in e4m3, with what the GEMMs and the backward around it need."""

    rowwise: Tensor
    """[T, H], e4m3: y * scale, saturated."""
    columnwise: Tensor | None
    """[H, T], e4m3: the same values transposed, for the weight-gradient GEMM."""
    amax: Tensor
    """[], fp32: max |y| before scaling."""
    total: Tensor | None
    """[T, H]: x + residual, when a residual was given."""
    rstd: Tensor
    """[T], fp32: 1 / sqrt(mean(x^2) + eps), for `rms_norm_backward`."""


@without_autocast
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    grad_group: dist.ProcessGroup | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Normalise the last dimension.

    Args:
        x: [..., H], bf16, fp16 or fp32; rows may be strided.
        weight: [H], the dtype of x or fp32.
        eps: added to the mean of squares.
        grad_group: when the rows are split over these ranks (sequence parallelism), the weight
            gradient is summed over them in fp32. None where the engine reduces it itself.
        implementation: see dispatch.choose.

    Returns:
        [..., H] in the dtype of x.

    Raises:
        DtypeError, ShapeError, DeviceError, ImplementationError: see errors.

    Collectives: backward all-reduce(sum) over grad_group, 4 * H bytes; none without a group.
    """
    weight = _checked("rms_norm", x, weight)
    name = dispatch.resolve("rms_norm", implementation, x.device)
    if grad_group is not None:
        weight = _SumGradient.apply(weight, grad_group)
    if name == "torch":
        return torch_impl.rms_norm(x, weight, eps)
    if not needs_graph(x, weight):
        return _rms_norm_forward(rows_of(x), weight, eps, name)[0].view(x.shape)
    return _RMSNormFunction.apply(x, weight, eps, name)


@without_autocast
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    grad_group: dist.ProcessGroup | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add the residual stream, then normalise: one read of each, one write of each.

    Args:
        x: [..., H], a sublayer's output.
        residual: [..., H], same dtype as x.
        weight, eps, grad_group, implementation: as in rms_norm.

    Returns:
        (y, total): the norm of the sum, and the sum rounded to the dtype of x, which is the new
        residual stream. y is the norm of the rounded sum.

    Raises:
        As rms_norm.

    Collectives: as rms_norm.
    """
    weight = _checked("add_rms_norm", x, weight, residual=residual)
    name = dispatch.resolve("rms_norm", implementation, x.device)
    if grad_group is not None:
        weight = _SumGradient.apply(weight, grad_group)
    if name == "torch":
        return torch_impl.add_rms_norm(x, residual, weight, eps)
    if not needs_graph(x, residual, weight):
        y, total, _ = _add_rms_norm_forward(rows_of(x), rows_of(residual), weight, eps, name)
        return y.view(x.shape), total.view(x.shape)
    return _AddRMSNormFunction.apply(x, residual, weight, eps, name)


@without_autocast
def rms_norm_fp8(
    x: Tensor,
    weight: Tensor,
    eps: float,
    scale: Tensor,
    *,
    residual: Tensor | None = None,
    columnwise: bool = False,
    implementation: str = "auto",
) -> FP8Norm:
    """(Add and) normalise straight into e4m3 with a delayed scale; no autograd.

    Args:
        x, weight, eps, implementation: as in rms_norm; x is [T, H].
        scale: [], fp32: multiplies y before the cast. The returned amax feeds the next scale.
        residual: [T, H] to add first.
        columnwise: also write the transpose, from the same read.

    Raises:
        As rms_norm.
    """
    weight = _checked("rms_norm_fp8", x, weight, residual=residual)
    expect_same_device("rms_norm_fp8", x=x, scale=scale)
    expect_shape("rms_norm_fp8", "scale", scale, (), "pass one scale for the tensor")
    expect_dtype("rms_norm_fp8", "scale", scale, (torch.float32,))
    name = dispatch.resolve("rms_norm", implementation, x.device)
    run = torch_impl.forward_fp8 if name == "torch" else partial(_rms_norm_fp8, implementation=name)
    x, residual = rows_of(x), _optional_rows(residual)
    rowwise, transposed, amax, total, rstd = run(x, residual, weight, eps, scale, columnwise)
    return FP8Norm(
        rowwise, transposed if columnwise else None, amax, None if residual is None else total, rstd
    )


@without_autocast
def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    *,
    dtotal: Tensor | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The gradient of rms_norm, for callers that implement their own autograd.

    Args:
        dy: [T, H], gradient of y.
        x: [T, H], the input of the norm (after the add, if there was one).
        weight: [H].
        rstd: [T], fp32, from the forward.
        dtotal: [T, H], gradient that reaches x past the norm; added to dx in the same pass.

    Returns:
        (dx [T, H] in the dtype of x, dweight [H] in fp32).

    Raises:
        As rms_norm.
    """
    weight = _checked("rms_norm_backward", x, weight, dy=dy, dtotal=dtotal)
    num_rows = x.shape[:-1].numel()
    rstd = vector(
        "rms_norm_backward", "rstd", rstd, num_rows, (torch.float32,), "pass the forward's"
    )
    expect_same_device("rms_norm_backward", x=x, rstd=rstd)
    name = dispatch.resolve("rms_norm", implementation, x.device)
    run = (
        torch_impl.backward if name == "torch" else partial(_rms_norm_backward, implementation=name)
    )
    dy, x = rows_of(dy), rows_of(x)
    return run(dy, _optional_rows(dtotal), x, weight, rstd)


def _checked(op: str, x: Tensor, weight: Tensor, **like_x: Tensor | None) -> Tensor:
    """Check weight, x and the tensors shaped like x; returns the weight, contiguous."""
    expect_dtype(op, "x", x, (*FLOAT_DTYPES, torch.float64))
    expect_rows(op, "x", x)
    for name, tensor in like_x.items():
        if tensor is not None:
            expect_dtype(op, name, tensor, (x.dtype,))
            expect_shape(op, name, tensor, x.shape, "match the shape of x")
    expect_same_device(op, x=x, weight=weight, **like_x)
    dtypes = (x.dtype,) if x.dtype == torch.float32 else (x.dtype, torch.float32)
    return vector(op, "weight", weight, x.shape[-1], dtypes, "one weight per element of a row")


def _optional_rows(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else rows_of(tensor)


class _RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, name: str) -> Tensor:
        rows = rows_of(x)
        y, rstd = _rms_norm_forward(rows, weight, eps, name)
        ctx.name = name
        # Not y: backward makes x^ = x * rstd from what autograd keeps anyway.
        ctx.save_for_backward(rows, weight, rstd)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable("rms_norm")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        rows = rows_of(dy)
        dx, dweight = _rms_norm_backward(rows, None, x, weight, rstd, ctx.name)
        return dx.view(dy.shape), dweight.to(weight.dtype), None, None


class _AddRMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, name: str
    ) -> tuple[Tensor, Tensor]:
        rows, added = rows_of(x), rows_of(residual)
        y, total, rstd = _add_rms_norm_forward(rows, added, weight, eps, name)
        ctx.name = name
        # The sum is what was normalised; neither of its summands is needed.
        ctx.save_for_backward(total, weight, rstd)
        return y.view(x.shape), total.view(x.shape)

    @staticmethod
    @once_differentiable("add_rms_norm")
    def backward(ctx: Any, dy: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, rstd = ctx.saved_tensors
        dy_rows, dtotal_rows = rows_of(dy), rows_of(dtotal)
        dx, dweight = _rms_norm_backward(dy_rows, dtotal_rows, total, weight, rstd, ctx.name)
        # The sum's gradient is that of both summands.
        return dx.view(dy.shape), dx.view(dy.shape), dweight.to(weight.dtype), None, None


class _SumGradient(torch.autograd.Function):
    """Identity whose gradient is summed over a group, in fp32 because the weight leaves as fp32."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.dtype = group, weight.dtype
        return weight.float() if weight.dtype != torch.float64 else weight.clone()

    @staticmethod
    @once_differentiable("rms_norm")
    def backward(ctx: Any, dweight: Tensor) -> tuple[Tensor, None]:
        # Ranks of a sequence-parallel group have tokens each: dweight is the sum over all of them.
        summed = dweight.clone()
        dist.all_reduce(summed, group=ctx.group)
        return summed.to(ctx.dtype), None


def _rows_statistic(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.float32)


def _fake_fp8(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, scale: Tensor, columnwise: bool
) -> tuple[Tensor, ...]:
    rows, hidden = x.shape
    return (
        x.new_empty(rows, hidden, dtype=FP8),
        x.new_empty((hidden, rows) if columnwise else (0, 0), dtype=FP8),
        x.new_empty((), dtype=torch.float32),
        x.new_empty((0, 0) if residual is None else (rows, hidden)),
        _rows_statistic(x),
    )


_rms_norm_forward = register(
    "rms_norm",
    "forward",
    "rms_norm_forward(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)",
    lambda x, weight, eps: (x.new_empty(x.shape), _rows_statistic(x)),
)
_add_rms_norm_forward = register(
    "rms_norm",
    "add_forward",
    "add_rms_norm_forward(Tensor x, Tensor residual, Tensor weight, float eps) "
    "-> (Tensor y, Tensor total, Tensor rstd)",
    lambda x, residual, weight, eps: (
        x.new_empty(x.shape),
        x.new_empty(x.shape),
        _rows_statistic(x),
    ),
)
_rms_norm_backward = register(
    "rms_norm",
    "backward",
    "rms_norm_backward(Tensor dy, Tensor? dtotal, Tensor x, Tensor weight, Tensor rstd) "
    "-> (Tensor dx, Tensor dweight)",
    lambda dy, dtotal, x, weight, rstd: (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape, dtype=torch.float32),
    ),
)
_rms_norm_fp8 = register(
    "rms_norm",
    "forward_fp8",
    "rms_norm_fp8(Tensor x, Tensor? residual, Tensor weight, float eps, Tensor scale, "
    "bool columnwise) -> (Tensor rowwise, Tensor transposed, Tensor amax, Tensor total, "
    "Tensor rstd)",
    _fake_fp8,
)
