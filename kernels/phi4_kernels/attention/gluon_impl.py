"""Attention for Hopper: copy engine, asynchronous warpgroup products, specialised warps.

All kernels share one structure (gluon_rings): a producer warp fills ring buffers in shared memory,
two warpgroups of 64 rows each multiply from them, and a program processes tiles in an order that
depends on sizes only, the longest first. Backward is two such kernels. A separate kernel of dq
avoids sums across programs in memory: scores are computed twice (7 products instead of 5, at most
5/7 of the matrix rate), but no program waits for another, there are no atomics, and the result does
not depend on timing.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from phi4_kernels import launch
from phi4_kernels.attention.gluon_dkdv import attention_dkdv_kernel
from phi4_kernels.attention.gluon_dq import attention_dq_kernel
from phi4_kernels.attention.gluon_forward import attention_forward_kernel
from phi4_kernels.attention.gluon_rings import CONSUMERS, ROWS
from phi4_kernels.attention.gluon_tiles import places_of_rows, tiles
from phi4_kernels.errors import DtypeError

# Shape legend: T queries, U keys, N query heads, K key-value heads, D head dim.

_LOG2_E = 1.4426950408889634
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
DTYPES = tuple(_DTYPES)
"""Dtypes that the kernels support; the checks skip the others."""
GATED = (("d64-up-to-4096", "d128-up-to-4096"), (torch.bfloat16,))
"""Shipped cases and dtypes whose machine code the resource gate reads: every row of the ladders.
Head dim 96 runs 128's code with another constant, fp16 bf16's with another element type."""


@dataclass(frozen=True, slots=True)
class HopperLaunch:
    """One row of a ladder."""

    limit: int
    """Largest head dim that this row serves."""
    block: int
    """Tokens of a block that a ring's slot holds: keys, or queries where the tile is of keys."""
    stages: int
    """Slots of each ring."""
    consumer_registers: int = 240
    producer_registers: int = 24
    """Per thread; 2 * consumer + producer is at most 504, with one warpgroup for each."""
    programs_per_processor: int = 1


FORWARD = (HopperLaunch(64, block=128, stages=3), HopperLaunch(128, block=128, stages=2))
DQ = (
    HopperLaunch(64, block=64, stages=4),
    HopperLaunch(128, block=64, stages=3, consumer_registers=232, producer_registers=40),
)
DKDV = (HopperLaunch(64, block=64, stages=3), HopperLaunch(128, block=32, stages=4))
_ROWS = ROWS.value
_ANY_NUMBER = 2**31
"""Limit on items: more than a device runs at a time."""


class _Work(NamedTuple):
    """A persistent launch over tiles * heads."""

    grid: tuple[int]
    arguments: tuple[Any, ...]
    """tiles, num_items, num_turns, num_programs, num_heads."""

    @classmethod
    def of(cls, row: HopperLaunch, table: Tensor, num_heads: int, sm_margin: int) -> "_Work":
        num_items = table.shape[0] * num_heads
        # As many programs as the device runs at once, less those that the caller leaves to NCCL.
        resident = launch.persistent_programs(row.programs_per_processor, _ANY_NUMBER, table.device)
        free = sm_margin * row.programs_per_processor
        programs = min(num_items, max(resident - free, 1))
        # Every program takes part in every turn; in the last turn some have no item.
        turns = launch.ceil_div(num_items, programs)
        return cls((programs,), (table, num_items, turns, programs, num_heads))


