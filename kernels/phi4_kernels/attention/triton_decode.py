"""Decoding in Triton: a few queries per range against many keys, which several programs share.

    m = max_p m_p        l = sum_p exp(m_p - m) l_p        out = sum_p exp(m_p - m) acc_p / l

Part p of a range's keys gives the largest score m_p, the sum l_p of exp(score - m_p) and the sum
acc_p of the values under these weights. The rows of a tile are the query heads that share a key
head, so that one read of the keys serves all of them, and the parts of one range keep many
multiprocessors busy at once. A part is a fixed number of keys and the second kernel adds parts in
order, without atomics: the bits of a range depend on its own queries and keys, never on what else
is in the batch.

Source: Dao et al. 2023 (Flash-Decoding).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from phi4_kernels import launch
from phi4_kernels.attention.triton_tiles import count, finite, load, row_marks
from phi4_kernels.launch import Ladder, Launch, ceil_div

# Shape legend: T queries, U keys, N query heads, K key-value heads, G = N / K, D head dim; P parts.


@dataclass(frozen=True, slots=True)
class Split(Launch):
    """`rows` (query, head) pairs of a key head by `block` keys at a time."""

    part_keys: int = 256
    """Keys of a part: a multiple of `block`."""
    num_stages: int = 3
    """Blocks of keys in flight."""


# By keys of the longest range. One row per dtype: a second one would tie a range's bits to the
# longest range of its batch. 16 rows are the fewest that a matrix instruction takes.
PARTS: dict[str, Ladder] = {
    "half": (Split(2**31, 32, 4, rows=16, num_stages=4),),
    "float": (Split(2**31, 32, 8, rows=16, num_stages=3),),
}
# By parts of the longest range: `block` parts of `rows` heads at a time.
COMBINE: Ladder = (Launch(2**31, 8, 4, rows=4),)

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
    start,
    end,
    seen_end,
    stride_k,
    stride_v,
    scale_log2,
    BLOCK_N: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Keys [start, start + BLOCK_N) by the online softmax, in powers of 2."""
    k = load(k_ptr, start, end, stride_k, BLOCK_N, DIM, PADDED, MASKED)
    v = load(v_ptr, start, end, stride_v, BLOCK_N, DIM, PADDED, MASKED)
    qk = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        # A value that is not finite makes the scores of the rows that see it NaN; as a zero it
        # leaves the other rows alone.
        marks = row_marks(v)
        v = finite(v)
        seen = start + tl.arange(0, BLOCK_N)[None, :] < seen_end[:, None]
        qk = tl.where(seen, qk + marks[None, :], float("-inf"))
    m_new = tl.maximum(m_i, tl.max(qk, 1) * scale_log2)
    # A row that has seen no key yet must subtract a number.
    shift = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
    p = tl.exp2(qk * scale_log2 - shift[:, None])
    alpha = tl.exp2(m_i - shift)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return acc, m_new, l_i


