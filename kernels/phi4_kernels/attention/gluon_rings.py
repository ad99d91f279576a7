"""Common code of the Hopper kernels: ring buffers between one producer warp and two consumers.

A ring is (buffers, full, empty): slots, and per slot a barrier that tracks arriving bytes and one
at which its readers arrive. Producer and consumers count blocks the same way; a block's slot and
the phases of its barriers follow from its number.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from phi4_kernels.attention.gluon_tiles import TILE_COLUMNS

ROWS = gl.constexpr(64)
"""Tokens of a consumer: the rows of one warpgroup instruction."""
CONSUMERS = gl.constexpr(2)
SIZES = (
    "num_items",
    "num_turns",
    "num_programs",
    "num_heads",
    "num_key_heads",
    "group",
    "row_stride",
)
"""Kernel arguments that change between batches and must not be specialised on."""
_COLUMNS = gl.constexpr(TILE_COLUMNS)
_ZEROED_ROWS = gl.constexpr(8)
_ZEROED_COLS = gl.constexpr(64)
"""Rows that the producer zeroes at a time: one period of the swizzle."""


@gluon.jit
def item_of_turn(turn, num_programs):
    """The program's item of each turn; turns alternate in direction, which evens out the costs."""
    program = gl.program_id(0)
    # Turn 0 assigns items 0, 1, ..., turn 1 the next ones in reverse, as costs are descending.
    return turn * num_programs + gl.where(turn % 2 == 0, program, num_programs - 1 - program)


@gluon.jit
def load_tile(tiles_ptr, tile):
    """First token, tokens, first token of the other side, tokens of it, offset; see gluon_tiles."""
    # The row of the tile in the table of gluon_tiles, column by column.
    ptr = tiles_ptr + tile * _COLUMNS
    row, num_rows, offset = gl.load(ptr), gl.load(ptr + 1), gl.load(ptr + 4)
    return row, num_rows, gl.load(ptr + 2), gl.load(ptr + 3), offset


@gluon.jit
def load_shift(tiles_ptr, tile):
    """From a query of the tile's range to its place in the rows of lse and delta."""
    return gl.load(tiles_ptr + tile * _COLUMNS + 5)


@gluon.jit
def blocks_of_keys(num_rows, num_keys, offset, CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr):
    """Blocks of keys that a tile of queries visits, and how many of them every query sees."""
    seen_by_first, seen_by_last = num_keys, num_keys
    if CAUSAL:
        # Query i of the tile sees min(num_keys, offset + i + 1) keys, the first query the fewest.
        seen_by_first = gl.maximum(gl.minimum(num_keys, offset + 1), 0)
        seen_by_last = gl.maximum(gl.minimum(num_keys, offset + num_rows), 0)
    # Blocks that the last query sees in part or in full; blocks that the first one sees in full.
    return gl.cdiv(seen_by_last, BLOCK_N), seen_by_first // BLOCK_N


@gluon.jit
def make_ring(desc, SLOTS: gl.constexpr, READERS: gl.constexpr):
    """An empty ring of a descriptor's blocks."""
    LENGTH: gl.constexpr = desc.block_type.shape[1]
    COLS: gl.constexpr = desc.block_type.shape[2]
    shape: gl.constexpr = [SLOTS, 1, LENGTH, COLS]
    buffers = gl.allocate_shared_memory(desc.dtype, shape, desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        # `full`: one arrival, the producer's, and the bytes it announced. `empty`: one per reader.
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=READERS)
    return buffers, full, empty


@gluon.jit
def make_barrier():
    """A barrier of one arrival."""
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier, count=1)
    return barrier


