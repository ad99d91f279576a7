"""Attention over ranges of queries and keys: packed documents, context parallelism, decoding.

A query never sees a key outside of its range, and the cost is that of the visible pairs: the sum of
squared lengths, not the square of the sum. Forward returns the log-sum-exp of the scores, so that
results over parts of the keys can be merged; backward takes it instead of saving any score, sums in
one fixed order, and is bitwise reproducible.
"""

from typing import Any

import torch
from torch import Tensor

from phi4_kernels import dispatch
from phi4_kernels.attention.arguments import (
    Attention,
    check_head_dim,
    check_margin,
    checked,
    fake_forward,
    for_implementation,
    needs,
)
from phi4_kernels.attention.ranges import Ranges
from phi4_kernels.autograd import once_differentiable, without_autocast
from phi4_kernels.checks import expect_dtype, expect_same_device, expect_shape
from phi4_kernels.operators import register

__all__ = ["Attention", "Ranges", "attention", "attention_backward", "attention_forward"]

# Shape legend: T queries, U keys, N query heads, K key-value heads, D head dim.


@without_autocast
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Ranges,
    *,
    causal: bool = True,
    scale: float | None = None,
    implementation: str = "auto",
    sm_margin: int = 0,
) -> Attention:
    """softmax(scale * q k^T) v within each range; differentiable in q, k and v.

    Args:
        q: [T, N, D], or by group [T, K, N / K, D] (which rope_qkv gives; Triton reads it in place),
            bf16, fp16 or fp32 (computed in fp32, never TF32), contiguous in its last dimension.
        k, v: [U, K, D], K a divisor of N: query heads n of one group n // (N / K) share a key head.
        ranges: which keys each query may see.
        causal: query j of a range of m queries and l keys sees its keys up to l - m + j, so the
            last query sees all of them; else every query of a range sees all of its keys.
        scale: positive; None means D ** -0.5.
        implementation: see dispatch.choose.
        sm_margin: multiprocessors that `gluon` leaves to other kernels, such as NCCL's. Its kernels
            are persistent and use all of them; other kernels then wait until they end. Results do
            not depend on it. The other implementations ignore it.

    Returns:
        out and lse, of which only out is differentiable. A query without keys gets gradient 0, and
        so does a key without queries.

    Raises:
        DtypeError, ShapeError, DeviceError, ImplementationError: see errors.
        PositionError: ranges are out of order or out of range. Ranges on a GPU are only checked
            under PHI4_KERNELS_DEBUG=1.

    Source: Dao 2023 (FlashAttention-2).
    """
    scale = checked(q, k, v, ranges, scale)
    check_margin(sm_margin)
    asked = needs(q, k, ranges, causal)
    name = dispatch.resolve("attention", implementation, q.device, None, asked)
    check_head_dim(q, name)
    q = for_implementation(q, name)
    where = (ranges.q_offsets, ranges.k_starts, ranges.k_ends)
    longest = (ranges.max_queries, ranges.max_keys)
    return Attention(
        *_AttentionFunction.apply(q, k, v, *where, *longest, causal, scale, sm_margin, name)
    )


@without_autocast
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Ranges,
    *,
    causal: bool = True,
    scale: float | None = None,
    implementation: str = "auto",
    sm_margin: int = 0,
) -> Attention:
    """`attention` without autograd, for callers that merge results over parts of the keys."""
    scale = checked(q, k, v, ranges, scale)
    check_margin(sm_margin)
    asked = needs(q, k, ranges, causal)
    name = dispatch.resolve("attention", implementation, q.device, None, asked)
    check_head_dim(q, name)
    q = for_implementation(q, name)
    where = (ranges.q_offsets, ranges.k_starts, ranges.k_ends)
    longest = (ranges.max_queries, ranges.max_keys)
    with torch.no_grad():
        return Attention(*_forward(q, k, v, *where, *longest, causal, scale, sm_margin, name))


@without_autocast
def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ranges: Ranges,
    *,
    causal: bool = True,
    scale: float | None = None,
    implementation: str = "auto",
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, without autograd.

    Args:
        dout: [T, N, D], gradient of out.
        q, k, v, ranges, causal, scale, implementation, sm_margin: as for attention.
        out, lse: of the forward pass. They may be those of a result merged over more keys than k:
            dk and dv are then whole, and dq is the part that these keys add to it.

    Returns:
        (dq [T, N, D], dk [U, K, D], dv [U, K, D]), in the inputs' dtype.

    Raises:
        DtypeError, ShapeError, DeviceError, ImplementationError, PositionError: as for attention.
    """
    scale = checked(q, k, v, ranges, scale)
    check_margin(sm_margin)
    q_shape = q.shape
    shape = (q.shape[0], q.shape[1:-1].numel(), q.shape[-1])
    for title, tensor in (("dout", dout), ("out", out)):
        expect_dtype("attention_backward", title, tensor, (q.dtype,))
        expect_shape("attention_backward", title, tensor, shape, "shape it as forward's out")
    expect_dtype("attention_backward", "lse", lse, (torch.float32,))
    expect_shape("attention_backward", "lse", lse, shape[:2], "pass forward's")
    expect_same_device("attention_backward", q=q, dout=dout, out=out, lse=lse)
    asked = needs(q, k, ranges, causal)
    name = dispatch.resolve("attention", implementation, q.device, None, asked)
    check_head_dim(q, name)
    q = for_implementation(q, name)
    # Kernels index rows by strides, but the elements of a row by 1.
    tensors = (_unit_stride(dout), q, k, v, _unit_stride(out), lse.contiguous())
    where = (ranges.q_offsets, ranges.k_starts, ranges.k_ends)
    longest = (ranges.max_queries, ranges.max_keys)
    with torch.no_grad():
        dq, dk, dv = _backward(*tensors, *where, *longest, causal, scale, sm_margin, name)
    return dq.view(q_shape), dk, dv


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class _AttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_offsets: Tensor,
        k_starts: Tensor,
        k_ends: Tensor,
        max_queries: int,
        max_keys: int,
        causal: bool,
        scale: float,
        sm_margin: int,
        name: str,
    ) -> tuple[Tensor, Tensor]:
        where, longest = (q_offsets, k_starts, k_ends), (max_queries, max_keys)
        out, lse = _forward(q, k, v, *where, *longest, causal, scale, sm_margin, name)
        ctx.save_for_backward(q, k, v, out, lse, *where)
        ctx.constants = *longest, causal, scale, sm_margin, name
        # A gradient of lse would need a term that the kernels do not compute.
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable("attention")
    def backward(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = _backward(_unit_stride(dout), *ctx.saved_tensors, *ctx.constants)
        return *gradients, *[None] * 9


def _fake_like(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape)


_WHERE = "Tensor q_offsets, Tensor k_starts, Tensor k_ends, SymInt max_queries, SymInt max_keys"
_forward = register(
    "attention",
    "forward",
    f"attention_forward(Tensor q, Tensor k, Tensor v, {_WHERE}, bool causal, float scale, "
    "int sm_margin) -> (Tensor out, Tensor lse)",
    lambda q, *others: fake_forward(q),
)
_backward = register(
    "attention",
    "backward",
    f"attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_WHERE}, bool causal, float scale, int sm_margin) -> (Tensor dq, Tensor dk, Tensor dv)",
    lambda dout, q, k, v, *others: (_fake_like(q), _fake_like(k), _fake_like(v)),
)
