"""Attention over ranges of queries and keys: packed documents, context parallelism, decoding.

A query never meets a key outside of its range, and the cost follows the pairs that do meet: sum of
squared lengths, not the square of the sum. Forward returns the log-sum-exp of the scores, so that
results over parts of the keys can be merged; backward takes it instead of saving any score, sums in
one fixed order, and so gives equal bits in every run.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from phi4_kernels import dispatch
from phi4_kernels.attention.ranges import Ranges
from phi4_kernels.autograd import once_differentiable, without_autocast
from phi4_kernels.checks import FLOAT_DTYPES, expect_dtype, expect_same_device, expect_shape
from phi4_kernels.errors import KernelError, ShapeError
from phi4_kernels.operators import register

__all__ = ["Attention", "Ranges", "attention", "attention_backward", "attention_forward"]

# Shape legend: T queries, U keys, N query heads, K key-value heads, D head dim.

HEAD_DIMS = (64, 96, 128)
"""What every implementation takes; torch takes any."""


class Attention(NamedTuple):
    """Result of a forward pass."""

    out: Tensor
    """[T, N, D], in the inputs' dtype; 0 where a query sees no key."""
    lse: Tensor
    """[T, N], fp32: log of the sum of exp(scale * q.k), natural; -inf where a query sees no key."""


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
) -> Attention:
    """softmax(scale * q k^T) v within each range; differentiable in q, k and v.

    Args:
        q: [T, N, D], or by group [T, K, N / K, D] (which rope_qkv gives; Triton reads it in place),
            bf16, fp16 or fp32 (computed in fp32, never TF32), contiguous in its last dimension.
        k, v: [U, K, D], K a divisor of N: query heads n of one group n // (N / K) share a key head.
        ranges: which keys each query may see.
        causal: query j of a range of m queries and l keys sees its keys up to l - m + j, so the
            last query sees all of them; else every query of a range sees all of its keys.
        scale: positive; D ** -0.5 without it.
        implementation: see dispatch.choose.

    Returns:
        out and lse, of which only out is differentiable. A query without keys gets gradient 0, and
        so does a key without queries.

    Raises:
        DtypeError, ShapeError, DeviceError, ImplementationError: see errors.
        PositionError: ranges are out of order or out of range. Ranges on a GPU are only checked
            under PHI4_KERNELS_DEBUG=1.

    Source: Dao 2023 (FlashAttention-2).
    """
    scale = _checked(q, k, v, ranges, scale)
    name = dispatch.resolve("attention", implementation, q.device)
    _check_head_dim(q, name)
    q = _for_implementation(q, name)
    where = (ranges.q_offsets, ranges.k_starts, ranges.k_ends)
    longest = (ranges.max_queries, ranges.max_keys)
    return Attention(*_AttentionFunction.apply(q, k, v, *where, *longest, causal, scale, name))


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
) -> Attention:
    """`attention` without autograd, for callers that merge results over parts of the keys."""
    scale = _checked(q, k, v, ranges, scale)
    name = dispatch.resolve("attention", implementation, q.device)
    _check_head_dim(q, name)
    q = _for_implementation(q, name)
    where = (ranges.q_offsets, ranges.k_starts, ranges.k_ends)
    longest = (ranges.max_queries, ranges.max_keys)
    with torch.no_grad():
        return Attention(*_forward(q, k, v, *where, *longest, causal, scale, name))


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, without autograd.

    Args:
        dout: [T, N, D], gradient of out.
        q, k, v, ranges, causal, scale, implementation: as for attention.
        out, lse: of the forward pass. They may be those of a result merged over more keys than k:
            dk and dv are then whole, and dq is the part that these keys add to it.

    Returns:
        (dq [T, N, D], dk [U, K, D], dv [U, K, D]), in the inputs' dtype.

    Raises:
        DtypeError, ShapeError, DeviceError, ImplementationError, PositionError: as for attention.
    """
    scale = _checked(q, k, v, ranges, scale)
    q_shape = q.shape
    shape = (q.shape[0], q.shape[1:-1].numel(), q.shape[-1])
    for title, tensor in (("dout", dout), ("out", out)):
        expect_dtype("attention_backward", title, tensor, (q.dtype,))
        expect_shape("attention_backward", title, tensor, shape, "shape it as forward's out")
    expect_dtype("attention_backward", "lse", lse, (torch.float32,))
    expect_shape("attention_backward", "lse", lse, shape[:2], "pass forward's")
    expect_same_device("attention_backward", q=q, dout=dout, out=out, lse=lse)
    name = dispatch.resolve("attention", implementation, q.device)
    _check_head_dim(q, name)
    q = _for_implementation(q, name)
    tensors = (_unit_stride(dout), q, k, v, _unit_stride(out), lse.contiguous())
    where = (ranges.q_offsets, ranges.k_starts, ranges.k_ends)
    longest = (ranges.max_queries, ranges.max_keys)
    with torch.no_grad():
        dq, dk, dv = _backward(*tensors, *where, *longest, causal, scale, name)
    return dq.view(q_shape), dk, dv


def _checked(q: Tensor, k: Tensor, v: Tensor, ranges: Ranges, scale: float | None) -> float:
    """The scale to use, after all checks that do not depend on the implementation."""
    expect_dtype("attention", "q", q, FLOAT_DTYPES)
    for title, tensor in (("q", q), ("k", k), ("v", v)):
        expect_dtype("attention", title, tensor, (q.dtype,))
        if tensor.dim() != 3 and (title, tensor.dim()) != ("q", 4):
            raise ShapeError(
                f"attention: {title} has shape {tuple(tensor.shape)}; expected [tokens, heads, "
                "head_dim]; flatten rows and tokens into one dimension"
            )
        if tensor.stride(-1) != 1 and tensor.numel():
            raise ShapeError(
                f"attention: {title} has strides {tensor.stride()}; expected a contiguous last "
                "dimension; call .contiguous() before"
            )
    num_heads, head_dim = q.shape[1:-1].numel(), q.shape[-1]
    expect_shape("attention", "v", v, tuple(k.shape), "shape it as k")
    expect_shape("attention", "k", k, (*k.shape[:2], head_dim), "head_dim is q's")
    if not k.shape[1] or num_heads % k.shape[1] or not num_heads:
        raise ShapeError(
            f"attention: {num_heads} query heads over {k.shape[1]} key heads; expected a multiple; "
            "repeat or split the heads"
        )
    if q.dim() == 4:
        expect_shape(
            "attention", "q", q, (q.shape[0], k.shape[1], *q.shape[2:]), "its groups are k's heads"
        )
    expect_same_device("attention", q=q, k=k, v=v, ranges=ranges.q_offsets)
    on_host = q.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_host or dispatch.debug():
        ranges.validate(q.shape[0], k.shape[0])
    scale = head_dim**-0.5 if scale is None else scale
    if not 0 < scale < float("inf"):
        raise KernelError(
            f"attention: scale is {scale}; expected a positive number; negate q for a negative one"
        )
    return scale


def _check_head_dim(q: Tensor, name: str) -> None:
    if name != "torch" and q.shape[-1] not in HEAD_DIMS:
        raise ShapeError(
            f"attention: head_dim is {q.shape[-1]}; expected one of {HEAD_DIMS} with "
            f"implementation={name!r}; use 'torch', or pad q, k and v with zeros"
        )


def _for_implementation(q: Tensor, name: str) -> Tensor:
    """q as the implementation takes it: Triton by group too, the others [T, N, D] alone, which
    copies a q that is a view into packed QKV."""
    return q if name == "triton" or q.dim() == 3 else q.flatten(1, 2)


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
        name: str,
    ) -> tuple[Tensor, Tensor]:
        where, longest = (q_offsets, k_starts, k_ends), (max_queries, max_keys)
        out, lse = _forward(q, k, v, *where, *longest, causal, scale, name)
        ctx.save_for_backward(q, k, v, out, lse, *where)
        ctx.constants = *longest, causal, scale, name
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable("attention")
    def backward(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = _backward(_unit_stride(dout), *ctx.saved_tensors, *ctx.constants)
        return *gradients, *[None] * 8


def _fake_forward(q: Tensor) -> tuple[Tensor, Tensor]:
    flat = q if q.dim() == 3 else q.flatten(1, 2)
    return _fake_like(flat), q.new_empty(flat.shape[:2], dtype=torch.float32)


def _fake_like(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape)


_WHERE = "Tensor q_offsets, Tensor k_starts, Tensor k_ends, SymInt max_queries, SymInt max_keys"
_forward = register(
    "attention",
    "forward",
    f"attention_forward(Tensor q, Tensor k, Tensor v, {_WHERE}, bool causal, float scale) "
    "-> (Tensor out, Tensor lse)",
    lambda q, *others: _fake_forward(q),
)
_backward = register(
    "attention",
    "backward",
    f"attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_WHERE}, bool causal, float scale) -> (Tensor dq, Tensor dk, Tensor dv)",
    lambda dout, q, k, v, *others: (_fake_like(q), _fake_like(k), _fake_like(v)),
)
