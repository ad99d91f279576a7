"""The Hopper kernel of dq: structured like the forward kernel, three products, sums in registers.

Score gradients are the left operand of the third product and never leave registers. Each consumer
also writes lse in powers of 2 and delta, the part of a query's score gradients that all its keys
share; the kernel of dk and dv, which runs next, reads them.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from phi4_kernels.attention.gluon_rings import (
    CONSUMERS,
    ROWS,
    SIZES,
    block_of,
    blocks_of_keys,
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

# Shape legend: M queries of a consumer, L keys of a block, C head dim rounded up to a power of two.

_LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _produce(
    inputs,
    work,
    group,
    rings,
    k_loaded,
    CAUSAL: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The producer warp, which loads."""
    q_desc, dout_desc, k_desc, v_desc = inputs
    tiles_ptr, num_items, num_turns, num_programs, num_heads = work
    q_ring, dout_ring, k_ring, v_ring = rings
    # Blocks of queries and of keys, and partial loads so far; slots and phases follow from them.
    visits, count, loads = 0, 0, 0
    for turn in range(num_turns):
        item = item_of_turn(turn, num_programs)
        if item < num_items:
            tile = item // num_heads
            row, num_rows, key, num_keys, offset = load_tile(tiles_ptr, tile)
            blocks, _ = blocks_of_keys(num_rows, num_keys, offset, CAUSAL, BLOCK_N)
            head = item % num_heads
            if blocks > 0:
                for consumer in gl.static_range(CONSUMERS):
                    at = row + consumer * ROWS
                    fill(q_ring, visits, q_desc, head, at, CONSUMERS)
                    fill(dout_ring, visits, dout_desc, head, at, CONSUMERS)
                    visits += 1
            for step in range(blocks):
                # The order of the forward kernel; any order would work, as no sum is rescaled here.
                start = (blocks - 1 - step) * BLOCK_N
                at, k_head = key + start, head // group
                # Keys are an operand of ds k, where ds = 0 past the range: zeros instead of what
                # may be NaN. Values only make dp, which the mask replaces.
                if start + BLOCK_N <= num_keys:
                    fill(k_ring, count, k_desc, k_head, at, STAGES)
                else:
                    left = num_keys - start
                    fill_in_part(k_ring, count, k_loaded, loads, k_desc, k_head, at, left, STAGES)
                    loads += 1
                fill(v_ring, count, v_desc, k_head, at, STAGES)
                count += 1


@gluon.jit
def _step(
    q,
    dout,
    dq_MC,
    lse2,
    delta,
    limits,
    scale_log2,
    start,
    count,
    rings,
    MASKED: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    layouts: gl.constexpr,
):
    """Add block `count` to dq."""
    k_ring, v_ring = rings[2], rings[3]
    s_layout: gl.constexpr = layouts[0]
    ds_layout: gl.constexpr = gl.DotOperandLayout(0, layouts[1], 2)
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    wait_full(k_ring, count, STAGES)
    k = block_of(k_ring, count, STAGES)
    # s = q k^T
    s_ML = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    wait_full(v_ring, count, STAGES)
    v = block_of(v_ring, count, STAGES)
    # dp = dout v^T, while p is computed
    dp_ML = warpgroup_mma(dout, v.permute((1, 0)), zeros, use_acc=False, is_async=True)
    s_ML = warpgroup_mma_wait(1, deps=(s_ML,))
    # p = exp2(s * scale * log2(e) - lse2)
    p_ML = gl.exp2(s_ML * scale_log2 - lse2[:, None])
    # Ends a basic block, as in the forward kernel: the exponentials overlap the second product.
    wait_full(v_ring, count, STAGES)
    dp_ML = warpgroup_mma_wait(0, deps=(dp_ML,))
    release(v_ring, count, STAGES)
    # ds = p * (dp - delta), softmax's gradient
    ds_ML = p_ML * (dp_ML - delta[:, None])
    if MASKED:
        keys = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
        # Masked last: p of a key past a query's bounds may be infinite.
        ds_ML = gl.where(keys[None, :] < limits[:, None], ds_ML, 0.0)
    ds_ML = gl.convert_layout(ds_ML.to(q.dtype), ds_layout)
    # dq += ds k; the scale of s is applied once, to the sum
    dq_MC = warpgroup_mma(ds_ML, k, dq_MC, is_async=True)
    dq_MC, ds_ML = warpgroup_mma_wait(0, deps=(dq_MC, ds_ML))
    release(k_ring, count, STAGES)
    return dq_MC


@gluon.jit
def _prepare(dout, row_ptrs, row, num_rows, shift, head, sizes, CONSUMER: gl.constexpr, layout):
    """lse in powers of 2 and delta of a consumer's queries; both are stored as [N, places] too."""
    out_ptr, lse_ptr, lse2_ptr, delta_ptr = row_ptrs
    num_heads, row_stride, HEAD_DIM = sizes
    COLS: gl.constexpr = dout.shape[1]
    # out is read by rows, 16 bytes per thread; dout is in shared memory, in any layout.
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLS, COLS // 8], [4, 1], [1, 0])
    rows = CONSUMER * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, wide))
    cols = gl.arange(0, COLS, gl.SliceLayout(0, wide))
    line = (row + rows).to(gl.int64) * num_heads + head
    inside = (rows < num_rows)[:, None] & (cols < HEAD_DIM)[None, :]
    out_MC = gl.load(out_ptr + line[:, None] * HEAD_DIM + cols[None, :], mask=inside, other=0.0)
    # delta = sum_d dout_d * out_d, which equals sum_j p_j dp_j
    products = out_MC.to(gl.float32) * dout.load(wide).to(gl.float32)
    delta = gl.convert_layout(gl.sum(products, 1), layout)
    rows = CONSUMER * ROWS + gl.arange(0, ROWS, layout)
    line = (row + rows).to(gl.int64) * num_heads + head
    # lse2 = lse * log2(e)
    lse2 = gl.load(lse_ptr + line, mask=rows < num_rows, other=0.0) * _LOG2_E
    # Ranges start at addresses that the copy engine can read from: `shift` moves a query there.
    place = head.to(gl.int64) * row_stride + (row + shift) + rows
    gl.store(lse2_ptr + place, lse2, mask=rows < num_rows)
    gl.store(delta_ptr + place, delta, mask=rows < num_rows)
    return lse2, delta


