"""The two passes of attention's backward; see triton_impl."""

import triton
import triton.language as tl

from phi4_kernels.attention.triton_tiles import block, finite, load, load_rows, span

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
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    MASKED: tl.constexpr,
):
    k = load(k_ptr, key, last, stride_k, KEYS, DIM, PADDED, MASKED)
    v = load(v_ptr, key, last, stride_v, KEYS, DIM, PADDED, MASKED)
    if MASKED:
        # A key that is not finite has left its mark in lse2 or delta of the queries that see it.
        k = finite(k)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    weights = tl.exp2(scores * scale_log2 - lse2[:, None])
    dweights = tl.dot(dout, tl.trans(v), input_precision="ieee")
    dscores = weights * (dweights - delta[:, None])
    if MASKED:
        keys = key + tl.arange(0, KEYS)[None, :]
        dscores = tl.where((keys >= low[:, None]) & (keys < high[:, None]), dscores, 0.0)
    return tl.dot(dscores.to(k.dtype), k, acc, input_precision="ieee")


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
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
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
    rows = first_row + tl.arange(0, QUERIES)
    is_own = rows < end_row
    low, high, first, last, full, full_end = span(lows_ptr, highs_ptr, rows, end_row, KEYS)

    k_ptr += head // group * stride_k_head
    v_ptr += head // group * stride_v_head
    dout_ptr += head * stride_dout_head
    out_ptr += head * stride_out_head
    dout = load(dout_ptr, first_row, end_row, stride_dout, QUERIES, DIM, PADDED, True)
    out = load(out_ptr, first_row, end_row, stride_out, QUERIES, DIM, PADDED, True)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    lse2 = tl.load(lse_ptr + rows.to(tl.int64) * num_heads + head, mask=is_own, other=0.0) * _LOG2_E
    rows_ptr += head * num_queries
    tl.store(rows_ptr + rows, lse2, mask=is_own)
    delta_ptr = rows_ptr + tl.cast(num_heads, tl.int64) * num_queries
    tl.store(delta_ptr + rows, delta, mask=is_own)

    q_ptr += head // group * stride_q_group + head % group * stride_q_head
    q = load(q_ptr, first_row, end_row, stride_q, QUERIES, DIM, PADDED, True)
    acc = tl.zeros((QUERIES, PADDED), tl.float32)
    for key in range(full, full_end, KEYS):
        acc = _dq_block(
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
            KEYS,
            DIM,
            PADDED,
            False,
        )
    before = (full - first) // KEYS
    num_border = before + tl.cdiv(tl.maximum(last - full_end, 0), KEYS)
    for border in tl.range(0, num_border, num_stages=BORDER_STAGES):
        key = tl.where(border < before, first, full_end - before * KEYS) + border * KEYS
        acc = _dq_block(
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
            KEYS,
            DIM,
            PADDED,
            True,
        )
    pointers = block(dq_ptr + head * DIM, first_row, num_heads * DIM, QUERIES, PADDED)
    mask = is_own[:, None] & (tl.arange(0, PADDED)[None, :] < DIM)
    tl.store(pointers, (acc * scale).to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dkdv_block(
    k,
    v,
    dk,
    dv,
    q_ptr,
    dout_ptr,
    rows_ptr,
    delta_ptr,
    member,
    row,
    last,
    low,
    high,
    num_queries,
    stride_q,
    stride_q_head,
    stride_dout,
    stride_dout_head,
    scale_log2,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block of the queries of one head, the group's `member`."""
    member = tl.cast(member, tl.int64)
    q_ptr += member * stride_q_head
    dout_ptr += member * stride_dout_head
    rows = row + tl.arange(0, QUERIES)
    rows_ptr += member * num_queries
    delta_ptr += member * num_queries
    if MASKED:
        lse2 = tl.load(rows_ptr + rows, mask=rows < last, other=0.0)
        delta = tl.load(delta_ptr + rows, mask=rows < last, other=0.0)
        # A query with an inf or NaN in q, dout or a key it sees has one in lse2 or delta. It makes
        # the gradients of its own keys NaN; as zeros it leaves those of the others alone.
        is_finite = (tl.abs(lse2) < float("inf")) & (tl.abs(delta) < float("inf"))
        lse2 = tl.where(is_finite, lse2, float("nan"))
        delta = tl.where(is_finite, delta, 0.0)
        kept = is_finite & (rows < last)
        q = load_rows(q_ptr, row, kept, stride_q, QUERIES, DIM, PADDED)
        dout = load_rows(dout_ptr, row, kept, stride_dout, QUERIES, DIM, PADDED)
    else:
        q = load(q_ptr, row, last, stride_q, QUERIES, DIM, PADDED, False)
        dout = load(dout_ptr, row, last, stride_dout, QUERIES, DIM, PADDED, False)
        lse2 = tl.load(rows_ptr + rows)
        delta = tl.load(delta_ptr + rows)
    scores = tl.dot(k, tl.trans(q), input_precision="ieee")
    weights = tl.exp2(scores * scale_log2 - lse2[None, :])
    if MASKED:
        visible = (rows[None, :] >= low[:, None]) & (rows[None, :] < high[:, None])
        weights = tl.where(visible, weights, 0.0)
    if dout.dtype == tl.float32:
        # Summed apart: one chain of products over all heads and queries rounds to dv's size each
        # time. A limit on imprecise products, which only fp8 has, keeps Triton from joining them.
        dv += tl.dot(weights, dout, input_precision="ieee", max_num_imprecise_acc=QUERIES)
    else:
        dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision="ieee")
    dweights = tl.dot(v, tl.trans(dout), input_precision="ieee")
    dscores = weights * (dweights - delta[None, :])
    dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["num_queries"])
