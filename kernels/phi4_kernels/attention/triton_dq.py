"""The first pass of attention's backward, dq; see triton_impl."""

import triton
import triton.language as tl

from phi4_kernels.attention.triton_tiles import block, finite, load, span

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _dq_block(
    q,
    dout,
    lse2,
    delta,
    acc,
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
    """dq after one more block of keys."""
    k = load(k_ptr, key, last, stride_k, BLOCK_N, DIM, PADDED, MASKED)
    v = load(v_ptr, key, last, stride_v, BLOCK_N, DIM, PADDED, MASKED)
    if MASKED:
        # A key that is not finite has made lse2 or delta of the queries that see it not finite.
        k = finite(k)
    # s = q k^T
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    # p = exp2(s * scale * log2(e) - lse2): the probabilities, with the normalizer that forward kept
    p = tl.exp2(s * scale_log2 - lse2[:, None])
    # dp = dout v^T
    dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
    # ds = p * (dp - delta), softmax's gradient; delta = sum_j p_j dp_j
    ds = p * (dp - delta[:, None])
    if MASKED:
        keys = key + tl.arange(0, BLOCK_N)[None, :]
        # Masked last: outside of a query's bounds p is of a score that its lse does not cover, and
        # may be infinite.
        ds = tl.where((keys >= low[:, None]) & (keys < high[:, None]), ds, 0.0)
    # dq += ds k; the scale of s is applied once, to the sum
    return tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["num_queries"])
def dq_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    dq_ptr,
    rows_ptr,
    tiles_ptr,
    lows_ptr,
    highs_ptr,
    num_heads,
    group,
    num_queries,
    scale_log2,
    scale,
    stride_q,
    stride_q_group,
    stride_q_head,
    stride_k,
    stride_k_head,
    stride_v,
    stride_v_head,
    stride_dout,
    stride_dout_head,
    stride_out,
    stride_out_head,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BORDER_STAGES: tl.constexpr,
):
    """dq, and for the other pass the lse in powers of 2 and delta = sum(dout * out)."""
    tile = tl.load(tiles_ptr) - 1 - tl.program_id(0) // num_heads
    if tile < 0:
        return
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    first_row = tl.load(tiles_ptr + 1 + tile)
    end_row = tl.load(tiles_ptr + 2 + tile)
    rows = first_row + tl.arange(0, BLOCK_M)
    is_own = rows < end_row
    low, high, first, last, full, full_end = span(lows_ptr, highs_ptr, rows, end_row, BLOCK_N)

    k_ptr += head // group * stride_k_head
    v_ptr += head // group * stride_v_head
    dout_ptr += head * stride_dout_head
    out_ptr += head * stride_out_head
    dout = load(dout_ptr, first_row, end_row, stride_dout, BLOCK_M, DIM, PADDED, True)
    out = load(out_ptr, first_row, end_row, stride_out, BLOCK_M, DIM, PADDED, True)
    # delta = sum_d dout_d * out_d, which equals sum_j p_j dp_j: one row instead of all keys
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    # A query that sees no key has lse = -inf. Its tile has no full block, and the mask of the
    # others leaves it out.
    lse2 = tl.load(lse_ptr + rows.to(tl.int64) * num_heads + head, mask=is_own, other=0.0) * _LOG2_E
    # By head and then query: dk and dv read them by blocks of queries.
    rows_ptr += head * num_queries
    tl.store(rows_ptr + rows, lse2, mask=is_own)
    delta_ptr = rows_ptr + tl.cast(num_heads, tl.int64) * num_queries
    tl.store(delta_ptr + rows, delta, mask=is_own)

    q_ptr += head // group * stride_q_group + head % group * stride_q_head
    q = load(q_ptr, first_row, end_row, stride_q, BLOCK_M, DIM, PADDED, True)
    acc = tl.zeros((BLOCK_M, PADDED), tl.float32)
    # The same order as in forward: full blocks, then those on a border.
    for key in range(full, full_end, BLOCK_N):
        acc = _dq_block(
            q, dout, lse2, delta, acc, k_ptr, v_ptr, key, last, low, high,
            stride_k, stride_v, scale_log2, BLOCK_N, DIM, PADDED, False,
        )  # fmt: skip
    before = (full - first) // BLOCK_N
    num_border = before + tl.cdiv(tl.maximum(last - full_end, 0), BLOCK_N)
    for border in tl.range(0, num_border, num_stages=BORDER_STAGES):
        key = tl.where(border < before, first, full_end - before * BLOCK_N) + border * BLOCK_N
        acc = _dq_block(
            q, dout, lse2, delta, acc, k_ptr, v_ptr, key, last, low, high,
            stride_k, stride_v, scale_log2, BLOCK_N, DIM, PADDED, True,
        )  # fmt: skip
    pointers = block(dq_ptr + head * DIM, first_row, num_heads * DIM, BLOCK_M, PADDED)
    mask = is_own[:, None] & (tl.arange(0, PADDED)[None, :] < DIM)
    # dq = scale * ds k
    tl.store(pointers, (acc * scale).to(dq_ptr.dtype.element_ty), mask=mask)
