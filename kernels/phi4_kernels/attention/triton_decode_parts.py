"""The first kernel of decoding: a part of a sequence's keys, read through the block table.

    s_j = scale * q k_j        m_p = max s_j        l_p = sum exp(s_j - m_p)
    acc_p = sum exp(s_j - m_p) v_j        over the keys j of part p

`triton_decode` adds the parts.
"""

import triton
import triton.language as tl

from phi4_kernels.attention.triton_tiles import finite, row_marks


@triton.jit
def _load(
    ptr, slots, is_key, stride, DIM: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr
):
    """The rows of these slots of a [P, D] view; zeros where not `is_key`, if MASKED."""
    dims = tl.arange(0, PADDED)[None, :]
    pointers = ptr + slots[:, None] * stride + dims
    if MASKED:
        return tl.load(pointers, mask=is_key[:, None] & (dims < DIM), other=0.0)
    elif DIM < PADDED:
        return tl.load(pointers, mask=dims < DIM, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _attend(
    q,
    acc,
    m_i,
    l_i,
    k_ptr,
    v_ptr,
    blocks_ptr,
    start,
    end,
    seen_end,
    stride_k,
    stride_v,
    scale_log2,
    BLOCK_N: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Keys [start, start + BLOCK_N) by the online softmax, in powers of 2."""
    keys = start + tl.arange(0, BLOCK_N)
    is_key = keys < end
    if MASKED:
        # Key j is slot j % BLOCK_TOKENS of block blocks[j // BLOCK_TOKENS] of the cache.
        number = tl.load(blocks_ptr + keys // BLOCK_TOKENS, mask=is_key, other=0)
    else:
        number = tl.load(blocks_ptr + keys // BLOCK_TOKENS)
    slots = number.to(tl.int64) * BLOCK_TOKENS + keys % BLOCK_TOKENS
    k = _load(k_ptr, slots, is_key, stride_k, DIM, PADDED, MASKED)
    v = _load(v_ptr, slots, is_key, stride_v, DIM, PADDED, MASKED)
    # s = q k^T, in units of 1 / scale
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        # A value that is not finite makes the scores of the rows that see it NaN; as a zero it
        # leaves the other rows alone.
        marks = row_marks(v)
        v = finite(v)
        seen = keys[None, :] < seen_end[:, None]
        s = tl.where(seen, s + marks[None, :], float("-inf"))
    # m' = max(m, max_j s_j * scale * log2(e))
    m_new = tl.maximum(m_i, tl.max(s, 1) * scale_log2)
    # A row that has seen no key yet must subtract a number.
    shift = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
    # p_j = exp2(s_j * scale * log2(e) - m')
    p = tl.exp2(s * scale_log2 - shift[:, None])
    # alpha = exp2(m - m'), l' = l * alpha + sum_j p_j, acc' = acc * alpha + p v
    alpha = tl.exp2(m_i - shift)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return acc, m_new, l_i


@triton.jit(do_not_specialize=["num_queries", "num_parts", "max_blocks", "causal"])
def parts_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    acc_ptr,
    m_ptr,
    l_ptr,
    q_offsets_ptr,
    blocks_ptr,
    lengths_ptr,
    num_queries,
    num_parts,
    max_blocks,
    causal,
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
    BLOCK_TOKENS: tl.constexpr,
    PART: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
):
    part = tl.program_id(0) % num_parts
    key_head = (tl.program_id(0) // num_parts % num_key_heads).to(tl.int64)
    index = tl.program_id(0) // num_parts // num_key_heads
    first_query = tl.load(q_offsets_ptr + index)
    end_query = tl.load(q_offsets_ptr + index + 1)
    length = tl.load(lengths_ptr + index)
    first = part * PART
    # The last part takes the remaining keys: num_parts follows from the caller's longest length;
    # one that is too small makes the kernel slower, not wrong.
    last = tl.where(part == num_parts - 1, length, tl.minimum(first + PART, length))
    # Parts past the end of a shorter sequence: their m, l and acc are not read either.
    if first >= last:
        return

    # [sequences, max_blocks]: a row of the table per sequence
    blocks_ptr += index.to(tl.int64) * max_blocks
    k_ptr += key_head * stride_k_head
    v_ptr += key_head * stride_v_head
    dims = tl.arange(0, PADDED)[None, :]
    num_rows = (end_query - first_query) * group
    # The compiler must not move what a loop computes out of it: that can take 68 registers more.
    for row in tl.range(0, num_rows, ROWS, disable_licm=True):
        rows = row + tl.arange(0, ROWS)
        is_row = rows < num_rows
        mask = is_row[:, None] & (dims < DIM)
        # Row r is query r // group and query head r % group of this key head.
        query = (first_query + rows // group).to(tl.int64)
        q_rows = query * stride_q + key_head * stride_q_group + rows % group * stride_q_head
        q = tl.load(q_ptr + q_rows[:, None] + dims, mask=mask, other=0.0)
        # One past the last key that each row sees: the sequence's last query sees all of them.
        seen_end = length - (end_query - 1 - query) * causal
        # The first row sees the fewest keys; blocks of keys that it sees whole need no mask.
        fewest = length - (end_query - 1 - first_query - row // group) * causal
        full_end = first + tl.maximum(tl.minimum(fewest, last) - first, 0) // BLOCK_N * BLOCK_N
        acc = tl.zeros((ROWS, PADDED), tl.float32)
        m_i = tl.full((ROWS,), float("-inf"), tl.float32)
        l_i = tl.zeros((ROWS,), tl.float32)
        for start in range(first, full_end, BLOCK_N):
            acc, m_i, l_i = _attend(
                q, acc, m_i, l_i, k_ptr, v_ptr, blocks_ptr, start, last, seen_end,
                stride_k, stride_v, scale_log2, BLOCK_N, BLOCK_TOKENS, DIM, PADDED, False,
            )  # fmt: skip
        # Of a single query this is the last block alone: nothing to pipeline.
        for start in tl.range(full_end, last, BLOCK_N, num_stages=1, disable_licm=True):
            acc, m_i, l_i = _attend(
                q, acc, m_i, l_i, k_ptr, v_ptr, blocks_ptr, start, last, seen_end,
                stride_k, stride_v, scale_log2, BLOCK_N, BLOCK_TOKENS, DIM, PADDED, True,
            )  # fmt: skip
        head = key_head * group + rows % group
        # [parts, queries, heads]: written once, no two programs at one place
        at = (part * num_queries.to(tl.int64) + query) * num_key_heads * group + head
        tl.store(m_ptr + at, m_i, mask=is_row)
        tl.store(l_ptr + at, l_i, mask=is_row)
        tl.store(acc_ptr + at[:, None] * DIM + dims, acc, mask=mask)
