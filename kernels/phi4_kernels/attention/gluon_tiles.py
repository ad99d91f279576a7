"""Which 128 queries a Hopper program visits next: all tiles of all ranges, the longest first.

A table in device memory, because lengths live on the device: it is made by a dozen small kernels,
without waiting for the device, and once per set of ranges. Tokens before the first and after the
last range are ranges without keys, so that a kernel writes every row of its output.
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

TILE_COLUMNS = 8
"""Of a tile: first query, queries, first key, keys of its range, last key that its first query sees
under a causal mask, counted from the first; then padding to 32 bytes."""

_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def tiles(
    q_offsets: Tensor,
    k_starts: Tensor,
    k_ends: Tensor,
    *,
    num_queries: int,
    tile_rows: int,
    causal: bool,
) -> Tensor:
    """[num_queries // tile_rows + n + 2, TILE_COLUMNS], int32, by falling number of visible keys.

    Args:
        q_offsets, k_starts, k_ends: of n ranges, see Ranges.
        num_queries: of the packed tensor; every one is in exactly one tile.
        tile_rows: most queries of a tile.
        causal: as for attention.

    Unused tiles are last, with no queries and no keys.
    """
    settings = (num_queries, tile_rows, causal)
    state = (k_starts.data_ptr(), k_ends.data_ptr())
    state += tuple(tensor._version for tensor in (q_offsets, k_starts, k_ends))
    made = _known.setdefault(q_offsets, {})
    if made.get("state") != state:
        made.clear()
        made["state"] = state
    if settings not in made:
        made[settings] = _tiles(q_offsets, k_starts, k_ends, *settings)
    return made[settings]


def _tiles(
    q_offsets: Tensor, k_starts: Tensor, k_ends: Tensor, num_queries: int, rows: int, causal: bool
) -> Tensor:
    nothing = q_offsets.new_zeros(1)
    edges = torch.cat((nothing, q_offsets, torch.full_like(nothing, num_queries)))
    starts = torch.cat((nothing, k_starts, nothing))
    keys = torch.cat((nothing, k_ends - k_starts, nothing))
    queries = edges.diff()
    tiles_before = torch.cat((nothing, ((queries + rows - 1) // rows).cumsum(0, dtype=torch.int32)))
    bound = num_queries // rows + queries.numel()
    index = torch.arange(bound, dtype=torch.int32, device=edges.device)
    owner = torch.searchsorted(tiles_before, index, right=True) - 1
    used = owner < queries.numel()
    owner = owner.clamp(max=queries.numel() - 1)
    first = (index - tiles_before[owner]) * rows
    size = torch.where(used, (queries[owner] - first).clamp(max=rows), 0)
    num_keys = torch.where(used, keys[owner], 0)
    diagonal = keys[owner] - queries[owner] + first
    seen = torch.minimum(num_keys, diagonal + size) if causal else num_keys
    table = torch.zeros(bound, TILE_COLUMNS, dtype=torch.int32, device=edges.device)
    columns = (edges[owner] + first, size, starts[owner], num_keys, diagonal)
    for column, values in enumerate(columns):
        table[:, column] = values
    return table[seen.argsort(descending=True, stable=True)]
