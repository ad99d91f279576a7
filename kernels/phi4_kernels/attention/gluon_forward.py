"""The Hopper forward kernel: one warp loads, two warpgroups multiply and overlap the softmax.

A program holds 128 queries of one head at a time, 64 per consumer, and processes their keys from
the last block to the first, so that the masked blocks come first and the loop over the others has
no mask. While a consumer exponentiates the scores of one block, the tensor cores run its product of
the previous block and the other consumer's products: the two take turns to issue.
Source: Shah et al. 2024 (FlashAttention-3), sections 3.1 and 3.2.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
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
    load_tile,
    make_barrier,
    make_ring,
    pass_turn,
    release,
    store_rows,
    take_turn,
    wait_full,
)

# Shape legend: M queries of a consumer, L keys of a block, C head dim rounded up to a power of two
# (the copy engine fills what is past the head with zeros).

_LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _produce(
    inputs,
    work,
    group,
    rings,
    v_loaded,
    CAUSAL: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The producer warp, which loads."""
    q_desc, k_desc, v_desc = inputs
    tiles_ptr, num_items, num_turns, num_programs, num_heads = work
    q_ring, k_ring, v_ring = rings
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
                # A slot for each consumer's 64 queries; the next tile's load while this one is
                # multiplied.
                for consumer in gl.static_range(CONSUMERS):
                    fill(q_ring, visits, q_desc, head, row + consumer * ROWS, CONSUMERS)
                    visits += 1
            for step in range(blocks):
                # From the last block to the first, as the consumers take them.
                start = (blocks - 1 - step) * BLOCK_N
                at, k_head = key + start, head // group
                # Keys past the range need no zeros: their scores are replaced by -inf.
                fill(k_ring, count, k_desc, k_head, at, STAGES)
                # Values do: p = 0 there, and 0 * NaN is NaN.
                if start + BLOCK_N <= num_keys:
                    fill(v_ring, count, v_desc, k_head, at, STAGES)
                else:
                    left = num_keys - start
                    fill_in_part(v_ring, count, v_loaded, loads, v_desc, k_head, at, left, STAGES)
                    loads += 1
                count += 1


@gluon.jit
def _issue_scores(
    q, k_ring, count, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, layout: gl.constexpr
):
    """q k^T of a block, [M, L], in flight."""
    # s = q k^T
    k = block_of(k_ring, count, STAGES)
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
    return warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _softmax(
    s_ML, m_i, l_i, scale, start, limits, MASKED: gl.constexpr, BLOCK_N: gl.constexpr, layout
):
    """p = exp2(scale * s - m'), alpha = exp2(m - m'), m' and l'.

    A row that has seen no key keeps m = -inf, l = 0 and probabilities of 0.
    """
    if MASKED:
        keys = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
        s_ML = gl.where(keys[None, :] < limits[:, None], s_ML, float("-inf"))
    # m' = max(m, max_j s_j * scale), where scale is scale * log2(e)
    m_new = gl.maximum(m_i, gl.max(s_ML, 1) * scale)
    shift = m_new
    if MASKED:
        shift = gl.where(m_new == float("-inf"), 0.0, m_new)
    # p_j = exp2(s_j * scale - m')
    p_ML = gl.exp2(s_ML * scale - shift[:, None])
    # alpha = exp2(m - m'), l' = l * alpha + sum_j p_j
    alpha = gl.exp2(m_i - shift)
    return p_ML, alpha, m_new, l_i * alpha + gl.sum(p_ML, 1)


