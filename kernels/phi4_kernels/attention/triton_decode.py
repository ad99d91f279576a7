"""Decoding in Triton: a few queries per sequence; several programs share a sequence's keys.

    m = max_p m_p        l = sum_p exp(m_p - m) l_p        out = sum_p exp(m_p - m) acc_p / l

Part p of a sequence's keys gives the largest score m_p, the sum l_p of exp(score - m_p) and the sum
acc_p of the values under these weights. The rows of a tile are the query heads that share a key
head, so that one read of the keys serves all of them, and the parts of one sequence keep many
multiprocessors busy at once. A part is a fixed number of keys and the second kernel adds parts in
order, without atomics: the result of a sequence is bitwise independent of the rest of the batch and
of where its keys are in the cache.

Source: Dao et al. 2023 (Flash-Decoding); Kwon et al. 2023 (PagedAttention) for the block table.
"""

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from phi4_kernels import launch
from phi4_kernels.attention.triton_decode_parts import parts_kernel
from phi4_kernels.attention.triton_tiles import count
from phi4_kernels.launch import Ladder, Launch, ceil_div

# Shape legend: T queries, P slots, N query heads, K key-value heads, G = N / K, D head dim.


@dataclass(frozen=True, slots=True)
class Split(Launch):
    """`rows` (query, head) pairs of a key head by `block` keys at a time."""

    part_keys: int = 256
    """Keys of a part: a multiple of `block`."""
    num_stages: int = 7
    """Of the pipeline. Half of them fetch the table ahead, so (num_stages - 1) / 2 blocks of keys
    are in flight."""


# By keys of the longest sequence. One row per dtype: with a second one the result of a sequence
# would depend on the longest of its batch. 16 rows are the fewest that a matrix instruction takes.
PARTS: dict[str, tuple[Split, ...]] = {
    "half": (Split(2**31, 32, 4, rows=16),),
    "float": (Split(2**31, 16, 8, rows=16, num_stages=5),),
}
# By parts of the longest sequence: `block` parts of `rows` heads at a time.
COMBINE: Ladder = (Launch(2**31, 8, 4, rows=4),)

_LOG2_E = 1.4426950408889634
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["num_queries", "num_parts", "num_sequences", "steps"])
def _combine_kernel(
    acc_ptr,
    m_ptr,
    l_ptr,
    out_ptr,
    lse_ptr,
    q_offsets_ptr,
    lengths_ptr,
    num_queries,
    num_parts,
    num_sequences,
    steps,
    num_heads,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Merge the parts of one query and HEADS heads, in order. A query of no sequence gets 0."""
    programs = tl.cdiv(num_heads, HEADS)
    query = tl.program_id(0) // programs
    # The sequence of a query is the last one that begins at or before it.
    index = count(q_offsets_ptr, query, num_sequences + 1, steps, False) - 1
    known = (index >= 0) & (index < num_sequences)
    length = tl.load(lengths_ptr + index, mask=known, other=0)
    # Only its own parts: a longer sequence in the batch adds none, so it changes no bit.
    parts = tl.minimum(tl.cdiv(length, PART), num_parts)

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
        # m' = max(m, max_p m_p)
        m_new = tl.maximum(m_i, tl.max(m_p, 0))
        # A row without keys has m = -inf, and -inf - -inf is NaN.
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        # alpha = exp2(m - m'), weight_p = exp2(m_p - m')
        alpha, weights = tl.exp2(m_i - shift), tl.exp2(m_p - shift[None, :])
        # l' = l * alpha + sum_p weight_p * l_p, and acc' alike
        l_i = l_i * alpha + tl.sum(weights * l_p, 0)
        acc = acc * alpha[:, None] + tl.sum(weights[:, :, None] * acc_p, 0)
        m_i = m_new
    # out = acc / l, lse = (m + log2(l)) * ln(2)
    divisor = tl.where(l_i == 0.0, 1.0, l_i)
    out = (acc / divisor[:, None]).to(out_ptr.dtype.element_ty)
    is_head = head < num_heads
    mask = is_head[:, None] & (dims < DIM)[None, :]
    tl.store(out_ptr + rows[:, None] * DIM + dims[None, :], out, mask=mask)
    tl.store(lse_ptr + rows, (m_i + tl.log2(divisor)) * _LN_2, mask=is_head)


def decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    q_offsets: Tensor,
    blocks: Tensor,
    lengths: Tensor,
    block_tokens: int,
    max_length: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See decoding.attention_decode."""
    num_key_heads, dim = keys.shape[1:]
    q = q if q.dim() == 4 else q.unflatten(1, (num_key_heads, -1))
    num_queries, _, group, _ = q.shape
    num_heads, num_sequences = num_key_heads * group, lengths.numel()
    out = torch.empty((num_queries, num_heads, dim), dtype=q.dtype, device=q.device)
    fp32 = partial(torch.empty, dtype=torch.float32, device=q.device)
    lse = fp32((num_queries, num_heads))
    if not num_queries:
        return out, lse
    row = launch.pick(PARTS["float" if q.dtype == torch.float32 else "half"], max_length)
    num_parts = max(1, ceil_div(max_length, row.part_keys))
    # fp32 between the kernels: rounding to bf16 here would add an error per part.
    acc = fp32((num_parts, num_queries, num_heads, dim))
    m, sums = (fp32((num_parts, num_queries, num_heads)) for _ in range(2))
    sizes = {"PART": row.part_keys, "DIM": dim, "PADDED": triton.next_power_of_2(dim)}
    if num_sequences:
        parts_kernel[(num_sequences * num_key_heads * num_parts,)](
            *(q, keys, values, acc, m, sums),
            *(q_offsets, blocks, lengths),
            num_queries,
            num_parts,
            blocks.shape[1],
            int(causal),
            num_key_heads,
            group,
            scale * _LOG2_E,
            *(stride for tensor in (q, keys, values) for stride in tensor.stride()[:-1]),
            ROWS=row.rows,
            BLOCK_N=row.block,
            BLOCK_TOKENS=block_tokens,
            **sizes,
            num_warps=row.num_warps,
            num_stages=row.num_stages,
        )
    combine = launch.pick(COMBINE, num_parts)
    _combine_kernel[(num_queries * ceil_div(num_heads, combine.rows),)](
        *(acc, m, sums, out, lse),
        *(q_offsets, lengths),
        num_queries,
        num_parts,
        num_sequences,
        (num_sequences + 1).bit_length(),
        num_heads,
        HEADS=combine.rows,
        BLOCK=combine.block,
        **sizes,
        num_warps=combine.num_warps,
    )
    return out, lse
