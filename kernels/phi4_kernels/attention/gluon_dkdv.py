"""The Hopper kernel of dk and dv: a tile of keys loops over all queries of its group's heads.

Scores are computed transposed, keys by queries: probabilities and score gradients are then left
operands of the products onto dv and dk and never leave registers. lse and delta come with the
queries' blocks, from the rows that the kernel of dq has written.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from phi4_kernels.attention.gluon_rings import (
    CONSUMERS,
    ROWS,
    SIZES,
    block_of,
    fill,
    fill_in_part,
    item_of_turn,
    load_shift,
    load_tile,
    make_barrier,
    make_ring,
    release,
    release_loaded,
    store_rows,
    wait_full,
)
from phi4_kernels.attention.gluon_tiles import ROW_ALIGNMENT

# Shape legend: L keys of a consumer, M queries of a block, C head dim rounded up to a power of two.

_ALIGNMENT = gl.constexpr(ROW_ALIGNMENT)


@gluon.jit
def _first_query(offset, CAUSAL: gl.constexpr):
    """The first query of a range that sees a key of the tile, or up to 3 before it: so that a block
    of its rows starts aligned, as the range does. The causal mask hides them."""
    if CAUSAL:
        return gl.maximum(offset, 0) // _ALIGNMENT * _ALIGNMENT
    else:
        return gl.minimum(offset, 0) * 0


@gluon.jit
def _fill_rows(ring, count, descs, head, row, STAGES: gl.constexpr):
    """lse and delta of a block of queries, [2, M]."""
    buffers, full, empty = ring
    slot = count % STAGES
    lse2_desc, delta_desc = descs
    mbarrier.wait(empty.index(slot), (count // STAGES & 1) ^ 1)
    # Two loads at one barrier: lse and delta of the same queries.
    mbarrier.expect(full.index(slot), 2 * lse2_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(
        lse2_desc, [head, row], full.index(slot), buffers.index(2 * slot)
    )
    tma.async_copy_global_to_shared(
        delta_desc, [head, row], full.index(slot), buffers.index(2 * slot + 1)
    )


@gluon.jit
def _produce(
    inputs,
    work,
    group,
    rings,
    loaded,
    CAUSAL: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The producer warp, which loads."""
    k_desc, v_desc, q_desc, dout_desc, lse2_desc, delta_desc = inputs
    tiles_ptr, num_items, num_turns, num_programs, num_key_heads = work
    k_ring, v_ring, q_ring, dout_ring, row_ring = rings
    # Blocks of keys and of queries, and partial loads so far; slots and phases follow from them.
    visits, count, loads = 0, 0, 0
    for turn in range(num_turns):
        item = item_of_turn(turn, num_programs)
        if item < num_items:
            tile = item // num_key_heads
            key, _, row, num_queries, offset = load_tile(tiles_ptr, tile)
            k_head = item % num_key_heads
            shift = load_shift(tiles_ptr, tile)
            first = _first_query(offset, CAUSAL)
            blocks = gl.cdiv(gl.maximum(num_queries - first, 0), BLOCK_M)
            if blocks > 0:
                for consumer in gl.static_range(CONSUMERS):
                    at = key + consumer * ROWS
                    fill(k_ring, visits, k_desc, k_head, at, CONSUMERS)
                    fill(v_ring, visits, v_desc, k_head, at, CONSUMERS)
                    visits += 1
            # GQA: the gradients of a key head are sums over the query heads of its group.
            for head in range(k_head * group, (k_head + 1) * group):
                for block in range(blocks):
                    start = first + block * BLOCK_M
                    at, left = row + start, num_queries - start
                    _fill_rows(row_ring, count, (lse2_desc, delta_desc), head, at + shift, STAGES)
                    # Past the range p and ds are 0, but q and dout may be NaN there, and 0 * NaN is
                    # NaN.
                    if left >= BLOCK_M:
                        fill(q_ring, count, q_desc, head, at, STAGES)
                        fill(dout_ring, count, dout_desc, head, at, STAGES)
                    else:
                        fill_in_part(q_ring, count, loaded, loads, q_desc, head, at, left, STAGES)
                        fill_in_part(
                            dout_ring, count, loaded, loads + 1, dout_desc, head, at, left, STAGES
                        )
                        loads += 2
                    count += 1