@gluon.jit
def _step(
    q,
    p_ML,
    acc_MC,
    m_i,
    l_i,
    limits,
    scale,
    start,
    count,
    rings,
    turns,
    CONSUMER: gl.constexpr,
    MASKED: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    layouts: gl.constexpr,
):
    """Scores of block `count`, overlapped with the previous block's product of probabilities."""
    _, k_ring, v_ring = rings
    s_layout: gl.constexpr = layouts[0]
    o_layout: gl.constexpr = layouts[1]
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    wait_full(k_ring, count, STAGES)
    # The consumers alternate: while the products of one run, the other exponentiates.
    take_turn(turns, count, CONSUMER)
    s_ML = _issue_scores(q, k_ring, count, BLOCK_N, STAGES, s_layout)
    wait_full(v_ring, count - 1, STAGES)
    v = block_of(v_ring, count - 1, STAGES)
    # acc += p v of block count - 1, behind s of block `count` in the tensor cores' queue
    acc_MC = warpgroup_mma(p_ML, v, acc_MC, is_async=True)
    pass_turn(turns, CONSUMER)
    # All products but one are done: s is complete, acc may still be in flight.
    s_ML = warpgroup_mma_wait(1, deps=(s_ML,))
    release(k_ring, count, STAGES)
    new_p, alpha, m_i, l_i = _softmax(
        s_ML, m_i, l_i, scale, start, limits, MASKED, BLOCK_N, s_layout
    )
    new_p = gl.convert_layout(new_p.to(q.dtype), p_layout)
    # ptxas schedules within a basic block and would move the exponentials below the wait for the
    # product that they should overlap. This wait is already satisfied; it ends the block.
    wait_full(v_ring, count - 1, STAGES)
    acc_MC, p_ML = warpgroup_mma_wait(0, deps=(acc_MC, p_ML))
    release(v_ring, count - 1, STAGES)
    # acc' = acc * alpha: block `count` is added under the new maximum, in the next step
    acc_MC = acc_MC * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None]
    return new_p, acc_MC, m_i, l_i


@gluon.jit
def _attend(
    q,
    acc_MC,
    limits,
    scale,
    mine,
    count,
    blocks,
    free,
    rings,
    turns,
    CONSUMER: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    layouts: gl.constexpr,
):
    """A consumer's queries over all blocks of a tile: unnormalised output, m_i, l_i."""
    q_ring, k_ring, v_ring = rings
    s_layout: gl.constexpr = layouts[0]
    p_layout: gl.constexpr = gl.DotOperandLayout(0, layouts[1], 2)
    # The first block has no product before it.
    m_i = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
    l_i = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, s_layout))
    wait_full(k_ring, count, STAGES)
    take_turn(turns, count, CONSUMER)
    s_ML = _issue_scores(q, k_ring, count, BLOCK_N, STAGES, s_layout)
    pass_turn(turns, CONSUMER)
    s_ML = warpgroup_mma_wait(0, deps=(s_ML,))
    release(k_ring, count, STAGES)
    start = (blocks - 1) * BLOCK_N
    p_ML, _, m_i, l_i = _softmax(s_ML, m_i, l_i, scale, start, limits, True, BLOCK_N, s_layout)
    p_ML = gl.convert_layout(p_ML.to(q.dtype), p_layout)
    # Masked blocks, which come first, then `free` ones that every query sees.
    masked = gl.maximum(blocks - free, 1)
    for step in range(1, masked):
        start = (blocks - 1 - step) * BLOCK_N
        p_ML, acc_MC, m_i, l_i = _step(
            q, p_ML, acc_MC, m_i, l_i, limits, scale, start, count + step, rings, turns,
            CONSUMER, True, BLOCK_N, STAGES, layouts,
        )  # fmt: skip
    for step in range(masked, blocks):
        p_ML, acc_MC, m_i, l_i = _step(
            q, p_ML, acc_MC, m_i, l_i, limits, scale, 0, count + step, rings, turns,
            CONSUMER, False, BLOCK_N, STAGES, layouts,
        )  # fmt: skip
    release(q_ring, mine, CONSUMERS)
    # The product of the last block, which no step has issued.
    last = count + blocks - 1
    wait_full(v_ring, last, STAGES)
    v = block_of(v_ring, last, STAGES)
    acc_MC = warpgroup_mma(p_ML, v, acc_MC, is_async=True)
    acc_MC, p_ML = warpgroup_mma_wait(0, deps=(acc_MC, p_ML))
    release(v_ring, last, STAGES)
    return acc_MC, m_i, l_i


