"""Cuts tokens into tiles, and computes which tokens of the other side each token sees.

A tile is a span of packed tokens. Ranges of at least a tile's length start a tile of their own, so
that no tile extends into a long neighbour; shorter ranges share tiles, so that a thousand documents
of one token cost as much as one document of a thousand tokens. Attention is correct for any choice
of tiles, because each token has its own bounds.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from phi4_kernels.launch import Launch, ceil_div

_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Tile(Launch):
    """`rows` tokens of a program's own side, `block` tokens of the other side at a time."""

    num_stages: int = 2
    """Blocks in flight."""
    border_stages: int = 1
    """The same for the masked blocks of dk and dv, whose pipeline also needs registers."""
    most_programs: int = 0
    """For dk and dv: groups are split up to this many programs in all; see
    triton_dkdv.num_parts."""


class Tiles(NamedTuple):
    """One side's tokens, cut into tiles."""

    starts: Tensor
    """[limit + 2], int32: the number of tiles, the first token of each, the number of tokens."""
    lows: Tensor
    """[tokens], int32: first token of the other side that each token sees."""
    highs: Tensor
    """[tokens], int32: one past the last; tokens that see none have 0 and 0."""
    limit: int
    """Upper bound of the number of tiles."""


@triton.jit
def block(ptr, first, stride, ROWS: tl.constexpr, PADDED: tl.constexpr):
    """Pointers of rows [first, first + ROWS): only the first row's offset needs 64 bits."""
    # Row r, column d: first * stride + r * stride + d
    offsets = tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, PADDED)[None, :]
    return ptr + tl.cast(first, tl.int64) * stride + offsets


@triton.jit
def load(
    ptr,
    first,
    end,
    stride,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Rows [first, first + ROWS) of a [tokens, D] view; zeros from `end` on, where MASKED."""
    pointers = block(ptr, first, stride, ROWS, PADDED)
    in_dim = tl.arange(0, PADDED)[None, :] < DIM
    if MASKED:
        return tl.load(
            pointers, mask=(first + tl.arange(0, ROWS)[:, None] < end) & in_dim, other=0.0
        )
    elif DIM < PADDED:
        return tl.load(pointers, mask=in_dim, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_rows(
    ptr, first, kept, stride, ROWS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr
):
    """Rows [first, first + ROWS) of a [tokens, D] view; zeros where not `kept`."""
    mask = kept[:, None] & (tl.arange(0, PADDED)[None, :] < DIM)
    return tl.load(block(ptr, first, stride, ROWS, PADDED), mask=mask, other=0.0)


@triton.jit
def finite(x):
    """`x` with zeros for infinities and NaN, because even a weight of 0 times those is NaN."""
    # NaN compares false, too.
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0)


@triton.jit
def row_marks(x):
    """[rows]: 0, or NaN where a row holds an infinity or NaN."""
    # inf * 0 and NaN * 0 are NaN, anything else is 0.
    return tl.sum(x.to(tl.float32) * 0.0, 1)


@triton.jit
def span(lows_ptr, highs_ptr, tokens, end, BLOCK: tl.constexpr):
    """The tokens of the other side that a tile sees.

    Returns:
        low, high: bounds of each token; 0, 0 from `end` on.
        first, last: the span that any token sees.
        full, full_end: within it, whole blocks that every token sees.
    """
    is_own = tokens < end
    low = tl.load(lows_ptr + tokens, mask=is_own, other=0)
    high = tl.load(highs_ptr + tokens, mask=is_own, other=0)
    # Bounds of the span: min_i low_i over the tokens that see any, and max_i high_i
    last = tl.max(high, 0)
    first = tl.minimum(tl.min(tl.where(low < high, low, 2147483647), 0), last)
    # Blocks count from `first`. The first full one starts at or after max_i low_i, the last ends at
    # or before min_i high_i: every token sees all of both.
    full = first + tl.cdiv(tl.max(low, 0) - first, BLOCK) * BLOCK
    seen_by_all = tl.min(tl.where(is_own, high, 2147483647), 0)
    full_end = full + tl.maximum(seen_by_all - full, 0) // BLOCK * BLOCK
    return low, high, first, last, full, full_end


@triton.jit
def count(edges_ptr, tokens, num_ranges, steps, STRICT: tl.constexpr):
    """Number of the ascending edges that are <= each token, or < it."""
    # Bisection: edges[low - 1] is before the token, edges[high] is not.
    low = tokens * 0
    high = low + num_ranges
    for _ in range(steps):
        middle = (low + high) // 2
        edge = tl.load(edges_ptr + middle, mask=low < high, other=0)
        is_before = edge < tokens if STRICT else edge <= tokens
        is_before = is_before & (low < high)
        low = tl.where(is_before, middle + 1, low)
        high = tl.where(is_before, high, middle)
    return low


@triton.jit
def _long_range(starts_ptr, ends_ptr, tokens, num_ranges, steps, ROWS: tl.constexpr):
    """Whether each token is in a range of ROWS tokens or more, and where that range starts."""
    # Ranges ascend and do not overlap: the last that starts at or before a token may hold it.
    index = count(starts_ptr, tokens, num_ranges, steps, False) - 1
    start = tl.load(starts_ptr + index, mask=index >= 0, other=0)
    end = tl.load(ends_ptr + index, mask=index >= 0, other=0)
    return (tokens < end) & (end - start >= ROWS), start


@triton.jit
def _tiles_before(
    token, starts_ptr, ends_ptr, num_ranges, steps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Number of tiles that start before `token`."""
    counts = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, num_ranges, BLOCK):
        index = first + tl.arange(0, BLOCK)
        mask = index < num_ranges
        start = tl.load(starts_ptr + index, mask=mask, other=0)
        end = tl.load(ends_ptr + index, mask=mask, other=0)
        # A range of ROWS tokens or more has ceil(n / ROWS) tiles of its own, in place of those of
        # the regular grid that start within it.
        is_long = end - start >= ROWS
        stop = tl.maximum(tl.minimum(end, token), start)
        own = tl.cdiv(stop - start, ROWS)
        replaced = tl.cdiv(stop, ROWS) - tl.cdiv(start, ROWS)
        in_long, _ = _long_range(starts_ptr, ends_ptr, end, num_ranges, steps, ROWS)
        # The next tile starts directly after it, unless the grid or another long range has a
        # tile there.
        after = (end < token) & (end % ROWS != 0) & ~in_long
        counts += tl.where(is_long, own - replaced + after.to(tl.int32), 0)
    return tl.cdiv(token, ROWS) + tl.sum(counts)