@triton.jit(do_not_specialize=["num_queries", "num_parts"])
def _parts_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    acc_ptr,
    m_ptr,
    l_ptr,
    q_offsets_ptr,
    k_starts_ptr,
    k_ends_ptr,
    num_queries,
    num_parts,
    num_key_heads,
    group,
    scale_log2,
    stride_q,
    stride_q_group,
    stride_q_head,
    stride_k,
    stride_k_head,
    stride_v,
    stride_v_head,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
):
    part = tl.program_id(0) % num_parts
    key_head = (tl.program_id(0) // num_parts % num_key_heads).to(tl.int64)
    index = tl.program_id(0) // num_parts // num_key_heads
    first_query = tl.load(q_offsets_ptr + index)
    end_query = tl.load(q_offsets_ptr + index + 1)
    k_end = tl.load(k_ends_ptr + index)
    first = tl.load(k_starts_ptr + index) + part * PART
    last = tl.where(part == num_parts - 1, k_end, tl.minimum(first + PART, k_end))
    if first >= last:
        return

    k_ptr += key_head * stride_k_head
    v_ptr += key_head * stride_v_head
    dims = tl.arange(0, PADDED)[None, :]
    num_rows = (end_query - first_query) * group
    # The compiler must not move what a loop computes out of it: that takes 60 registers more.
    for row in tl.range(0, num_rows, ROWS, disable_licm=True):
        rows = row + tl.arange(0, ROWS)
        is_row = rows < num_rows
        mask = is_row[:, None] & (dims < DIM)
        query = (first_query + rows // group).to(tl.int64)
        q_rows = query * stride_q + key_head * stride_q_group + rows % group * stride_q_head
        q = tl.load(q_ptr + q_rows[:, None] + dims, mask=mask, other=0.0)
        # One past the last key that each row sees: the range's last query sees all of them.
        seen_end = k_end - (end_query - 1 - query)
        # The first row sees the fewest keys; blocks of keys that it sees whole need no mask.
        fewest = k_end - (end_query - 1 - first_query - row // group)
        full_end = first + tl.maximum(tl.minimum(fewest, last) - first, 0) // BLOCK_N * BLOCK_N
        acc = tl.zeros((ROWS, PADDED), tl.float32)
        m_i = tl.full((ROWS,), float("-inf"), tl.float32)
        l_i = tl.zeros((ROWS,), tl.float32)
        for start in range(first, full_end, BLOCK_N):
            acc, m_i, l_i = _attend(
                q,
                acc,
                m_i,
                l_i,
                k_ptr,
                v_ptr,
                start,
                last,
                seen_end,
                stride_k,
                stride_v,
                scale_log2,
                BLOCK_N,
                DIM,
                PADDED,
                False,
            )
        # Of a single query this is the last block alone: nothing to pipeline.
        for start in tl.range(full_end, last, BLOCK_N, num_stages=1, disable_licm=True):
            acc, m_i, l_i = _attend(
                q,
                acc,
                m_i,
                l_i,
                k_ptr,
                v_ptr,
                start,
                last,
                seen_end,
                stride_k,
                stride_v,
                scale_log2,
                BLOCK_N,
                DIM,
                PADDED,
                True,
            )
        head = key_head * group + rows % group
        at = (part * num_queries.to(tl.int64) + query) * num_key_heads * group + head
        tl.store(m_ptr + at, m_i, mask=is_row)
        tl.store(l_ptr + at, l_i, mask=is_row)
        tl.store(acc_ptr + at[:, None] * DIM + dims, acc, mask=mask)


@triton.jit(do_not_specialize=["num_queries", "num_parts", "num_ranges", "steps"])
def _combine_kernel(
    acc_ptr,
    m_ptr,
    l_ptr,
    out_ptr,
    lse_ptr,
    q_offsets_ptr,
    k_starts_ptr,
    k_ends_ptr,
    num_queries,
    num_parts,
    num_ranges,
    steps,
    num_heads,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
):
    """A query and HEADS heads: its parts in order. A query outside of all ranges gets 0."""
    programs = tl.cdiv(num_heads, HEADS)
    query = tl.program_id(0) // programs
    index = count(q_offsets_ptr, query, num_ranges + 1, steps, False) - 1
    known = (index >= 0) & (index < num_ranges)
    k_start = tl.load(k_starts_ptr + index, mask=known, other=0)
    k_end = tl.load(k_ends_ptr + index, mask=known, other=0)
    parts = tl.minimum(tl.cdiv(k_end - k_start, PART), num_parts)

    head = tl.program_id(0) % programs * HEADS + tl.arange(0, HEADS)
    rows = query.to(tl.int64) * num_heads + head
    dims = tl.arange(0, PADDED)
    acc = tl.zeros((HEADS, PADDED), tl.float32)
    m_i = tl.full((HEADS,), float("-inf"), tl.float32)
    l_i = tl.zeros((HEADS,), tl.float32)
    for first in range(0, parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        at = part.to(tl.int64)[:, None] * num_queries * num_heads + rows[None, :]
        mask = (part < parts)[:, None] & (head < num_heads)[None, :]
        m_p = tl.load(m_ptr + at, mask=mask, other=float("-inf"))
        l_p = tl.load(l_ptr + at, mask=mask, other=0.0)
        acc_p = tl.load(
            acc_ptr + at[:, :, None] * DIM + dims[None, None, :],
            mask=mask[:, :, None] & (dims < DIM)[None, None, :],
            other=0.0,
        )
        m_new = tl.maximum(m_i, tl.max(m_p, 0))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha, weights = tl.exp2(m_i - shift), tl.exp2(m_p - shift[None, :])
        l_i = l_i * alpha + tl.sum(weights * l_p, 0)
        acc = acc * alpha[:, None] + tl.sum(weights[:, :, None] * acc_p, 0)
        m_i = m_new
    divisor = tl.where(l_i == 0.0, 1.0, l_i)
    out = (acc / divisor[:, None]).to(out_ptr.dtype.element_ty)
    is_head = head < num_heads
    mask = is_head[:, None] & (dims < DIM)[None, :]
    tl.store(out_ptr + rows[:, None] * DIM + dims[None, :], out, mask=mask)
    tl.store(lse_ptr + rows, (m_i + tl.log2(divisor)) * _LN_2, mask=is_head)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_starts: Tensor,
    k_ends: Tensor,
    max_queries: int,
    max_keys: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See decoding.attention_decode."""
    num_key_heads, dim = k.shape[1:]
    q = q if q.dim() == 4 else q.unflatten(1, (num_key_heads, -1))
    num_queries, _, group, _ = q.shape
    num_heads, num_ranges = num_key_heads * group, k_starts.numel()
    out = torch.empty((num_queries, num_heads, dim), dtype=q.dtype, device=q.device)
    fp32 = {"dtype": torch.float32, "device": q.device}
    lse = torch.empty((num_queries, num_heads), **fp32)
    if not num_queries:
        return out, lse
    row = launch.pick(PARTS["float" if q.dtype == torch.float32 else "half"], max_keys)
    num_parts = max(1, ceil_div(max_keys, row.part_keys))
    acc = torch.empty((num_parts, num_queries, num_heads, dim), **fp32)
    m, sums = (torch.empty((num_parts, num_queries, num_heads), **fp32) for _ in range(2))
    where = q_offsets, k_starts, k_ends
    sizes = {"PART": row.part_keys, "DIM": dim, "PADDED": triton.next_power_of_2(dim)}
    if num_ranges:
        _parts_kernel[(num_ranges * num_key_heads * num_parts,)](
            *(q, k, v, acc, m, sums),
            *where,
            num_queries,
            num_parts,
            num_key_heads,
            group,
            scale * _LOG2_E,
            *(stride for tensor in (q, k, v) for stride in tensor.stride()[:-1]),
            ROWS=row.rows,
            BLOCK_N=row.block,
            **sizes,
            num_warps=row.num_warps,
            num_stages=row.num_stages,
        )
    combine = launch.pick(COMBINE, num_parts)
    _combine_kernel[(num_queries * ceil_div(num_heads, combine.rows),)](
        *(acc, m, sums, out, lse),
        *where,
        num_queries,
        num_parts,
        num_ranges,
        (num_ranges + 1).bit_length(),
        num_heads,
        HEADS=combine.rows,
        BLOCK=combine.block,
        **sizes,
        num_warps=combine.num_warps,
    )
    return out, lse
