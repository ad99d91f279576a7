"""Supported inputs and results of attention, and the checks common to all implementations."""

from typing import NamedTuple

import torch
from torch import Tensor

from phi4_kernels import dispatch
from phi4_kernels.attention.block_table import BlockTable
from phi4_kernels.attention.ranges import Ranges
from phi4_kernels.checks import FLOAT_DTYPES, expect_dtype, expect_same_device, expect_shape
from phi4_kernels.errors import KernelError, ShapeError
from phi4_kernels.registry import need_of

# Shape legend: T queries, U keys, N query heads, K key-value heads, D head dim.

HEAD_DIMS = (64, 96, 128)
"""Head dims that every implementation supports; torch supports any."""
ANY_RANGES = "ranges other than causal documents side by side that hold all tokens"
"""The need that implementations which take only document boundaries do not serve."""


class Attention(NamedTuple):
    """Result of a forward pass."""

    out: Tensor
    """[T, N, D], in the inputs' dtype; 0 where a query sees no key."""
    lse: Tensor
    """[T, N], fp32: log of the sum of exp(scale * q.k), natural; -inf where a query sees no key."""


def checked(
    q: Tensor, k: Tensor, v: Tensor, where: Ranges | BlockTable, scale: float | None
) -> float:
    """Run the checks common to all implementations; returns the scale to use."""
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
    expect_same_device("attention", q=q, k=k, v=v, q_offsets=where.q_offsets)
    # On a GPU reading boundaries would stop the host until the device has caught up.
    on_host = q.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_host or dispatch.debug():
        where.validate(q.shape[0], k.shape[0])
    scale = head_dim**-0.5 if scale is None else scale
    if not 0 < scale < float("inf"):
        raise KernelError(
            f"attention: scale is {scale}; expected a positive number; negate q for a negative one"
        )
    return scale


def needs(q: Tensor, k: Tensor, ranges: Ranges, causal: bool) -> tuple[str, ...]:
    """The needs of a call that some implementations do not serve; reads no device memory."""
    of_dtype = need_of(q.dtype)
    is_packed = causal and ranges.num_tokens is not None
    # Adjacent documents that cover all tokens, which libraries take as cu_seqlens.
    if is_packed and ranges.num_tokens == q.shape[0] == k.shape[0]:
        return (of_dtype,)
    return of_dtype, ANY_RANGES


def check_head_dim(q: Tensor, name: str) -> None:
    """Raise ShapeError unless implementation `name` takes q's head dim."""
    if name != "torch" and q.shape[-1] not in HEAD_DIMS:
        raise ShapeError(
            f"attention: head_dim is {q.shape[-1]}; expected one of {HEAD_DIMS} with "
            f"implementation={name!r}; use 'torch', or pad q, k and v with zeros"
        )


def check_margin(sm_margin: int) -> None:
    """Raise KernelError unless it is a number of multiprocessors to leave free."""
    if sm_margin < 0:
        raise KernelError(
            f"attention: sm_margin is {sm_margin}; expected 0 or the multiprocessors to leave free"
        )


def for_implementation(q: Tensor, name: str) -> Tensor:
    """q in a shape that the implementation takes: for Triton unchanged, for the others [T, N, D],
    which copies a q that is a view into packed QKV."""
    return q if name == "triton" or q.dim() == 3 else q.flatten(1, 2)


def aligned(x: Tensor) -> Tensor:
    """x aligned for the 16-byte reads of libraries; a view that is not aligned is copied."""
    are_whole = all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
    if are_whole and x.stride(-1) == 1 and x.data_ptr() % 16 == 0:
        return x
    # A view into packed QKV with an odd start, for example.
    return x.clone(memory_format=torch.contiguous_format)


def fake_forward(q: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse of a forward pass, for q in either shape, without computing them."""
    flat = q if q.dim() == 3 else q.flatten(1, 2)
    return q.new_empty(flat.shape), q.new_empty(flat.shape[:2], dtype=torch.float32)