# Sizes that change between batches must not cause a recompilation.
@triton.jit(do_not_specialize=["num_tokens", "num_ranges", "steps", "limit"])
def _tiles_kernel(
    tiles_ptr,
    lows_ptr,
    highs_ptr,
    starts_ptr,
    ends_ptr,
    other_starts_ptr,
    other_ends_ptr,
    num_tokens,
    num_ranges,
    steps,
    limit,
    OF_KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK
    tokens = first + tl.arange(0, BLOCK)
    mask = tokens < num_tokens

    # Bounds: the range that holds a token is the last one that starts at or before it.
    index = count(starts_ptr, tokens, num_ranges, steps, False) - 1
    known = index >= 0
    end = tl.load(ends_ptr + index, mask=known, other=0)
    low = tl.load(other_starts_ptr + index, mask=known, other=0)
    high = tl.load(other_ends_ptr + index, mask=known, other=0)
    if CAUSAL:
        if OF_KEYS:
            # Key j of U is seen by the last U - j queries: the last query sees all keys.
            low = tl.maximum(low, high - (end - tokens))
        else:
            # Query i of T sees all keys but the last T - 1 - i.
            high = high - (end - 1 - tokens)
    # Gaps between ranges, and tokens whose range is empty on the other side, see nothing.
    meets = (tokens < end) & (low < high)
    tl.store(lows_ptr + tokens, tl.where(meets, low, 0), mask=mask)
    tl.store(highs_ptr + tokens, tl.where(meets, high, 0), mask=mask)

    # Tiles: a long range's own, what follows a long range, and elsewhere every ROWS tokens.
    in_long, start = _long_range(starts_ptr, ends_ptr, tokens, num_ranges, steps, ROWS)
    ended = count(ends_ptr, tokens, num_ranges, steps, True)
    last_start = tl.load(starts_ptr + ended, mask=ended < num_ranges, other=0)
    last_end = tl.load(ends_ptr + ended, mask=ended < num_ranges, other=-1)
    follows_long = (last_end == tokens) & (last_end - last_start >= ROWS)
    elsewhere = (tokens % ROWS == 0) | follows_long
    begins = mask & tl.where(in_long, (tokens - start) % ROWS == 0, elsewhere)
    before = _tiles_before(first, starts_ptr, ends_ptr, num_ranges, steps, ROWS, BLOCK)
    # A tile's number is how many start before it: those of earlier blocks, and a running sum here.
    place = before + tl.cumsum(begins.to(tl.int32), 0) - 1
    tl.store(tiles_ptr + 1 + place, tokens, mask=begins & (place < limit))
    # The program of the last tokens writes the number of tiles and the end of the last one.
    if first + BLOCK >= num_tokens:
        total = tl.minimum(before + tl.sum(begins.to(tl.int32)), limit)
        tl.store(tiles_ptr, total)
        tl.store(tiles_ptr + 1 + total, num_tokens)


def cut(
    num_tokens: int,
    own: tuple[Tensor, Tensor],
    other: tuple[Tensor, Tensor],
    rows: int,
    causal: bool,
    of_keys: bool,
) -> Tiles:
    """Cut a side's tokens into tiles of at most `rows`, without waiting for the device.

    Args:
        num_tokens: of this side; one or more.
        own: starts and ends [n] of this side's ranges.
        other: of the other side's.
        rows: tokens of a tile.
        causal: see op.attention.
        of_keys: this side is the keys.
    """
    num_ranges = own[0].numel()
    # The regular grid's tiles, and per long range at most two more: the last of its own and one
    # behind it. A bound from sizes alone, so that the host does not wait for the number.
    limit = ceil_div(num_tokens, rows) + 2 * min(num_ranges, num_tokens // rows)
    lows, highs = (
        torch.empty(num_tokens, dtype=torch.int32, device=own[0].device) for _ in range(2)
    )
    starts = torch.empty(limit + 2, dtype=torch.int32, device=own[0].device)
    _tiles_kernel[(ceil_div(num_tokens, _BLOCK),)](
        starts,
        lows,
        highs,
        *own,
        *other,
        num_tokens,
        num_ranges,
        num_ranges.bit_length(),
        limit,
        OF_KEYS=of_keys,
        CAUSAL=causal,
        ROWS=rows,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return Tiles(starts, lows, highs, limit)
