"""Compute which keys this rank's queries attend to, once per micro-batch for all layers.

A rank's queries are one chunk of columns, or two under context parallelism; a call of the attention
op takes one chunk of every row, rows in order, so that its key ranges are in order and disjoint.
Keys come in blocks: all columns of the rows at once, or those of one context rank after the other.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from phi4_kernels.attention import Ranges

from phi4.engine.layout import Layout, context_chunks

Visible = tuple[tuple[Ranges | None, ...], ...]
"""[blocks of keys][chunks of queries]; None where no query of the chunk sees a key of the block.

The first block has the queries' own keys: there a document's last query attends up to its last key,
the one before it to one less (causal). In the others every query of a range attends to all of its
keys.
"""


class HostRanges(NamedTuple):
    """`Ranges` as int32 arrays."""

    q_offsets: np.ndarray
    k_starts: np.ndarray
    k_ends: np.ndarray


def visible_keys(cu_seqlens: np.ndarray, num_rows: int, length: int, layout: Layout) -> Visible:
    """Return the ranges of this rank, on the host.

    Args:
        cu_seqlens: [documents + 1], over the flattened rows; every row start is a boundary.
        num_rows: rows of the micro-batch.
        length: length of a complete row.
        layout: determines this rank's columns, and how remote keys arrive.
    """
    chunks = layout.context_chunks(length)
    if layout.cp_size == 1 or layout.parallel.context_attention == "all_gather":
        blocks = [[(0, length)]]
    else:
        sources = [(layout.cp_rank - step) % layout.cp_size for step in range(layout.cp_size)]
        blocks = [context_chunks(length, source, layout.cp_size) for source in sources]
    return tuple(
        tuple(
            _as_tensors(chunk_ranges(cu_seqlens, num_rows, length, chunk, block))
            for chunk in chunks
        )
        for block in blocks
    )


def chunk_ranges(
    cu_seqlens: np.ndarray,
    num_rows: int,
    length: int,
    chunk: tuple[int, int],
    block: Sequence[tuple[int, int]],
) -> HostRanges:
    """Return the ranges of one chunk of queries in one block of keys.

    Args:
        cu_seqlens, num_rows, length: as for `visible_keys`.
        chunk: columns [start, end) of the queries.
        block: columns of the keys in memory order, ascending. Columns after a query are excluded,
            because pieces of documents end where the chunk does; the block's columns are all before
            the chunk, all after it, or those that queries attend to causally.

    Returns:
        Queries counted in [rows * chunk], keys in [rows * columns of the block].
    """
    starts, size = np.arange(num_rows) * length + chunk[0], chunk[1] - chunk[0]
    columns = cu_seqlens[:-1] % length
    inner = cu_seqlens[:-1][(columns > chunk[0]) & (columns < chunk[1])]
    begins = np.sort(np.concatenate((starts, inner)))
    rows = begins // length
    documents = np.searchsorted(cu_seqlens, begins, side="right")
    ends = np.minimum(cu_seqlens[documents], rows * length + chunk[1])

    def position(tokens: np.ndarray) -> np.ndarray:
        """Count the keys of the block before these tokens of the rows."""
        column = tokens - rows * length
        before = sum(np.clip(column - start, 0, end - start) for start, end in block)
        return rows * sum(end - start for start, end in block) + before

    k_starts, k_ends = position(cu_seqlens[documents - 1]), position(ends)
    # Adjacent documents without visible keys are one range.
    sees = k_ends > k_starts
    kept = sees | np.append(True, sees[:-1])
    q_offsets = np.append((rows * size + begins - rows * length - chunk[0])[kept], num_rows * size)
    return HostRanges(*(x.astype(np.int32) for x in (q_offsets, k_starts[kept], k_ends[kept])))


def _num_tokens(host: HostRanges) -> int | None:
    """See `Ranges.num_tokens`; a chunk's queries begin at 0."""
    begins, ends = host.q_offsets[:-1], host.q_offsets[1:]
    are_documents = np.array_equal(begins, host.k_starts) and np.array_equal(ends, host.k_ends)
    return int(ends[-1]) if are_documents else None


def _as_tensors(found: HostRanges) -> Ranges | None:
    num_keys = int((found.k_ends - found.k_starts).max())
    if not num_keys:
        return None
    q_offsets, k_starts, k_ends = map(torch.from_numpy, found)
    num_queries = int(np.diff(found.q_offsets).max())
    return Ranges(q_offsets, k_starts, k_ends, num_queries, num_keys, _num_tokens(found))