@gluon.jit
def _consume(
    outputs,
    row_ptrs,
    work,
    scales,
    row_stride,
    rings,
    CONSUMER: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    CAUSAL: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A consumer warpgroup: its 64 queries of every tile that the program processes."""
    tiles_ptr, num_items, num_turns, num_programs, num_heads = work
    scale, scale_log2 = scales
    q_ring, dout_ring = rings[0], rings[1]
    COLS: gl.constexpr = q_ring[0].shape[3]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    own = CONSUMER * ROWS + gl.arange(0, ROWS, row_layout)
    # Slot of q and dout: consumer 0 takes the even blocks of queries, consumer 1 the odd ones.
    mine, count = CONSUMER, 0
    for turn in range(num_turns):
        item = item_of_turn(turn, num_programs)
        if item < num_items:
            tile = item // num_heads
            row, num_rows, _, num_keys, offset = load_tile(tiles_ptr, tile)
            blocks, free = blocks_of_keys(num_rows, num_keys, offset, CAUSAL, BLOCK_N)
            head = item % num_heads
            dq_MC = gl.zeros([ROWS, COLS], gl.float32, dq_layout)
            if blocks > 0:
                # Query i of the tile sees keys [0, min(num_keys, offset + i + 1)).
                limits = num_keys + gl.zeros_like(own)
                if CAUSAL:
                    limits = gl.minimum(limits, offset + own + 1)
                wait_full(dout_ring, mine, CONSUMERS)
                dout = block_of(dout_ring, mine, CONSUMERS)
                sizes = (num_heads, row_stride, HEAD_DIM)
                shift = load_shift(tiles_ptr, tile)
                lse2, delta = _prepare(
                    dout, row_ptrs, row, num_rows, shift, head, sizes, CONSUMER, row_layout
                )
                wait_full(q_ring, mine, CONSUMERS)
                q = block_of(q_ring, mine, CONSUMERS)
                # Masked blocks first, then `free` ones that every query sees.
                for step in range(blocks - free):
                    start = (blocks - 1 - step) * BLOCK_N
                    dq_MC = _step(
                        q, dout, dq_MC, lse2, delta, limits, scale_log2, start, count + step,
                        rings, True, BLOCK_N, STAGES, (s_layout, dq_layout),
                    )  # fmt: skip
                for step in range(blocks - free, blocks):
                    dq_MC = _step(
                        q, dout, dq_MC, lse2, delta, limits, scale_log2, 0, count + step,
                        rings, False, BLOCK_N, STAGES, (s_layout, dq_layout),
                    )  # fmt: skip
                release(q_ring, mine, CONSUMERS)
                release_loaded(dout_ring, mine, CONSUMERS)
                mine += CONSUMERS
                count += blocks
            # dq = scale * ds k
            dq_MC = (dq_MC * scale).to(q_ring[0].dtype)
            store_rows(outputs, dq_MC, row, num_rows, CONSUMER * ROWS, num_heads, head, HEAD_DIM)


@gluon.jit(do_not_specialize=SIZES)
def attention_dq_kernel(
    q_desc,
    dout_desc,
    k_desc,
    v_desc,
    dq_ptr,
    out_ptr,
    lse_ptr,
    lse2_ptr,
    delta_ptr,
    tiles_ptr,
    num_items,
    num_turns,
    num_programs,
    num_heads,
    group,
    row_stride,
    scale,
    scale_log2,
    HEAD_DIM: gl.constexpr,
    CAUSAL: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """Persistent: each program takes its share of num_items = tiles * heads, heads innermost.

    Args: as for the forward kernel, dout like q; out and lse of the forward pass, contiguous;
    lse2 and delta [N, row_stride] are written; dq [T, N, D], contiguous.
    """
    q_ring = make_ring(q_desc, CONSUMERS, 1)
    dout_ring = make_ring(dout_desc, CONSUMERS, 1)
    k_ring = make_ring(k_desc, STAGES, CONSUMERS)
    v_ring = make_ring(v_desc, STAGES, CONSUMERS)
    rings = (q_ring, dout_ring, k_ring, v_ring)
    k_loaded = make_barrier()
    fence_async_shared()
    work, scales = (tiles_ptr, num_items, num_turns, num_programs, num_heads), (scale, scale_log2)
    inputs, row_ptrs = (q_desc, dout_desc, k_desc, v_desc), (out_ptr, lse_ptr, lse2_ptr, delta_ptr)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    dq_ptr,
                    row_ptrs,
                    work,
                    scales,
                    row_stride,
                    rings,
                    0,
                    HEAD_DIM,
                    CAUSAL,
                    BLOCK_N,
                    STAGES,
                ),
            ),
            (
                _consume,
                (
                    dq_ptr,
                    row_ptrs,
                    work,
                    scales,
                    row_stride,
                    rings,
                    1,
                    HEAD_DIM,
                    CAUSAL,
                    BLOCK_N,
                    STAGES,
                ),
            ),
            (_produce, (inputs, work, group, rings, k_loaded, CAUSAL, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
