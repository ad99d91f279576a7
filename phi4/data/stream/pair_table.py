"""The table of a source of pairs or pivots: which of its documents make up each row.

A piece is placed into one row as a unit: a pair with both of its answers, or a trajectory with all
of its pivots. An item has log-probabilities of the reference model: a pair, or a pivot. Items are
numbered in file order, over all shards.
"""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from phi4.config import DataConfig, SourceConfig
from phi4.data.files.token_file import TokenFile
from phi4.data.stream.kept_table import kept_table
from phi4.data.stream.packing import best_fit
from phi4.data.stream.sources import SourceManifest
from phi4.data.stream.units import ShardPool
from phi4.errors import DataError

PiecesOf = Callable[[TokenFile], "Pieces"]

_NUM_COUNTS = 5


class Pieces(NamedTuple):
    """The pieces of a shard.

    Attributes:
        columns: [n, 5] int64: document, labels, items, loss tokens of the chosen sides, loss tokens
            of both sides.
        num_left_out: documents that make no piece.
    """

    columns: np.ndarray
    num_left_out: int


class Piece(NamedTuple):
    """One piece of a row."""

    shard: int
    document: int
    num_labels: int
    num_items: int
    first_item: int


class PairTable:
    """Rows of a source.

    Attributes:
        content: sha256 of everything that the table depends on.
        num_rows: rows.
        num_items: pairs or pivots in all rows.
        num_labels: labels in all rows, without padding.
        num_left_out: documents that are in no row.
        row_counts: [num_rows, 3] int64: pairs, loss tokens of the chosen sides, of both sides.
    """

    def __init__(
        self,
        source: SourceConfig,
        manifest: SourceManifest,
        pool: ShardPool,
        data: DataConfig,
        pieces_of: PiecesOf,
    ) -> None:
        """Read the cached table, or compute and store it.

        Args:
            source: as in the recipe.
            manifest: its shards.
            pool: opens the shards.
            data: row length and cache directory.
            pieces_of: returns the pieces of a shard.

        Raises:
            DataError: a piece is longer than a row, or there is none.
        """
        row_tokens = data.sequence_length
        key = f"1 {source.kind} {manifest.content_hash} {row_tokens} {source.max_response_tokens}"
        self.content = hashlib.sha256(key.encode()).hexdigest()
        flat, _ = kept_table(
            manifest,
            data.cache_dir,
            f"{self.content[:16]}.{source.kind}.npy",
            lambda: _computed(source, manifest, pool, row_tokens, pieces_of),
        )
        counts, content = flat[:_NUM_COUNTS].tolist(), flat[_NUM_COUNTS:]
        self.num_rows, _, self.num_items, self.num_labels, self.num_left_out = counts
        split = np.cumsum([self.num_rows + 1, 3 * self.num_rows])
        self._row_starts, row_counts, pieces = np.split(content, split)
        self.row_counts = row_counts.reshape(-1, 3)
        self._pieces = pieces.reshape(-1, len(Piece._fields))

    def row(self, index: int) -> list[Piece]:
        """Return the pieces of a row in order."""
        begin, end = self._row_starts[index : index + 2]
        return [Piece(*piece) for piece in self._pieces[begin:end].tolist()]


def _computed(
    source: SourceConfig,
    manifest: SourceManifest,
    pool: ShardPool,
    row_tokens: int,
    pieces_of: PiecesOf,
) -> np.ndarray:
    """Compute counts, row starts, counts of each row, and pieces; flat int64."""
    found = [pieces_of(pool.open(shard)) for shard in manifest.shards]
    shards = [np.full(len(pieces.columns), i) for i, pieces in enumerate(found)]
    document, labels, items, chosen, both = np.concatenate([p.columns for p in found]).T
    if not document.size:
        raise DataError(
            f"source {source.name!r}: {manifest.path} holds no {source.kind} that can be trained "
            f"on; inspect it with `phi4 data inspect`"
        )
    if labels.max() > row_tokens:
        raise DataError(
            f"source {source.name!r}: {np.count_nonzero(labels > row_tokens)} of {labels.size} "
            f"documents of {manifest.path} are longer than a row, the longest has {labels.max()} "
            f"labels, but data.sequence_length is {row_tokens}; raise it, or write the file again "
            f"with `phi4 data pairs --row-tokens {row_tokens}`, which lists rows that are too long"
        )
    first_item = np.cumsum(items) - items
    pieces = np.stack([np.concatenate(shards), document, labels, items, first_item], axis=1)
    order, row_starts = best_fit(labels, row_tokens)
    counts = np.stack([items, chosen, both], axis=1)[order]
    row_counts = np.add.reduceat(counts, row_starts[:-1], axis=0)
    left_out = sum(pieces.num_left_out for pieces in found)
    sizes = [row_starts.size - 1, labels.size, items.sum(), labels.sum(), left_out]
    parts = (sizes, row_starts, row_counts.reshape(-1), pieces[order].reshape(-1))
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