@gluon.jit
def wait_full(ring, count, STAGES: gl.constexpr):
    """Wait until block `count` has been loaded."""
    # Block n is use n // STAGES of slot n % STAGES; a barrier's phase is the parity of its uses.
    mbarrier.wait(ring[1].index(count % STAGES), count // STAGES & 1)


@gluon.jit
def release(ring, count, STAGES: gl.constexpr):
    """Release the slot of block `count` to the producer."""
    mbarrier.arrive(ring[2].index(count % STAGES), count=1)


@gluon.jit
def release_loaded(ring, count, STAGES: gl.constexpr):
    """As release, for a block that was loaded into registers: the copy engine, which writes the
    next block, is not ordered with ordinary loads by the barrier alone."""
    fence_async_shared()
    release(ring, count, STAGES)


@gluon.jit
def block_of(ring, count, STAGES: gl.constexpr):
    """Block `count`, as a matrix."""
    buffers = ring[0]
    return buffers.index(count % STAGES).reshape([buffers.shape[2], buffers.shape[3]])


@gluon.jit
def fill(ring, count, desc, head, row, STAGES: gl.constexpr):
    """Load rows into the ring's next slot as soon as its readers have left it."""
    buffers, full, empty = ring
    slot = count % STAGES
    # The parity before: a slot that was never used counts as released. Then bytes are announced
    # before they can arrive; past the tensor's end the engine writes zeros.
    mbarrier.wait(empty.index(slot), (count // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [head, row, 0], full.index(slot), buffers.index(slot))


@gluon.jit
def fill_in_part(ring, count, loaded, loads, desc, head, row, num_rows, STAGES: gl.constexpr):
    """As fill, with zeros after `num_rows`: memory there may be NaN, and 0 * NaN is NaN.

    Args: `loaded` is a barrier of the producer's own, which has seen `loads` such loads.
    """
    buffers, full, empty = ring
    slot = count % STAGES
    LENGTH: gl.constexpr = desc.block_type.shape[1]
    COLS: gl.constexpr = desc.block_type.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    mbarrier.wait(empty.index(slot), (count // STAGES & 1) ^ 1)
    # The bytes arrive at a barrier of the producer's, which zeroes rows before consumers see any.
    mbarrier.expect(loaded, desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [head, row, 0], loaded, buffers.index(slot))
    mbarrier.wait(loaded, loads & 1)
    block = buffers.index(slot).reshape([LENGTH, COLS])
    for part in gl.static_range(LENGTH // _ZEROED_ROWS):
        # Only pieces that reach past the last row are touched.
        if num_rows < (part + 1) * _ZEROED_ROWS:
            rows = part * _ZEROED_ROWS + gl.arange(0, _ZEROED_ROWS, gl.SliceLayout(1, layout))
            for panel in gl.static_range(COLS // _ZEROED_COLS):
                piece = block.slice(part * _ZEROED_ROWS, _ZEROED_ROWS)
                piece = piece.slice(panel * _ZEROED_COLS, _ZEROED_COLS, 1)
                values = piece.load(layout)
                piece.store(gl.where((rows < num_rows)[:, None], values, 0.0).to(values.dtype))
    # The consumers' products read through the asynchronous proxy, the zeros were ordinary stores.
    fence_async_shared()
    mbarrier.arrive(full.index(slot), count=1)


@gluon.jit
def take_turn(turns, count, CONSUMER: gl.constexpr):
    """Wait until the other consumer has issued its products; the first starts."""
    # The first wait of consumer 0 passes at once, that of consumer 1 waits for consumer 0.
    mbarrier.wait(turns.index(CONSUMER), (count & 1) ^ (1 - CONSUMER))


@gluon.jit
def pass_turn(turns, CONSUMER: gl.constexpr):
    """Let the other consumer issue its products."""
    mbarrier.arrive(turns.index(1 - CONSUMER), count=1)


@gluon.jit
def store_rows(out_ptr, x, row, num_rows, own, num_heads, head, HEAD_DIM: gl.constexpr):
    """Store a consumer's rows of [tokens, heads, HEAD_DIM]; `own` counts them from the tile's."""
    COLS: gl.constexpr = x.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLS, COLS // 8], [4, 1], [1, 0])
    # From the product's layout to rows: 16 bytes of a row per thread, side by side.
    x = gl.convert_layout(x, layout)
    rows = own + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    cols = gl.arange(0, COLS, gl.SliceLayout(0, layout))
    # Offsets in [tokens, heads, HEAD_DIM] can exceed 32 bits.
    line = ((row + rows).to(gl.int64) * num_heads + head) * HEAD_DIM
    inside = (rows < num_rows)[:, None] & (cols < HEAD_DIM)[None, :]
    gl.store(out_ptr + line[:, None] + cols[None, :], x, mask=inside)
