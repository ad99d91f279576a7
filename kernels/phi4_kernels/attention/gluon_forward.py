"""The Hopper forward kernel: one warp loads, two warpgroups multiply, and softmax hides in between.

A program holds 128 queries of one head at a time, 64 per consumer, and visits their keys from the
last block to the first, so that the masked blocks come first and the loop over the others has no
mask. While a consumer exponentiates the scores of one block, the tensor cores run its product of
the block before, and the other consumer's products: the two take turns to issue.
Source: Shah et al. 2024 (FlashAttention-3), sections 3.1 and 3.2.
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

from phi4_kernels.attention.gluon_tiles import TILE_COLUMNS

# Shape legend: M queries of a consumer, L keys of a block, C head dim rounded up to a power of two
# (the copy engine fills what is past the head with zeros). A ring is (buffers, full, empty): slots
# of shared memory, a barrier per slot that its bytes arrive at, and one that its readers arrive at.

ROWS = gl.constexpr(64)
"""Queries of a consumer: one warpgroup instruction."""
CONSUMERS = gl.constexpr(2)
_COLUMNS = gl.constexpr(TILE_COLUMNS)
_LN2 = gl.constexpr(0.6931471805599453)
_ZEROED_ROWS = gl.constexpr(8)
"""Rows that the producer cleans at a time: one period of the swizzle."""


@gluon.jit
def _item(turn):
    """The program's item of each turn; turns alternate in direction, which evens out the costs."""
    program, num_programs = gl.program_id(0), gl.num_programs(0)
    return turn * num_programs + gl.where(turn % 2 == 0, program, num_programs - 1 - program)


@gluon.jit
def _tile(tiles_ptr, tile, CAUSAL: gl.constexpr, KEYS: gl.constexpr):
    """A tile's queries and keys, its blocks of keys, and how many of those every query sees."""
    ptr = tiles_ptr + tile * _COLUMNS
    row, num_rows = gl.load(ptr), gl.load(ptr + 1)
    key, num_keys = gl.load(ptr + 2), gl.load(ptr + 3)
    diagonal = gl.load(ptr + 4)
    seen_by_first, seen_by_last = num_keys, num_keys
    if CAUSAL:
        seen_by_first = gl.maximum(gl.minimum(num_keys, diagonal + 1), 0)
        seen_by_last = gl.maximum(gl.minimum(num_keys, diagonal + num_rows), 0)
    blocks, free = gl.cdiv(seen_by_last, KEYS), seen_by_first // KEYS
    return row, num_rows, key, num_keys, diagonal, blocks, free


