"""Attention in Triton, for Ampere and up: portable `tl.dot`, no atomics, any strides.

A program owns a tile of queries (or keys) and one head, and loops over the span of the other side
that its tokens see; no other block is loaded. Blocks that all tokens of the tile see in full run
without a mask, then the blocks on a border are masked by each token's bounds; causality, documents,
caches and gaps are all expressed by these bounds. The most expensive tiles, the last ones of a
range, start first.

Backward is two passes, each with a fixed order of sums: dq by query tiles, then dk and dv by key
tiles, which loop over the heads of their group (triton_dkdv). The scores are computed twice, 7
products where 5 would do, so the ceiling is 5/7 of the matrix rate: 564 counted TFLOP/s where that
is 790. One pass would have to add dq across programs; in a fixed order that means programs that
wait for each other by semaphores, which portable Triton neither guarantees to make progress nor
interprets, and which serialises the long rows that matter most.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from phi4_kernels import launch
from phi4_kernels.attention import triton_decode, triton_dkdv, triton_dq
from phi4_kernels.attention.once import once
from phi4_kernels.attention.triton_tiles import (
    Tile,
    Tiles,
    block,
    cut,
    finite,
    load,
    row_marks,
    span,
)
from phi4_kernels.errors import ShapeError

# Shape legend: T queries, U keys, N query heads, K key-value heads, D head dim.

# By tokens of the longest range: of queries for the first two passes, whose rows are queries and
# whose blocks are keys, of keys for the third, where it is the other way round. fp32 has no matrix
# unit that is exact, so its tiles are small and its time is that of plain multiplications. Decoding
# has a row of its own: one query per range, so that a small tile means more programs. Up to 640
# programs of dk and dv work on parts of a group: this number uses 95% of the 132 multiprocessors of
# an H200 for one document (tests/kernels/test_attention_schedule.py). Short ranges have no parts:
# to write and add their sums would take as long as it saves.
FORWARD: dict[str, tuple[Tile, ...]] = {
    "half": (
        Tile(1, 64, 4, rows=16, num_stages=3),
        Tile(512, 64, 4, rows=64, num_stages=3),
        Tile(2**31, 64, 8, rows=128, num_stages=3),
    ),
    "float": (Tile(2**31, 16, 8, rows=32, num_stages=3),),
}
DQ: dict[str, tuple[Tile, ...]] = {
    "half": (Tile(512, 64, 4, rows=64), Tile(2**31, 64, 8, rows=128)),
    "float": (Tile(2**31, 16, 8, rows=16),),
}
DKDV: dict[str, tuple[Tile, ...]] = {
    "half": (
        Tile(512, 32, 4, rows=64),
        Tile(2**31, 32, 8, rows=128, num_stages=3, most_programs=640),
    ),
    "float": (Tile(2**31, 16, 8, rows=32, border_stages=2),),
}

decode = triton_decode.decode

_MAX_STRIDE = 2**24
_LOG2_E = 1.4426950408889634
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend(
    q,
    acc,
    m_i,
    l_i,
    k_ptr,
    v_ptr,
    key,
    last,
    low,
    high,
    stride_k,
    stride_v,
    scale_log2,
    BLOCK_N: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block of keys by the online softmax, in powers of 2: acc', m' and l'."""
    k = load(k_ptr, key, last, stride_k, BLOCK_N, DIM, PADDED, MASKED)
    v = load(v_ptr, key, last, stride_v, BLOCK_N, DIM, PADDED, MASKED)
    # s = q k^T; the scale is applied in the exponent, by one fused multiply-add
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        # A value that is not finite makes the scores of the queries that see it NaN; as zeros it
        # leaves the others alone.
        marks = row_marks(v)
        v = finite(v)
        keys = key + tl.arange(0, BLOCK_N)[None, :]
        visible = (keys >= low[:, None]) & (keys < high[:, None])
        s = tl.where(visible, s + marks[None, :], float("-inf"))
    # m' = max(m, max_j s_j * scale * log2(e)): exp(x) is exp2(x * log2(e)), one instruction
    m_new = tl.maximum(m_i, tl.max(s, 1) * scale_log2)
    # A query that has seen no key yet must subtract a finite number.
    shift = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
    # p_j = exp2(s_j * scale * log2(e) - m')
    p = tl.exp2(s * scale_log2 - shift[:, None])
    # alpha = exp2(m - m') takes what was summed under the old maximum to the new one
    alpha = tl.exp2(m_i - shift)
    # l' = l * alpha + sum_j p_j
    l_i = l_i * alpha + tl.sum(p, 1)
    # acc' = acc * alpha + p v
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return acc, m_new, l_i


