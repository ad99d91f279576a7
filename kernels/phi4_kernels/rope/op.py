"""Rotary position embedding on packed QKV: split and rotate in one pass, in place.

The projection's output is consumed: its queries and keys are overwritten and q, k and v are views
of it, so nothing is copied in either head order. Work is linear in tokens; the grid does not depend
on document lengths. Backward rotates back while it packs dq, dk and dv into the gradient that
the projection's GEMMs read, and saves only the tables.
"""

from typing import Any

import torch
from torch import Tensor

from phi4_kernels import dispatch
from phi4_kernels.autograd import once_differentiable, without_autocast
from phi4_kernels.checks import (
    FLOAT_DTYPES,
    expect_dtype,
    expect_rows_in_place,
    expect_same_device,
    expect_shape,
    vector,
)
from phi4_kernels.errors import KernelError, PositionError, ShapeError
from phi4_kernels.operators import register
from phi4_kernels.rope import torch_impl
from phi4_kernels.rope.layout import QKVLayout

__all__ = ["QKVLayout", "rope_qkv", "rope_tables"]


def rope_tables(
    num_positions: int, rotary_dim: int, base: float, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all angles, computed in fp64: fp32 angles err by 1e-3 at position 16K.

    Args:
        num_positions: one more than the largest position.
        rotary_dim: rotated elements of a head, even.
        base: wavelength base, phi-4's `rope_theta`.
        device: device of the tables.

    Returns:
        (cos, sin), each [num_positions, rotary_dim / 2], fp32.

    Raises:
        ShapeError: rotary_dim is odd.
    """
    if rotary_dim % 2:
        raise ShapeError(f"rope_tables: rotary_dim is {rotary_dim}; expected an even number")
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    angles = torch.arange(num_positions, dtype=torch.float64).outer(base**-exponents)
    return angles.cos().float().to(device), angles.sin().float().to(device)


@without_autocast
def rope_qkv(
    qkv: Tensor,
    layout: QKVLayout,
    cos: Tensor,
    sin: Tensor,
    *,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate queries and keys in place, and split.

    Args:
        qkv: [T, ...] with layout.width elements per token, contiguous within a token; bf16, fp16
            or fp32. Overwritten: do not use it afterwards.
        layout: order and number of its heads.
        cos, sin: [P, rotary_dim / 2], fp32, from rope_tables; rotary_dim <= head_dim.
        position_ids: [T], int32 or int64, in [0, P).
        cu_seqlens: [num_documents + 1], int32, from 0 to T, ascending: positions count from each
            document's start. At most one of the two; with neither, positions are 0 .. T - 1.
            Tokens after the last boundary continue the last document; those before the first have
            negative positions.
        implementation: see dispatch.choose.

    Returns:
        (q [T, G, Q, D], k [T, G, D], v [T, G, D]), views of qkv. What is rotated is NaN, and so is
        its gradient, for a token whose position is outside of [0, P).

    Raises:
        DtypeError, ShapeError, DeviceError, ImplementationError: see errors.
        PositionError: both kinds of positions are given, or T exceeds the tables; under
            PHI4_KERNELS_DEBUG=1 also when a position or boundary is out of range.
        KernelError: qkv is a leaf that requires grad.
    """
    _check(qkv, layout, cos, sin)
    position_ids, cu_seqlens = _checked_positions(qkv.shape[0], cos, position_ids, cu_seqlens)
    expect_same_device(
        "rope_qkv", qkv=qkv, cos=cos, sin=sin, position_ids=position_ids, cu_seqlens=cu_seqlens
    )
    name = dispatch.resolve("rope", implementation, qkv.device)
    tables = (cos.contiguous(), sin.contiguous())
    return _RopeQKVFunction.apply(qkv, layout, *tables, position_ids, cu_seqlens, name)


def _check(qkv: Tensor, layout: QKVLayout, cos: Tensor, sin: Tensor) -> None:
    expect_dtype("rope_qkv", "qkv", qkv, FLOAT_DTYPES)
    expect_dtype("rope_qkv", "cos", cos, (torch.float32,))
    expect_dtype("rope_qkv", "sin", sin, (torch.float32,))
    if qkv.dim() < 2 or qkv.shape[1:].numel() != layout.width:
        raise ShapeError(
            f"rope_qkv: qkv has shape {tuple(qkv.shape)}; expected [T, ...] with {layout.width} "
            f"elements per token for {layout}; flatten its leading dimensions or fix the layout"
        )
    expect_rows_in_place("rope_qkv", "qkv", qkv, qkv.dim() - 1)
    if qkv.is_leaf and qkv.requires_grad:
        raise KernelError(
            "rope_qkv: qkv is a leaf that requires grad; expected an activation, because it is "
            "overwritten; pass a projection's output, or a clone"
        )
    if cos.dim() != 2 or not cos.shape[0] or 2 * cos.shape[1] > layout.head_dim:
        raise ShapeError(
            f"rope_qkv: cos has shape {tuple(cos.shape)}; expected [positions, rotary_dim / 2] "
            f"with positions >= 1 and rotary_dim <= {layout.head_dim}; build it with rope_tables"
        )
    expect_shape("rope_qkv", "sin", sin, tuple(cos.shape), "build both with rope_tables")


def _checked_positions(
    num_tokens: int, cos: Tensor, position_ids: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """position_ids and cu_seqlens, contiguous."""
    op = "rope_qkv"
    if position_ids is not None and cu_seqlens is not None:
        raise PositionError(f"{op}: got position_ids and cu_seqlens; expected one; drop one")
    if position_ids is not None:
        dtypes = (torch.int32, torch.int64)
        position_ids = vector(op, "position_ids", position_ids, num_tokens, dtypes, "one per token")
    elif cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
            raise ShapeError(
                f"{op}: cu_seqlens has shape {tuple(cu_seqlens.shape)}; expected "
                "[num_documents + 1]; for one document pass [0, T]"
            )
        size = cu_seqlens.numel()
        cu_seqlens = vector(op, "cu_seqlens", cu_seqlens, size, (torch.int32,), "pass int32")
    elif num_tokens > cos.shape[0]:
        raise PositionError(
            f"{op}: {num_tokens} tokens, but tables for {cos.shape[0]} positions; build longer "
            "tables, or give position_ids or cu_seqlens"
        )
    if dispatch.debug():
        _check_ranges(num_tokens, cos.shape[0], position_ids, cu_seqlens)
    return position_ids, cu_seqlens


def _check_ranges(
    num_tokens: int, num_positions: int, position_ids: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    if position_ids is not None and num_tokens:
        low, high = int(position_ids.min()), int(position_ids.max())
        if low < 0 or high >= num_positions:
            raise PositionError(
                f"rope_qkv: position_ids span {low} to {high}; expected 0 to {num_positions - 1}; "
                "build longer tables or fix the positions"
            )
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff()
        ends = (int(cu_seqlens[0]), int(cu_seqlens[-1]))
        low, high = int(lengths.min()), int(lengths.max())
        if ends != (0, num_tokens) or low < 0 or high > num_positions:
            raise PositionError(
                f"rope_qkv: cu_seqlens runs from {ends[0]} to {ends[1]} with lengths {low} to "
                f"{high}; expected 0 to {num_tokens}, ascending, lengths up to {num_positions}; "
                "fix the boundaries or build longer tables"
            )


class _RopeQKVFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        layout: QKVLayout,
        cos: Tensor,
        sin: Tensor,
        position_ids: Tensor | None,
        cu_seqlens: Tensor | None,
        name: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin, position_ids, cu_seqlens)
        ctx.layout, ctx.name, ctx.shape = layout, name, qkv.shape
        # A detached alias shares the version counter: autograd notices if qkv was saved before.
        packed = qkv.detach().flatten(1)
        if name == "torch":
            torch_impl.forward(packed, layout, cos, sin, position_ids, cu_seqlens)
            return layout.split(packed)
        # Views: both head orders are strides to the kernel.
        q, k, v = layout.split(packed)
        _rope_forward(q, k, cos, sin, position_ids, cu_seqlens, name)
        return q, k, v

    @staticmethod
    @once_differentiable("rope_qkv")
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        tables, layout = ctx.saved_tensors, ctx.layout
        if ctx.name == "torch":
            packed = torch_impl.backward(dq, dk, dv, layout, *tables)
        else:
            # A gradient may be a broadcast or transposed view, which the kernel cannot index.
            dq, dk, dv = (_unit_stride(gradient) for gradient in (dq, dk, dv))
            sizes = (layout.num_groups, layout.queries_per_group, layout.head_dim)
            packed = _rope_backward(dq, dk, dv, *sizes, layout.order, *tables, ctx.name)
        return packed.view(ctx.shape), None, None, None, None, None, None


def _unit_stride(gradient: Tensor) -> Tensor:
    return gradient if gradient.stride(-1) == 1 else gradient.contiguous()


_rope_forward = register(
    "rope",
    "forward",
    "rope_forward(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, Tensor? position_ids, "
    "Tensor? cu_seqlens) -> ()",
    lambda *args: None,
)
_rope_backward = register(
    "rope",
    "backward",
    "rope_backward(Tensor dq, Tensor dk, Tensor dv, int groups, int queries, int head_dim, "
    "str order, Tensor cos, Tensor sin, Tensor? position_ids, Tensor? cu_seqlens) -> Tensor",
    lambda dq, dk, dv, groups, queries, head_dim, order, *tables: dq.new_empty(
        dq.shape[0], groups * (queries + 2) * head_dim
    ),
)