@gluon.jit
def _fill(ring, count, desc, head, row, STAGES: gl.constexpr):
    """Load rows into the ring's next slot as soon as its readers have left it."""
    buffers, full, empty = ring
    slot = count % STAGES
    mbarrier.wait(empty.index(slot), (count // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [head, row, 0], full.index(slot), buffers.index(slot))


@gluon.jit
def _fill_in_part(
    ring, count, loaded, loads, desc, head, row, num_rows, KEYS: gl.constexpr, STAGES: gl.constexpr
):
    """As _fill, with zeros after `num_rows`: what lies there may be NaN, and 0 * NaN is NaN."""
    buffers, full, empty = ring
    slot = count % STAGES
    COLS: gl.constexpr = desc.block_type.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLS, COLS // 8], [1, 1], [1, 0])
    mbarrier.wait(empty.index(slot), (count // STAGES & 1) ^ 1)
    mbarrier.expect(loaded, desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [head, row, 0], loaded, buffers.index(slot))
    mbarrier.wait(loaded, loads & 1)
    block = buffers.index(slot).reshape([KEYS, COLS])
    for part in gl.static_range(KEYS // _ZEROED_ROWS):
        if num_rows < (part + 1) * _ZEROED_ROWS:
            piece = block.slice(part * _ZEROED_ROWS, _ZEROED_ROWS)
            rows = part * _ZEROED_ROWS + gl.arange(0, _ZEROED_ROWS, gl.SliceLayout(1, layout))
            values = piece.load(layout)
            piece.store(gl.where((rows < num_rows)[:, None], values, 0.0).to(values.dtype))
    fence_async_shared()
    mbarrier.arrive(full.index(slot), count=1)


@gluon.jit
def _produce(
    inputs,
    work,
    group,
    rings,
    v_loaded,
    CAUSAL: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The loading warp."""
    q_desc, k_desc, v_desc = inputs
    tiles_ptr, num_items, num_heads = work
    q_ring, k_ring, v_ring = rings
    q_buffers, q_full, q_empty = q_ring
    visits, count, loads = 0, 0, 0
    for turn in range(gl.cdiv(num_items, gl.num_programs(0))):
        item = _item(turn)
        if item < num_items:
            row, _, key, num_keys, _, blocks, _ = _tile(tiles_ptr, item // num_heads, CAUSAL, KEYS)
            head = item % num_heads
            if blocks > 0:
                for consumer in gl.static_range(CONSUMERS):
                    full = q_full.index(consumer)
                    mbarrier.wait(q_empty.index(consumer), (visits & 1) ^ 1)
                    mbarrier.expect(full, q_desc.block_type.nbytes)
                    rows = [head, row + consumer * ROWS, 0]
                    tma.async_copy_global_to_shared(q_desc, rows, full, q_buffers.index(consumer))
                visits += 1
            for step in range(blocks):
                start = (blocks - 1 - step) * KEYS
                at, k_head = key + start, head // group
                _fill(k_ring, count, k_desc, k_head, at, STAGES)
                if start + KEYS <= num_keys:
                    _fill(v_ring, count, v_desc, k_head, at, STAGES)
                else:
                    left = num_keys - start
                    _fill_in_part(
                        v_ring, count, v_loaded, loads, v_desc, k_head, at, left, KEYS, STAGES
                    )
                    loads += 1
                count += 1


@gluon.jit
def _wait_full(ring, count, STAGES: gl.constexpr):
    mbarrier.wait(ring[1].index(count % STAGES), count // STAGES & 1)


@gluon.jit
def _release(ring, count, STAGES: gl.constexpr):
    mbarrier.arrive(ring[2].index(count % STAGES), count=1)


@gluon.jit
def _block(ring, count, KEYS: gl.constexpr, STAGES: gl.constexpr):
    """[L, C], the slot of a block."""
    return ring[0].index(count % STAGES).reshape([KEYS, ring[0].shape[3]])


@gluon.jit
def _take_turn(turns, count, CONSUMER: gl.constexpr):
    """Wait until the other consumer has issued its products; the first starts."""
    mbarrier.wait(turns.index(CONSUMER), (count & 1) ^ (1 - CONSUMER))


@gluon.jit
def _pass_turn(turns, CONSUMER: gl.constexpr):
    mbarrier.arrive(turns.index(1 - CONSUMER), count=1)


@gluon.jit
def _issue_scores(q, k_ring, count, KEYS: gl.constexpr, STAGES: gl.constexpr, layout: gl.constexpr):
    """q k^T of a block, [M, L], in flight."""
    k = _block(k_ring, count, KEYS, STAGES)
    zeros = gl.zeros([ROWS, KEYS], gl.float32, layout)
    return warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _softmax(
    s_ML, top, total, scale, start, limits, MASKED: gl.constexpr, KEYS: gl.constexpr, layout
):
    """exp2(scale * s - top), the decay of what was summed under the old top, the new top and total.

    A row that has seen no key keeps a top of -inf, total 0 and probabilities 0.
    """
    if MASKED:
        keys = start + gl.arange(0, KEYS, gl.SliceLayout(0, layout))
        s_ML = gl.where(keys[None, :] < limits[:, None], s_ML, float("-inf"))
    new_top = gl.maximum(top, gl.max(s_ML, 1) * scale)
    shift = new_top
    if MASKED:
        shift = gl.where(new_top == float("-inf"), 0.0, new_top)
    p_ML = gl.exp2(s_ML * scale - shift[:, None])
    decay = gl.exp2(top - shift)
    return p_ML, decay, new_top, total * decay + gl.sum(p_ML, 1)


@gluon.jit
def _step(
    q,
    p_ML,
    acc_MC,
    top,
    total,
    limits,
    scale,
    start,
    count,
    rings,
    turns,
    CONSUMER: gl.constexpr,
    MASKED: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    layouts: gl.constexpr,
):
    """Scores of block `count` beside the product of the probabilities of the block before."""
    _, k_ring, v_ring = rings
    s_layout: gl.constexpr = layouts[0]
    o_layout: gl.constexpr = layouts[1]
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    _wait_full(k_ring, count, STAGES)
    _take_turn(turns, count, CONSUMER)
    s_ML = _issue_scores(q, k_ring, count, KEYS, STAGES, s_layout)
    _wait_full(v_ring, count - 1, STAGES)
    v = _block(v_ring, count - 1, KEYS, STAGES)
    acc_MC = warpgroup_mma(p_ML, v, acc_MC, is_async=True)
    _pass_turn(turns, CONSUMER)
    s_ML = warpgroup_mma_wait(1, deps=(s_ML,))
    _release(k_ring, count, STAGES)
    new_p, decay, top, total = _softmax(
        s_ML, top, total, scale, start, limits, MASKED, KEYS, s_layout
    )
    new_p = gl.convert_layout(new_p.to(q.dtype), p_layout)
    # ptxas schedules within a basic block and would sink the exponentials below the wait for the
    # product that they should hide behind. This wait has long been satisfied; it ends the block.
    _wait_full(v_ring, count - 1, STAGES)
    acc_MC, p_ML = warpgroup_mma_wait(0, deps=(acc_MC, p_ML))
    _release(v_ring, count - 1, STAGES)
    acc_MC = acc_MC * gl.convert_layout(decay, gl.SliceLayout(1, o_layout))[:, None]
    return new_p, acc_MC, top, total


@gluon.jit
def _attend(
    q,
    acc_MC,
    limits,
    scale,
    count,
    blocks,
    free,
    rings,
    turns,
    CONSUMER: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    layouts: gl.constexpr,
):
    """A consumer's queries over all blocks of a tile: unnormalised output, top, total."""
    q_ring, k_ring, v_ring = rings
    s_layout: gl.constexpr = layouts[0]
    p_layout: gl.constexpr = gl.DotOperandLayout(0, layouts[1], 2)
    top = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
    total = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, s_layout))
    _wait_full(k_ring, count, STAGES)
    _take_turn(turns, count, CONSUMER)
    s_ML = _issue_scores(q, k_ring, count, KEYS, STAGES, s_layout)
    _pass_turn(turns, CONSUMER)
    s_ML = warpgroup_mma_wait(0, deps=(s_ML,))
    _release(k_ring, count, STAGES)
    start = (blocks - 1) * KEYS
    p_ML, _, top, total = _softmax(s_ML, top, total, scale, start, limits, True, KEYS, s_layout)
    p_ML = gl.convert_layout(p_ML.to(q.dtype), p_layout)
    masked = gl.maximum(blocks - free, 1)
    for step in range(1, masked):
        start = (blocks - 1 - step) * KEYS
        p_ML, acc_MC, top, total = _step(
            q, p_ML, acc_MC, top, total, limits, scale, start, count + step, rings, turns,
            CONSUMER, True, KEYS, STAGES, layouts,
        )  # fmt: skip
    for step in range(masked, blocks):
        p_ML, acc_MC, top, total = _step(
            q, p_ML, acc_MC, top, total, limits, scale, 0, count + step, rings, turns,
            CONSUMER, False, KEYS, STAGES, layouts,
        )  # fmt: skip
    mbarrier.arrive(q_ring[2].index(CONSUMER), count=1)
    last = count + blocks - 1
    _wait_full(v_ring, last, STAGES)
    v = _block(v_ring, last, KEYS, STAGES)
    acc_MC = warpgroup_mma(p_ML, v, acc_MC, is_async=True)
    acc_MC, p_ML = warpgroup_mma_wait(0, deps=(acc_MC, p_ML))
    _release(v_ring, last, STAGES)
    return acc_MC, top, total


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
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A multiplying warpgroup: its 64 queries of every tile that the program visits."""
    out_ptr, lse_ptr = outputs
    tiles_ptr, num_items, num_heads = work
    q_buffers, q_full = rings[0][0], rings[0][1]
    COLS: gl.constexpr = q_buffers.shape[3]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    out_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLS, COLS // 8], [4, 1], [1, 0])
    own = CONSUMER * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
    out_own = CONSUMER * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, out_layout))
    cols = gl.arange(0, COLS, gl.SliceLayout(0, out_layout))
    visits, count = 0, 0
    for turn in range(gl.cdiv(num_items, gl.num_programs(0))):
        item = _item(turn)
        if item < num_items:
            row, num_rows, _, num_keys, diagonal, blocks, free = _tile(
                tiles_ptr, item // num_heads, CAUSAL, KEYS
            )
            head = item % num_heads
            acc_MC = gl.zeros([ROWS, COLS], gl.float32, o_layout)
            top = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
            total = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, s_layout))
            if blocks > 0:
                limits = num_keys + gl.zeros_like(own)
                if CAUSAL:
                    limits = gl.minimum(limits, diagonal + own + 1)
                mbarrier.wait(q_full.index(CONSUMER), visits & 1)
                q = q_buffers.index(CONSUMER).reshape([ROWS, COLS])
                acc_MC, top, total = _attend(
                    q, acc_MC, limits, scale, count, blocks, free, rings, turns,
                    CONSUMER, KEYS, STAGES, (s_layout, o_layout),
                )  # fmt: skip
                visits += 1
                count += blocks
            divisor = gl.where(total == 0.0, 1.0, total)
            lse = gl.where(total == 0.0, float("-inf"), (top + gl.log2(divisor)) * _LN2)
            line = (row + own).to(gl.int64) * num_heads + head
            gl.store(lse_ptr + line, lse, mask=own < num_rows)
            out_MC = acc_MC / gl.convert_layout(divisor, gl.SliceLayout(1, o_layout))[:, None]
            out_MC = gl.convert_layout(out_MC.to(q_buffers.dtype), out_layout)
            line = ((row + out_own).to(gl.int64) * num_heads + head) * HEAD_DIM
            inside = (out_own < num_rows)[:, None] & (cols < HEAD_DIM)[None, :]
            gl.store(out_ptr + line[:, None] + cols[None, :], out_MC, mask=inside)


@gluon.jit
def _ring(desc, SLOTS: gl.constexpr, READERS: gl.constexpr):
    """An empty ring of blocks of a descriptor."""
    ROWS_OF_BLOCK: gl.constexpr = desc.block_type.shape[1]
    COLS: gl.constexpr = desc.block_type.shape[2]
    shape: gl.constexpr = [SLOTS, 1, ROWS_OF_BLOCK, COLS]
    buffers = gl.allocate_shared_memory(desc.dtype, shape, desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=READERS)
    return buffers, full, empty


@gluon.jit
def attention_forward_kernel(
    q_desc,
    k_desc,
    v_desc,
    out_ptr,
    lse_ptr,
    tiles_ptr,
    num_items,
    num_heads,
    group,
    scale,
    HEAD_DIM: gl.constexpr,
    CAUSAL: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """Persistent: each program takes its share of num_items = tiles * heads, heads innermost.

    Args: descriptors of q [N, T, D] and k, v [K, U, D]; out [T, N, D] and lse [T, N], contiguous;
    tiles as gluon_tiles.tiles makes them; scale in units of log2.
    """
    q_ring = _ring(q_desc, CONSUMERS, 1)
    k_ring = _ring(k_desc, STAGES, CONSUMERS)
    v_ring = _ring(v_desc, STAGES, CONSUMERS)
    rings = (q_ring, k_ring, v_ring)
    v_loaded = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(v_loaded, count=1)
    for consumer in gl.static_range(CONSUMERS):
        mbarrier.init(turns.index(consumer), count=1)
    fence_async_shared()
    work = (tiles_ptr, num_items, num_heads)
    outputs, inputs = (out_ptr, lse_ptr), (q_desc, k_desc, v_desc)
    gl.warp_specialize(
        [
            (_consume, (outputs, work, scale, rings, turns, 0, HEAD_DIM, CAUSAL, KEYS, STAGES)),
            (_consume, (outputs, work, scale, rings, turns, 1, HEAD_DIM, CAUSAL, KEYS, STAGES)),
            (_produce, (inputs, work, group, rings, v_loaded, CAUSAL, KEYS, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