@gluon.jit
def _consume(
    outputs,
    work,
    scale,
    rings,
    turns,
    CONSUMER: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    CAUSAL: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A consumer warpgroup: its 64 queries of every tile that the program processes."""
    out_ptr, lse_ptr = outputs
    tiles_ptr, num_items, num_turns, num_programs, num_heads = work
    q_ring = rings[0]
    COLS: gl.constexpr = q_ring[0].shape[3]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    own = CONSUMER * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
    # Slot of q: consumer 0 takes the even blocks of queries, consumer 1 the odd ones.
    mine, count = CONSUMER, 0
    for turn in range(num_turns):
        item = item_of_turn(turn, num_programs)
        if item < num_items:
            tile = item // num_heads
            row, num_rows, _, num_keys, offset = load_tile(tiles_ptr, tile)
            blocks, free = blocks_of_keys(num_rows, num_keys, offset, CAUSAL, BLOCK_N)
            head = item % num_heads
            acc_MC = gl.zeros([ROWS, COLS], gl.float32, o_layout)
            m_i = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
            l_i = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, s_layout))
            if blocks > 0:
                # Query i of the tile sees keys [0, min(num_keys, offset + i + 1)).
                limits = num_keys + gl.zeros_like(own)
                if CAUSAL:
                    limits = gl.minimum(limits, offset + own + 1)
                wait_full(q_ring, mine, CONSUMERS)
                q = block_of(q_ring, mine, CONSUMERS)
                acc_MC, m_i, l_i = _attend(
                    q, acc_MC, limits, scale, mine, count, blocks, free, rings, turns,
                    CONSUMER, BLOCK_N, STAGES, (s_layout, o_layout),
                )  # fmt: skip
                mine += CONSUMERS
                count += blocks
            # out = acc / l, lse = (m + log2(l)) * ln(2); 0 and -inf for a query that sees no key
            divisor = gl.where(l_i == 0.0, 1.0, l_i)
            lse = gl.where(l_i == 0.0, float("-inf"), (m_i + gl.log2(divisor)) * _LN2)
            line = (row + own).to(gl.int64) * num_heads + head
            gl.store(lse_ptr + line, lse, mask=own < num_rows)
            out_MC = acc_MC / gl.convert_layout(divisor, gl.SliceLayout(1, o_layout))[:, None]
            out_MC = out_MC.to(q_ring[0].dtype)
            at = CONSUMER * ROWS
            store_rows(out_ptr, out_MC, row, num_rows, at, num_heads, head, HEAD_DIM)


@gluon.jit(do_not_specialize=SIZES)
def attention_forward_kernel(
    q_desc,
    k_desc,
    v_desc,
    out_ptr,
    lse_ptr,
    tiles_ptr,
    num_items,
    num_turns,
    num_programs,
    num_heads,
    group,
    scale,
    HEAD_DIM: gl.constexpr,
    CAUSAL: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """Persistent: each program takes its share of num_items = tiles * heads, heads innermost.

    Args: descriptors of q [N, T, D] and k, v [K, U, D]; out [T, N, D] and lse [T, N], contiguous;
    tiles as gluon_tiles.tiles makes them; scale in units of log2.
    """
    q_ring = make_ring(q_desc, CONSUMERS, 1)
    k_ring = make_ring(k_desc, STAGES, CONSUMERS)
    v_ring = make_ring(v_desc, STAGES, CONSUMERS)
    rings = (q_ring, k_ring, v_ring)
    v_loaded = make_barrier()
    # One barrier per consumer: which one issues its products next.
    turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for consumer in gl.static_range(CONSUMERS):
        mbarrier.init(turns.index(consumer), count=1)
    fence_async_shared()
    work = (tiles_ptr, num_items, num_turns, num_programs, num_heads)
    outputs, inputs = (out_ptr, lse_ptr), (q_desc, k_desc, v_desc)
    gl.warp_specialize(
        [
            (_consume, (outputs, work, scale, rings, turns, 0, HEAD_DIM, CAUSAL, BLOCK_N, STAGES)),
            (_consume, (outputs, work, scale, rings, turns, 1, HEAD_DIM, CAUSAL, BLOCK_N, STAGES)),
            (_produce, (inputs, work, group, rings, v_loaded, CAUSAL, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