@gluon.jit
def _step(
    k,
    v,
    dk_LC,
    dv_LC,
    scale_log2,
    own,
    left,
    count,
    rings,
    CAUSAL: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    layouts: gl.constexpr,
):
    """Add block `count` of queries to dk and dv. Query m sees keys up to `own` <= m of the tile."""
    q_ring, dout_ring, row_ring = rings[2], rings[3], rings[4]
    s_layout: gl.constexpr = layouts[0]
    p_layout: gl.constexpr = gl.DotOperandLayout(0, layouts[1], 2)
    column_layout: gl.constexpr = gl.SliceLayout(0, s_layout)
    zeros = gl.zeros([ROWS, BLOCK_M], gl.float32, s_layout)
    queries = gl.arange(0, BLOCK_M, column_layout)
    wait_full(q_ring, count, STAGES)
    q = block_of(q_ring, count, STAGES)
    # s^T = k q^T
    s_LM = warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    wait_full(dout_ring, count, STAGES)
    dout = block_of(dout_ring, count, STAGES)
    # dp^T = v dout^T, while p is computed
    dp_LM = warpgroup_mma(v, dout.permute((1, 0)), zeros, use_acc=False, is_async=True)
    wait_full(row_ring, count, STAGES)
    rows, slot = row_ring[0], count % STAGES
    lse2 = rows.index(2 * slot).reshape([BLOCK_M]).load(column_layout)
    # Rows past the range are zeros, and take no part: exp2(0 - inf) is 0.
    lse2 = gl.where(queries < left, lse2, float("inf"))
    s_LM = warpgroup_mma_wait(1, deps=(s_LM,))
    # p^T = exp2(s^T * scale * log2(e) - lse2)
    p_LM = gl.exp2(s_LM * scale_log2 - lse2[None, :])
    if CAUSAL:
        p_LM = gl.where(own[:, None] <= queries[None, :], p_LM, 0.0)
    # dv += p^T dout
    left_LM = gl.convert_layout(p_LM.to(k.dtype), p_layout)
    dv_LC = warpgroup_mma(left_LM, dout, dv_LC, is_async=True)
    delta = rows.index(2 * slot + 1).reshape([BLOCK_M]).load(column_layout)
    delta = gl.where(queries < left, delta, 0.0)
    release_loaded(row_ring, count, STAGES)
    dp_LM = warpgroup_mma_wait(1, deps=(dp_LM,))
    # ds^T = p^T * (dp^T - delta), while dv is computed
    ds_LM = p_LM * (dp_LM - delta[None, :])
    ds_LM = gl.convert_layout(ds_LM.to(k.dtype), p_layout)
    # dk += ds^T q; scaled once, at the end
    dk_LC = warpgroup_mma(ds_LM, q, dk_LC, is_async=True)
    # All products but one are done: dv is, and dout can be overwritten; then dk and q.
    dv_LC, left_LM = warpgroup_mma_wait(1, deps=(dv_LC, left_LM))
    release(dout_ring, count, STAGES)
    dk_LC, ds_LM = warpgroup_mma_wait(0, deps=(dk_LC, ds_LM))
    release(q_ring, count, STAGES)
    return dk_LC, dv_LC


