"""Attention for Hopper: copy engine, asynchronous warpgroup products, specialised warps.

Forward only. The gradient is Triton's, whose kernels take the same out and lse; see backward.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from phi4_kernels import launch
from phi4_kernels.attention import triton_impl
from phi4_kernels.attention.gluon_forward import CONSUMERS, ROWS, attention_forward_kernel
from phi4_kernels.attention.gluon_tiles import tiles
from phi4_kernels.errors import DtypeError

# Shape legend: T queries, U keys, N query heads, K key-value heads, D head dim.

_LOG2_E = 1.4426950408889634
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@dataclass(frozen=True, slots=True)
class HopperLaunch:
    """One row of the ladder."""

    limit: int
    """Largest head dim that this row serves."""
    keys: int
    """Keys of a block."""
    stages: int
    """Blocks of keys, and of values, in shared memory."""
    consumer_registers: int = 232
    producer_registers: int = 40
    """Per thread; 2 * consumer + producer is at most 504, with one warpgroup for each."""
    programs_per_processor: int = 1


FORWARD = (
    HopperLaunch(64, keys=128, stages=2),
    HopperLaunch(128, keys=128, stages=2),
)
_TILE_ROWS = ROWS.value * CONSUMERS.value


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
) -> tuple[Tensor, Tensor]:
    """(out [T, N, D], lse [T, N]); see op.attention_forward.

    Raises:
        DtypeError: q is neither bf16 nor fp16.
    """
    _check_dtype(q)
    num_queries, num_heads, head_dim = q.shape
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), _empty_lse(q)
    if not k.shape[0]:
        return out.zero_(), lse.fill_(-torch.inf)
    if not num_queries:
        return out, lse
    row = launch.pick(FORWARD, head_dim)
    table = tiles(
        q_offsets,
        k_starts,
        k_ends,
        num_queries=num_queries,
        tile_rows=_TILE_ROWS,
        causal=causal,
    )
    num_items = table.shape[0] * num_heads
    attention_forward_kernel[(launch.persistent_programs(row, num_items, q.device),)](
        _descriptor(q, ROWS.value),
        _descriptor(k, row.keys),
        _descriptor(v, row.keys),
        out,
        lse,
        table,
        num_items,
        num_heads,
        num_heads // k.shape[1],
        scale * _LOG2_E,
        HEAD_DIM=head_dim,
        CAUSAL=causal,
        KEYS=row.keys,
        STAGES=row.stages,
        CONSUMER_REGISTERS=row.consumer_registers,
        PRODUCER_REGISTERS=row.producer_registers,
        num_warps=4,
    )
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *others: object
) -> tuple[Tensor, Tensor, Tensor]:
    """Triton's gradient: the contract between the passes is out and lse, not who made them."""
    return triton_impl.backward(dout, q, k, v, out, lse, *others)


def _check_dtype(q: Tensor) -> None:
    if q.dtype not in _DTYPES:
        raise DtypeError(
            f"attention: q is {q.dtype}; expected bf16 or fp16 with implementation='gluon'; "
            "cast it, or use 'triton'"
        )


def _empty_lse(q: Tensor) -> Tensor:
    return torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """[heads, tokens, D] of a [tokens, heads, D] tensor, by blocks of `rows` of one head.

    The copy engine needs addresses and strides in multiples of 16 bytes; a view that has others is
    copied first.
    """
    aligned = all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
    if not aligned or x.data_ptr() % 16:
        x = x.contiguous() if not x.is_contiguous() else x.clone()
    shape = [1, rows, 1 << (x.shape[2] - 1).bit_length()]
    layout = gl.NVMMASharedLayout.get_default_for(shape, _DTYPES[x.dtype])
    return TensorDescriptor(
        x, [x.shape[1], x.shape[0], x.shape[2]], [x.stride(1), x.stride(0), 1], shape, layout
    )