def forward(
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
) -> tuple[Tensor, Tensor]:
    """(out [T, N, D], lse [T, N]); see op.attention_forward.

    Raises:
        DtypeError: q is neither bf16 nor fp16.
    """
    _check_dtype(q)
    num_queries, num_heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((num_queries, num_heads), dtype=torch.float32, device=q.device)
    if not num_queries:
        return out, lse
    if not k.shape[0]:
        return out.zero_(), lse.fill_(-torch.inf)
    row = launch.pick(FORWARD, head_dim)
    table = _tiles((q_offsets, k_starts, k_ends), num_queries, causal, of_keys=False)
    work = _Work.of(row, table, num_heads, sm_margin)
    attention_forward_kernel[work.grid](
        _descriptor(q, _ROWS),
        _descriptor(k, row.block),
        _descriptor(v, row.block),
        out,
        lse,
        *work.arguments,
        num_heads // k.shape[1],
        scale * _LOG2_E,
        BLOCK_N=row.block,
        **_constants(row, head_dim, causal),
    )
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_offsets: Tensor,
    k_starts: Tensor,
    k_ends: Tensor,
    max_queries: int,
    max_keys: int,
    causal: bool,
    scale: float,
    sm_margin: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv); see op.attention_backward.

    Raises:
        DtypeError: q is neither bf16 nor fp16.
    """
    _check_dtype(q)
    num_queries, num_heads, head_dim = q.shape
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    # Keys outside of all ranges have no tile.
    dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    if not num_queries or not k.shape[0]:
        return dq.zero_(), dk, dv
    where, scales = (q_offsets, k_starts, k_ends), (scale, scale * _LOG2_E)
    group = num_heads // k.shape[1]
    # lse in powers of 2, and delta, by head.
    row_stride = places_of_rows(num_queries, k_starts.numel())
    lse2, delta = (
        torch.empty((num_heads, row_stride), dtype=torch.float32, device=q.device) for _ in range(2)
    )
    row = launch.pick(DQ, head_dim)
    table = _tiles(where, num_queries, causal, of_keys=False)
    work = _Work.of(row, table, num_heads, sm_margin)
    attention_dq_kernel[work.grid](
        _descriptor(q, _ROWS),
        _descriptor(dout, _ROWS),
        _descriptor(k, row.block),
        _descriptor(v, row.block),
        dq,
        out.contiguous(),
        lse,
        lse2,
        delta,
        *work.arguments,
        group,
        row_stride,
        *scales,
        BLOCK_N=row.block,
        **_constants(row, head_dim, causal),
    )
    row = launch.pick(DKDV, head_dim)
    table = _tiles(where, k.shape[0], causal, of_keys=True)
    work = _Work.of(row, table, k.shape[1], sm_margin)
    attention_dkdv_kernel[work.grid](
        _descriptor(k, _ROWS),
        _descriptor(v, _ROWS),
        _descriptor(q, row.block),
        _descriptor(dout, row.block),
        _row_descriptor(lse2, row.block),
        _row_descriptor(delta, row.block),
        dk,
        dv,
        *work.arguments,
        group,
        *scales,
        BLOCK_M=row.block,
        **_constants(row, head_dim, causal),
    )
    return dq, dk, dv


def _check_dtype(q: Tensor) -> None:
    if q.dtype not in _DTYPES:
        raise DtypeError(
            f"attention: q is {q.dtype}; expected bf16 or fp16 with implementation='gluon'; "
            "cast it, or use 'triton'"
        )


def _tiles(
    where: tuple[Tensor, Tensor, Tensor], num_tokens: int, causal: bool, of_keys: bool
) -> Tensor:
    # A tile is the rows of both consumers: 128.
    rows = _ROWS * CONSUMERS.value
    return tiles(*where, num_tokens=num_tokens, tile_rows=rows, causal=causal, of_keys=of_keys)


def _constants(row: HopperLaunch, head_dim: int, causal: bool) -> dict[str, Any]:
    """Compile-time constants of all kernels. The consumers are warpgroups: 4 warps each."""
    return {
        "HEAD_DIM": head_dim,
        "CAUSAL": causal,
        "STAGES": row.stages,
        "CONSUMER_REGISTERS": row.consumer_registers,
        "PRODUCER_REGISTERS": row.producer_registers,
        "num_warps": 4,
    }


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """[heads, tokens, D] of a [tokens, heads, D] tensor, by blocks of `rows` of one head.

    The copy engine needs addresses and strides in multiples of 16 bytes; a view that has others is
    copied first.
    """
    aligned = all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
    if not aligned or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    # Head dims that are no power of two: the engine fills the rest with zeros.
    shape = [1, rows, 1 << (x.shape[2] - 1).bit_length()]
    layout = gl.NVMMASharedLayout.get_default_for(shape, _DTYPES[x.dtype])
    sizes, strides = [x.shape[1], x.shape[0], x.shape[2]], [x.stride(1), x.stride(0), 1]
    return TensorDescriptor(x, sizes, strides, shape, layout)


def _row_descriptor(x: Tensor, block: int) -> TensorDescriptor:
    """[N, places] fp32, by blocks of one head."""
    # Not swizzled: rows of lse and delta are no operands of products.
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [1, block], layout)
