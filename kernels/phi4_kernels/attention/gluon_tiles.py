"""The tile schedule of the Hopper kernels: all tiles of all ranges, the longest first.

The table is in device memory because the lengths are: about a dozen small kernels build it once per
Ranges, without a synchronisation. Queries before the first and after the last range are ranges
without keys, so that a kernel writes every row of its output.
"""

import torch
from torch import Tensor

from phi4_kernels.attention.once import once

TILE_COLUMNS = 8
"""Of a tile: first token; tokens; first token of the other side's range; tokens of that range;
offset, the tokens of the other side that are not in its own causal square, less those of its own
side that are not, plus the tile's place in its range; shift, from a query of the range to its place
in the rows of lse and delta. Then padding to 32 bytes.

Of queries the offset is the last key that the first query sees; of keys it is the first query that
sees the first key."""
ROW_ALIGNMENT = 4
"""Places of rows where a range may start: the copy engine reads fp32 from multiples of 16 bytes; at
other places UTMALDG is an illegal instruction."""


def places_of_rows(num_queries: int, num_ranges: int) -> int:
    """Length of a head's row of lse or delta in which every range of queries starts aligned."""
    return (-(-num_queries // ROW_ALIGNMENT) + num_ranges) * ROW_ALIGNMENT


def tiles(
    q_offsets: Tensor,
    k_starts: Tensor,
    k_ends: Tensor,
    *,
    num_tokens: int,
    tile_rows: int,
    causal: bool,
    of_keys: bool = False,
) -> Tensor:
    """[num_tokens // tile_rows + n + 2 or less, TILE_COLUMNS], int32, by falling number of pairs.

    Args:
        q_offsets, k_starts, k_ends: of n ranges, see Ranges.
        num_tokens: of the packed queries, or keys.
        tile_rows: most tokens of a tile.
        causal: as for attention.
        of_keys: tiles of keys, every key of a range in exactly one; else every query in one.

    Unused tiles are last, with no tokens on either side.
    """
    settings = ("gluon", num_tokens, tile_rows, causal, of_keys)
    boundaries = (q_offsets, k_starts, k_ends)
    return once(
        boundaries, settings, lambda: _made(*boundaries, num_tokens, tile_rows, causal, of_keys)
    )


def _made(
    q_offsets: Tensor,
    k_starts: Tensor,
    k_ends: Tensor,
    num_tokens: int,
    tile_rows: int,
    causal: bool,
    of_keys: bool,
) -> Tensor:
    keys, shifts = (k_starts, k_ends - k_starts), _shifts(q_offsets[:-1])
    if of_keys:
        queries = (q_offsets[:-1], q_offsets.diff())
        return _tiles(keys, queries, shifts, num_tokens, tile_rows, causal, True)
    # Queries outside of all ranges need rows of out and lse too; keys keep the zeros of dk and dv.
    queries = _with_outside(q_offsets, num_tokens)
    starts, sizes, shifts = (torch.nn.functional.pad(part, (1, 1)) for part in (*keys, shifts))
    return _tiles(queries, (starts, sizes), shifts, num_tokens, tile_rows, causal, False)


def _shifts(starts: Tensor) -> Tensor:
    """Range i starts at the last aligned place before its queries, and i alignments further: behind
    the range before, whatever that one's length."""
    index = torch.arange(starts.numel(), dtype=torch.int32, device=starts.device)
    # Place of query t of range i: t + i * A - start % A, which is a multiple of A at t = start.
    return index * ROW_ALIGNMENT - starts % ROW_ALIGNMENT


def _with_outside(q_offsets: Tensor, num_queries: int) -> tuple[Tensor, Tensor]:
    """Starts and sizes of the query ranges, and of the tokens before and after all of them."""
    zero = q_offsets.new_zeros(1)
    # Ranges [0, first), the given ones, [last, num_queries).
    edges = torch.cat((zero, q_offsets, torch.full_like(zero, num_queries)))
    return edges[:-1], edges.diff()


def _tiles(
    own: tuple[Tensor, Tensor],
    other: tuple[Tensor, Tensor],
    shifts: Tensor,
    num_tokens: int,
    rows: int,
    causal: bool,
    of_keys: bool,
) -> Tensor:
    """The table, from starts and sizes of both sides' ranges, and their shifts."""
    starts, sizes = own
    # At most one tile per range is not full.
    bound = num_tokens // rows + sizes.numel()
    table = torch.zeros(bound, TILE_COLUMNS, dtype=torch.int32, device=starts.device)
    if not sizes.numel():
        return table
    # Tiles up to and with each range: ceil(n / rows) of each, summed.
    ends = ((sizes + rows - 1) // rows).cumsum(0, dtype=torch.int32)
    index = torch.arange(bound, dtype=torch.int32, device=starts.device)
    # Tile i is of the first range whose tiles end after i.
    owner = torch.searchsorted(ends, index, right=True)
    used = owner < sizes.numel()
    owner = owner.clamp(max=sizes.numel() - 1)
    # Its place in the range: rows * (i - tiles before), as tiles before = ends - ceil(n / rows).
    first = (index - ends[owner]) * rows + (sizes[owner] + rows - 1) // rows * rows
    size = torch.where(used, (sizes[owner] - first).clamp(max=rows), 0)
    num_others = torch.where(used, other[1][owner], 0)
    # Causal attention aligns the ends of both sides: query i of T meets U - T + i + 1 keys.
    offset = other[1][owner] - sizes[owner] + first
    seen = num_others
    if causal:
        # The pairs of a tile decide its time: keys that its last query sees, or queries from
        # `offset`.
        seen = num_others - offset.clamp(min=0) if of_keys else torch.minimum(seen, offset + size)
    columns = (starts[owner] + first, size, other[0][owner], num_others, offset, shifts[owner])
    for column, values in enumerate(columns):
        table[:, column] = values
    # The longest first, so that no long tile remains at the end; stable, so that runs agree.
    return table[seen.argsort(descending=True, stable=True)]