@gluon.jit
def _consume(
    outputs,
    work,
    group,
    scales,
    rings,
    CONSUMER: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    CAUSAL: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A consumer warpgroup: its 64 keys of every tile that the program processes."""
    dk_ptr, dv_ptr = outputs
    tiles_ptr, num_items, num_turns, num_programs, num_key_heads = work
    scale, scale_log2 = scales
    k_ring, v_ring = rings[0], rings[1]
    COLS: gl.constexpr = k_ring[0].shape[3]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    keys = CONSUMER * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
    # Slot of k and v: consumer 0 takes the even blocks of keys, consumer 1 the odd ones.
    mine, count = CONSUMER, 0
    for turn in range(num_turns):
        item = item_of_turn(turn, num_programs)
        if item < num_items:
            tile = item // num_key_heads
            _, _, _, num_queries, offset = load_tile(tiles_ptr, tile)
            k_head = item % num_key_heads
            first = _first_query(offset, CAUSAL)
            blocks = gl.cdiv(gl.maximum(num_queries - first, 0), BLOCK_M)
            dk_LC = gl.zeros([ROWS, COLS], gl.float32, dk_layout)
            dv_LC = gl.zeros([ROWS, COLS], gl.float32, dk_layout)
            if blocks > 0:
                wait_full(k_ring, mine, CONSUMERS)
                wait_full(v_ring, mine, CONSUMERS)
                k = block_of(k_ring, mine, CONSUMERS)
                v = block_of(v_ring, mine, CONSUMERS)
                for _ in range(group):
                    for block in range(blocks):
                        start = first + block * BLOCK_M
                        # Key l of the tile is seen by queries m with l + offset - start <= m.
                        dk_LC, dv_LC = _step(
                            k, v, dk_LC, dv_LC, scale_log2, keys + (offset - start),
                            num_queries - start, count, rings, CAUSAL, BLOCK_M, STAGES,
                            (s_layout, dk_layout),
                        )  # fmt: skip
                        count += 1
                release(k_ring, mine, CONSUMERS)
                release(v_ring, mine, CONSUMERS)
                mine += CONSUMERS
            # Read again rather than kept: the loop needs every register.
            key, num_keys, _, _, _ = load_tile(tiles_ptr, tile)
            dtype: gl.constexpr = k_ring[0].dtype
            at = CONSUMER * ROWS
            # dk = scale * ds^T q, dv = p^T dout
            dk_LC = (dk_LC * scale).to(dtype)
            store_rows(dk_ptr, dk_LC, key, num_keys, at, num_key_heads, k_head, HEAD_DIM)
            dv_LC = dv_LC.to(dtype)
            store_rows(dv_ptr, dv_LC, key, num_keys, at, num_key_heads, k_head, HEAD_DIM)


@gluon.jit
def _row_ring(desc, STAGES: gl.constexpr):
    """A ring whose slots are two buffers each, of lse and delta."""
    BLOCK_M: gl.constexpr = desc.block_type.shape[1]
    shape: gl.constexpr = [2 * STAGES, 1, BLOCK_M]
    buffers = gl.allocate_shared_memory(desc.dtype, shape, desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=CONSUMERS)
    return buffers, full, empty


@gluon.jit(do_not_specialize=SIZES)
def attention_dkdv_kernel(
    k_desc,
    v_desc,
    q_desc,
    dout_desc,
    lse2_desc,
    delta_desc,
    dk_ptr,
    dv_ptr,
    tiles_ptr,
    num_items,
    num_turns,
    num_programs,
    num_key_heads,
    group,
    scale,
    scale_log2,
    HEAD_DIM: gl.constexpr,
    CAUSAL: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """Persistent: each program takes its share of num_items = tiles * key heads, heads innermost.

    Args: descriptors of k, v [K, U, D], q, dout [N, T, D] and of the rows [N, places] that
    attention_dq_kernel wrote; tiles of keys; dk, dv [U, K, D], contiguous.
    """
    k_ring = make_ring(k_desc, CONSUMERS, 1)
    v_ring = make_ring(v_desc, CONSUMERS, 1)
    q_ring = make_ring(q_desc, STAGES, CONSUMERS)
    dout_ring = make_ring(dout_desc, STAGES, CONSUMERS)
    row_ring = _row_ring(lse2_desc, STAGES)
    rings = (k_ring, v_ring, q_ring, dout_ring, row_ring)
    loaded = make_barrier()
    fence_async_shared()
    inputs = (k_desc, v_desc, q_desc, dout_desc, lse2_desc, delta_desc)
    work, scales, outputs = (
        (tiles_ptr, num_items, num_turns, num_programs, num_key_heads),
        (scale, scale_log2),
        (dk_ptr, dv_ptr),
    )
    gl.warp_specialize(
        [
            (_consume, (outputs, work, group, scales, rings, 0, HEAD_DIM, CAUSAL, BLOCK_M, STAGES)),
            (_consume, (outputs, work, group, scales, rings, 1, HEAD_DIM, CAUSAL, BLOCK_M, STAGES)),
            (_produce, (inputs, work, group, rings, loaded, CAUSAL, BLOCK_M, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