@triton.jit
def _forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    tiles_ptr,
    lows_ptr,
    highs_ptr,
    num_heads,
    group,
    scale_log2,
    stride_q,
    stride_q_group,
    stride_q_head,
    stride_k,
    stride_k_head,
    stride_v,
    stride_v_head,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
):
    """out and lse of BLOCK_M queries of one head."""
    # The last tile first: under a causal mask it sees the most keys. The grid is an upper bound of
    # the number of tiles, which is only known on the device.
    tile = tl.load(tiles_ptr) - 1 - tl.program_id(0) // num_heads
    if tile < 0:
        return
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    first_row = tl.load(tiles_ptr + 1 + tile)
    end_row = tl.load(tiles_ptr + 2 + tile)
    rows = first_row + tl.arange(0, BLOCK_M)
    # Keys [first, last) are seen by some query of the tile, [full, full_end) by every one.
    low, high, first, last, full, full_end = span(lows_ptr, highs_ptr, rows, end_row, BLOCK_N)

    # GQA: `group` query heads read one key head.
    q_ptr += head // group * stride_q_group + head % group * stride_q_head
    k_ptr += head // group * stride_k_head
    v_ptr += head // group * stride_v_head
    q = load(q_ptr, first_row, end_row, stride_q, BLOCK_M, DIM, PADDED, True)
    acc = tl.zeros((BLOCK_M, PADDED), tl.float32)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    # Blocks that every query sees: no mask.
    for key in range(full, full_end, BLOCK_N):
        acc, m_i, l_i = _attend(
            q, acc, m_i, l_i, k_ptr, v_ptr, key, last, low, high,
            stride_k, stride_v, scale_log2, BLOCK_N, DIM, PADDED, False,
        )  # fmt: skip
    # Blocks on a border, before the full ones and after them, in one loop: one copy of its code.
    before = (full - first) // BLOCK_N
    for border in range(0, before + tl.cdiv(tl.maximum(last - full_end, 0), BLOCK_N)):
        key = tl.where(border < before, first, full_end - before * BLOCK_N) + border * BLOCK_N
        acc, m_i, l_i = _attend(
            q, acc, m_i, l_i, k_ptr, v_ptr, key, last, low, high,
            stride_k, stride_v, scale_log2, BLOCK_N, DIM, PADDED, True,
        )  # fmt: skip
    is_own = rows < end_row
    # out = acc / l, and 0 for a query that sees no key
    divisor = tl.where(l_i == 0.0, 1.0, l_i)
    out = acc / divisor[:, None]
    dims = tl.arange(0, PADDED)[None, :]
    out_ptr = block(out_ptr + head * DIM, first_row, num_heads * DIM, BLOCK_M, PADDED)
    mask = is_own[:, None] & (dims < DIM)
    tl.store(out_ptr, out.to(out_ptr.dtype.element_ty), mask=mask)
    # lse = (m + log2(l)) * ln(2), in natural units; -inf for a query that sees no key
    lse = (m_i + tl.log2(divisor)) * _LN_2
    tl.store(lse_ptr + rows.to(tl.int64) * num_heads + head, lse, mask=is_own)


def _sizes(dim: int) -> dict[str, int]:
    return {"DIM": dim, "PADDED": triton.next_power_of_2(dim)}


def _pick(ladders: dict[str, tuple[Tile, ...]], dtype: torch.dtype, longest: int) -> Tile:
    return launch.pick(ladders["float" if dtype == torch.float32 else "half"], longest)


def _strides(**tensors: Tensor) -> tuple[int, ...]:
    """Strides of the token dimension and of the head dimensions.

    Within a tile of 128 tokens the kernels' offsets have 32 bits.
    """
    for name, tensor in tensors.items():
        if tensor.stride(0) >= _MAX_STRIDE:
            raise ShapeError(
                f"attention: {name} has strides {tensor.stride()}; expected under {_MAX_STRIDE} "
                "elements from token to token; call .contiguous() before"
            )
    return tuple(stride for tensor in tensors.values() for stride in tensor.stride()[:-1])


def _by_group(q: Tensor, num_groups: int) -> Tensor:
    """View of q [T, N, D] or [T, K, N / K, D] as the latter."""
    return q if q.dim() == 4 else q.unflatten(1, (num_groups, -1))