def dkdv_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    dk_ptr,
    dv_ptr,
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
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BORDER_STAGES: tl.constexpr,
):
    """dk and dv of a tile of keys, over all heads of the group.

    Blocks of all heads are one loop: the loads of a head's first block run beside the last
    products of the head before.
    """
    num_groups = num_heads // group
    tile = tl.program_id(0) // num_groups
    if tile >= tl.load(tiles_ptr):
        return
    key_head = (tl.program_id(0) % num_groups).to(tl.int64)
    first_key = tl.load(tiles_ptr + 1 + tile)
    end_key = tl.load(tiles_ptr + 2 + tile)
    keys = first_key + tl.arange(0, KEYS)
    low, high, first, last, full, full_end = span(lows_ptr, highs_ptr, keys, end_key, QUERIES)

    k_ptr += key_head * stride_k_head
    v_ptr += key_head * stride_v_head
    is_seen = (keys < end_key) & (low < high)
    k = load_rows(k_ptr, first_key, is_seen, stride_k, KEYS, DIM, PADDED)
    v = load_rows(v_ptr, first_key, is_seen, stride_v, KEYS, DIM, PADDED)
    dk = tl.zeros((KEYS, PADDED), tl.float32)
    dv = tl.zeros((KEYS, PADDED), tl.float32)
    q_ptr += key_head * stride_q_group
    dout_ptr += key_head * group * stride_dout_head
    rows_ptr += key_head * group * num_queries
    delta_ptr = rows_ptr + tl.cast(num_heads, tl.int64) * num_queries
    num_full = (full_end - full) // QUERIES
    # The pipeline's prologue divides before the loop is known to run.
    blocks = tl.maximum(num_full, 1)
    for step in range(0, group * num_full):
        member = step // blocks
        row = full + step % blocks * QUERIES
        dk, dv = _dkdv_block(
            k, v, dk, dv, q_ptr, dout_ptr, rows_ptr, delta_ptr, member, row, last, low, high,
            num_queries, stride_q, stride_q_head, stride_dout, stride_dout_head, scale_log2,
            QUERIES, DIM, PADDED, False,
        )  # fmt: skip
    before = (full - first) // QUERIES
    num_border = before + tl.cdiv(tl.maximum(last - full_end, 0), QUERIES)
    blocks = tl.maximum(num_border, 1)
    for step in tl.range(0, group * num_border, num_stages=BORDER_STAGES):
        member = step // blocks
        border = step % blocks
        # Counted from `first`: `before * QUERIES` would stay live across the loop above, which at
        # D = 128 leaves no register free.
        row = first + border * QUERIES + tl.where(border < before, 0, num_full * QUERIES)
        dk, dv = _dkdv_block(
            k, v, dk, dv, q_ptr, dout_ptr, rows_ptr, delta_ptr, member, row, last, low, high,
            num_queries, stride_q, stride_q_head, stride_dout, stride_dout_head, scale_log2,
            QUERIES, DIM, PADDED, True,
        )  # fmt: skip
    mask = (keys < end_key)[:, None] & (tl.arange(0, PADDED)[None, :] < DIM)
    width = num_groups * DIM
    dk_ptrs = block(dk_ptr + key_head * DIM, first_key, width, KEYS, PADDED)
    dv_ptrs = block(dv_ptr + key_head * DIM, first_key, width, KEYS, PADDED)
    tl.store(dk_ptrs, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=mask)
