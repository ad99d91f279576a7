"""The second pass of attention's backward, dk and dv, in one launch or in parts; see triton_impl.

A program owns a tile of keys and one key head, and loops over the query heads of its group. One
long range has few such programs, and the first of them take twice as long as the average. So where
there are few, a group's heads are split among programs, and a second kernel adds the parts in
order. The number of parts depends on sizes only, so results do not depend on the device.
"""

import triton
import triton.language as tl
from torch import Tensor

from phi4_kernels.attention.triton_tiles import Tile, block, load, load_rows, span
from phi4_kernels.launch import ceil_div

_ADDED = 1024
"""Elements that a program of the adding kernel handles: 8 per thread."""


def num_parts(row: Tile, num_keys: int, num_groups: int, group: int) -> int:
    """Number of equal parts of a group of query heads: the most that `row` allows.

    Their sums are fp32 and take 2 * parts * num_keys * num_groups * D * 4 bytes; with more than one
    part that is at most row.most_programs * row.rows * D * 8, plus the padding of the last tile.
    """
    programs = ceil_div(num_keys, row.rows) * num_groups
    fitting = (
        n for n in range(group, 1, -1) if not group % n and n * programs <= row.most_programs
    )
    # The most parts that keep the number of programs within the row's limit; 1 where none does.
    return next(fitting, 1)


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
    BLOCK_M: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block of the queries of one head, the group's `member`.

    Keys are rows here, so that p and ds are the left operands of their products untransposed.
    """
    # The group's heads are next to each other in q and dout, and in the rows of lse2 and delta.
    member = tl.cast(member, tl.int64)
    q_ptr += member * stride_q_head
    dout_ptr += member * stride_dout_head
    rows = row + tl.arange(0, BLOCK_M)
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
        q = load_rows(q_ptr, row, kept, stride_q, BLOCK_M, DIM, PADDED)
        dout = load_rows(dout_ptr, row, kept, stride_dout, BLOCK_M, DIM, PADDED)
    else:
        q = load(q_ptr, row, last, stride_q, BLOCK_M, DIM, PADDED, False)
        dout = load(dout_ptr, row, last, stride_dout, BLOCK_M, DIM, PADDED, False)
        lse2 = tl.load(rows_ptr + rows)
        delta = tl.load(delta_ptr + rows)
    # s^T = k q^T
    s = tl.dot(k, tl.trans(q), input_precision="ieee")
    # p^T = exp2(s^T * scale * log2(e) - lse2)
    p = tl.exp2(s * scale_log2 - lse2[None, :])
    if MASKED:
        visible = (rows[None, :] >= low[:, None]) & (rows[None, :] < high[:, None])
        p = tl.where(visible, p, 0.0)
    # dv += p^T dout
    if dout.dtype == tl.float32:
        # Summed separately: one chain of products over all heads and queries rounds to dv's size
        # each time. A limit on imprecise products, which only fp8 has, keeps Triton from joining
        # them.
        dv += tl.dot(p, dout, input_precision="ieee", max_num_imprecise_acc=BLOCK_M)
    else:
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
    # dp^T = v dout^T
    dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
    # ds^T = p^T * (dp^T - delta)
    ds = p * (dp - delta[None, :])
    # dk += ds^T q; scaled once, at the end
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
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
    num_parts,
    stride_part,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BORDER_STAGES: tl.constexpr,
):
    """dk and dv of a tile of keys, over all heads of the group or those of one of num_parts parts.

    Blocks of all heads are one loop: the loads of a head's first block overlap the last products
    of the previous head. Parts go to [num_parts, U, K, D].
    """
    num_groups = num_heads // group
    members = group // num_parts
    part = tl.program_id(0) % num_parts
    # The first tile first: under a causal mask the most queries see it. Parts of a tile are
    # neighbours, which read the same keys.
    tile = tl.program_id(0) // num_parts // num_groups
    if tile >= tl.load(tiles_ptr):
        return
    key_head = (tl.program_id(0) // num_parts % num_groups).to(tl.int64)
    first_key = tl.load(tiles_ptr + 1 + tile)
    end_key = tl.load(tiles_ptr + 2 + tile)
    keys = first_key + tl.arange(0, BLOCK_N)
    low, high, first, last, full, full_end = span(lows_ptr, highs_ptr, keys, end_key, BLOCK_M)

    k_ptr += key_head * stride_k_head
    v_ptr += key_head * stride_v_head
    # A key that no query sees may hold anything, NaN too; as zeros it gets gradients of 0.
    is_seen = (keys < end_key) & (low < high)
    k = load_rows(k_ptr, first_key, is_seen, stride_k, BLOCK_N, DIM, PADDED)
    v = load_rows(v_ptr, first_key, is_seen, stride_v, BLOCK_N, DIM, PADDED)
    dk = tl.zeros((BLOCK_N, PADDED), tl.float32)
    dv = tl.zeros((BLOCK_N, PADDED), tl.float32)
    first_member = tl.cast(part * members, tl.int64)
    q_ptr += key_head * stride_q_group + first_member * stride_q_head
    first_head = key_head * group + first_member
    dout_ptr += first_head * stride_dout_head
    rows_ptr += first_head * num_queries
    delta_ptr = rows_ptr + tl.cast(num_heads, tl.int64) * num_queries
    # Full blocks of the first head, then of the second, ...; afterwards the same on the borders.
    num_full = (full_end - full) // BLOCK_M
    # The pipeline's prologue divides before the loop is known to run.
    blocks = tl.maximum(num_full, 1)
    for step in range(0, members * num_full):
        member = step // blocks
        row = full + step % blocks * BLOCK_M
        dk, dv = _dkdv_block(
            k, v, dk, dv, q_ptr, dout_ptr, rows_ptr, delta_ptr, member, row, last, low, high,
            num_queries, stride_q, stride_q_head, stride_dout, stride_dout_head, scale_log2,
            BLOCK_M, DIM, PADDED, False,
        )  # fmt: skip
    before = (full - first) // BLOCK_M
    num_border = before + tl.cdiv(tl.maximum(last - full_end, 0), BLOCK_M)
    blocks = tl.maximum(num_border, 1)
    for step in tl.range(0, members * num_border, num_stages=BORDER_STAGES):
        member = step // blocks
        border = step % blocks
        # Counted from `first`: `before * BLOCK_M` would stay live across the loop above, which at
        # D = 128 leaves no register free.
        row = first + border * BLOCK_M + tl.where(border < before, 0, num_full * BLOCK_M)
        dk, dv = _dkdv_block(
            k, v, dk, dv, q_ptr, dout_ptr, rows_ptr, delta_ptr, member, row, last, low, high,
            num_queries, stride_q, stride_q_head, stride_dout, stride_dout_head, scale_log2,
            BLOCK_M, DIM, PADDED, True,
        )  # fmt: skip
    mask = (keys < end_key)[:, None] & (tl.arange(0, PADDED)[None, :] < DIM)
    width = num_groups * DIM
    place = tl.cast(part, tl.int64) * stride_part + key_head * DIM
    dk_ptrs = block(dk_ptr + place, first_key, width, BLOCK_N, PADDED)
    dv_ptrs = block(dv_ptr + place, first_key, width, BLOCK_N, PADDED)
    # dk = scale * ds^T q and dv = p^T dout, or this part of them in fp32
    tl.store(dk_ptrs, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_parts_kernel(
    dk_parts_ptr,
    dv_parts_ptr,
    dk_ptr,
    dv_ptr,
    num_elements,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < num_elements
    dk = tl.load(dk_parts_ptr + at, mask=mask, other=0.0)
    dv = tl.load(dv_parts_ptr + at, mask=mask, other=0.0)
    # dk = sum_p dk_p in the order of the parts: equal bits in every run
    for part in tl.static_range(1, PARTS):
        dk += tl.load(dk_parts_ptr + part * num_elements + at, mask=mask, other=0.0)
        dv += tl.load(dv_parts_ptr + part * num_elements + at, mask=mask, other=0.0)
    tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=mask)


def add_parts(dk_parts: Tensor, dv_parts: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Sums of [parts, U, K, D] to [U, K, D], all contiguous, rounded once."""
    _add_parts_kernel[(ceil_div(dk.numel(), _ADDED),)](
        dk_parts,
        dv_parts,
        dk,
        dv,
        dk.numel(),
        PARTS=len(dk_parts),
        BLOCK=_ADDED,
        num_warps=4,
    )