def _tiles(
    where: tuple[Tensor, Tensor, Tensor], num_tokens: int, rows: int, causal: bool, of_keys: bool
) -> Tiles:
    q_offsets, k_starts, k_ends = where
    queries, keys = (q_offsets[:-1], q_offsets[1:]), (k_starts, k_ends)
    sides = (keys, queries) if of_keys else (queries, keys)
    settings = ("triton", num_tokens, rows, causal, of_keys)
    return once(where, settings, lambda: cut(num_tokens, *sides, rows, causal, of_keys))


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
    """See op.attention_forward."""
    q = _by_group(q, k.shape[1])
    num_queries, _, group, dim = q.shape
    num_heads = k.shape[1] * group
    out = torch.empty((num_queries, num_heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((num_queries, num_heads), dtype=torch.float32, device=q.device)
    if not num_queries:
        return out, lse
    row = _pick(FORWARD, q.dtype, max_queries)
    where = q_offsets, k_starts, k_ends
    tiles = _tiles(where, num_queries, row.rows, causal, of_keys=False)
    _forward_kernel[(tiles.limit * num_heads,)](
        q,
        k,
        v,
        out,
        lse,
        *tiles[:3],
        num_heads,
        group,
        scale * _LOG2_E,
        *_strides(q=q, k=k, v=v),
        BLOCK_M=row.rows,
        BLOCK_N=row.block,
        **_sizes(dim),
        num_warps=row.num_warps,
        num_stages=row.num_stages,
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
    """See op.attention_backward."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    q = _by_group(q, k.shape[1])
    num_queries, _, group, dim = q.shape
    num_heads = k.shape[1] * group
    # Of each head and query: lse in powers of 2, and delta, the part of ds that all keys share.
    rows = torch.empty((2, num_heads, num_queries), dtype=torch.float32, device=q.device)
    where, strides = (q_offsets, k_starts, k_ends), _strides(q=q, k=k, v=v, dout=dout)
    constants = (
        num_heads,
        group,
        num_queries,
        scale * _LOG2_E,
        scale,
        *strides,
    )
    if num_queries:
        row = _pick(DQ, q.dtype, max_queries)
        tiles = _tiles(where, num_queries, row.rows, causal, of_keys=False)
        triton_dq.dq_kernel[(tiles.limit * num_heads,)](
            dout,
            q,
            k,
            v,
            out,
            lse,
            dq,
            rows,
            *tiles[:3],
            *constants,
            *_strides(out=out),
            BLOCK_M=row.rows,
            BLOCK_N=row.block,
            BORDER_STAGES=row.border_stages,
            **_sizes(dim),
            num_warps=row.num_warps,
            num_stages=row.num_stages,
        )
    if k.shape[0]:
        of_keys = (where, max_keys, causal)
        _launch_dkdv((dout, q, k, v), (dk, dv), rows, of_keys, constants)
    return dq, dk, dv


def _launch_dkdv(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    outputs: tuple[Tensor, Tensor],
    rows: Tensor,
    tiles_of: tuple[tuple[Tensor, Tensor, Tensor], int, bool],
    constants: tuple[float, ...],
) -> None:
    """dk and dv, in parts where programs are few.

    Args:
        inputs: dout, q [T, K, N / K, D], k and v.
        outputs: dk and dv.
        rows: lse2 and delta, as the kernel of dq has written them.
        tiles_of: boundaries, keys of the longest range, causal.
        constants: compile-time arguments of both kernels.
    """
    (where, max_keys, causal), (_, q, k, _) = tiles_of, inputs
    row = _pick(DKDV, k.dtype, max_keys)
    tiles = _tiles(where, k.shape[0], row.rows, causal, of_keys=True)
    parts = triton_dkdv.num_parts(row, k.shape[0], k.shape[1], q.shape[2])
    targets: tuple[Tensor, Tensor] | Tensor = outputs
    if parts > 1:
        # Parts are summed in fp32, so that parting a group costs one rounding, not one per part.
        targets = torch.empty((2, parts, *k.shape), dtype=torch.float32, device=k.device)
    triton_dkdv.dkdv_kernel[(tiles.limit * k.shape[1] * parts,)](
        *inputs,
        *targets,
        rows,
        *tiles[:3],
        *constants,
        parts,
        k.numel(),
        BLOCK_N=row.rows,
        BLOCK_M=row.block,
        BORDER_STAGES=row.border_stages,
        **_sizes(k.shape[2]),
        num_warps=row.num_warps,
        num_stages=row.num_stages,
    )
    if parts > 1:
        triton_dkdv.add_parts(targets[0], targets[1], *outputs)
