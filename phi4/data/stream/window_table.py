"""The table of a window source: which pieces of which documents make up each of its rows.

It depends only on the shards' content, the row length and the length bounds, and is stored under a
name derived from those; see `kept_table`.
"""

import hashlib

import numpy as np

from phi4.config import SourceConfig
from phi4.data.files.token_file import TokenFile
from phi4.data.stream.kept_table import kept_table
from phi4.data.stream.packing import best_fit
from phi4.data.stream.sources import SourceManifest
from phi4.data.stream.units import ShardPool
from phi4.errors import DataError

_NUM_COUNTS = 9


class WindowTable:
    """Rows of a source.

    Attributes:
        content: sha256 of everything that the table depends on.
        num_rows: rows.
        num_labels: labels in all rows, without padding.
        num_documents: documents within the length bounds.
        num_outside: documents outside the length bounds.
        num_overlong: documents within the bounds that are longer than a row.
        num_overlong_chats: those of them that have a loss mask.
        num_left_out: labels of documents within the bounds that are in no row.
        num_without_loss: documents within the bounds without a token in the loss.
        is_kept: whether the table is stored for the next start.
        row_loss: [num_rows] int64, labels of weight 1 in each row.
    """

    def __init__(
        self,
        source: SourceConfig,
        manifest: SourceManifest,
        pool: ShardPool,
        row_tokens: int,
        cache_dir: str | None = None,
    ) -> None:
        """Read the cached table, or compute and store it.

        Args:
            source: source with its length bounds and handling of overlong documents.
            manifest: its shards.
            pool: opens the shards.
            row_tokens: tokens in a row.
            cache_dir: directory of the cached table; next to the shards if None.

        Raises:
            DataError: no document is within the bounds; or conversations are longer than a row and
                the recipe does not set overlong.
        """
        overlong = source.overlong or "cut"
        bounds = f"{source.min_tokens} {source.max_tokens}"
        key = f"3 {manifest.content_hash} {row_tokens} {bounds} {overlong}"
        self.content = hashlib.sha256(key.encode()).hexdigest()
        flat, self.is_kept = kept_table(
            manifest,
            cache_dir,
            f"{self.content[:16]}.windows.npy",
            lambda: _computed(source, manifest, pool, row_tokens),
        )
        counts, content = flat[:_NUM_COUNTS].tolist(), flat[_NUM_COUNTS:]
        self.num_rows, num_pieces, self.num_labels, *documents = counts
        self.num_documents, self.num_outside, *overlong = documents
        self.num_overlong, self.num_overlong_chats, self.num_left_out, *rest = overlong
        (self.num_without_loss,) = rest
        split = np.cumsum([self.num_rows + 1, self.num_rows])
        self._row_starts, self.row_loss, pieces = np.split(content, split)
        self._pieces = pieces.reshape(num_pieces, 3)
        self._check(source, manifest, row_tokens)

    def row(self, index: int) -> list[list[int]]:
        """Return (shard, first token, labels) of the pieces of a row, in order."""
        begin, end = self._row_starts[index : index + 2]
        return self._pieces[begin:end].tolist()

    def _check(self, source: SourceConfig, manifest: SourceManifest, row_tokens: int) -> None:
        if self.num_overlong_chats and source.overlong is None:
            raise DataError(
                f"source {source.name!r}: {self.num_overlong_chats} of {self.num_documents} "
                f"conversations in {manifest.path} do not fit into data.sequence_length="
                f'{row_tokens}; raise it, or set overlong="truncate" (keeps the beginning), '
                '"drop" or "cut" (continues in another row, without the beginning)'
            )
        if not self.num_rows:
            raise DataError(
                f"source {source.name!r}: no document of {manifest.path} has {source.min_tokens} "
                f"to {source.max_tokens or 'any number of'} tokens and a label in the loss; change "
                f"min_tokens, max_tokens or overlong"
            )


def _computed(
    source: SourceConfig, manifest: SourceManifest, pool: ShardPool, row_tokens: int
) -> np.ndarray:
    """Compute the counts, row starts, loss of each row, and pieces; flat int64."""
    pieces, counts = [], np.zeros(6, dtype=np.int64)
    for index, shard in enumerate(manifest.shards):
        found, counted = _shard_pieces(index, pool.open(shard), source, row_tokens)
        pieces.append(found)
        counts += counted
    joined = np.concatenate(pieces)
    order, row_starts = best_fit(joined[:, 2], row_tokens)
    joined = joined[order]
    loss = np.add.reduceat(joined[:, 3], row_starts[:-1]) if len(joined) else joined[:, 3]
    sizes = [row_starts.size - 1, len(joined), joined[:, 2].sum(), *counts]
    parts = [sizes, row_starts, loss, joined[:, :3].reshape(-1)]
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])


def _shard_pieces(
    index: int, pair: TokenFile, source: SourceConfig, row_tokens: int
) -> tuple[np.ndarray, list[int]]:
    """Return pieces of the selected documents, and the last six counts of a table.

    Returns:
        pieces: [n, 4] int64: shard, first token, labels, labels of weight 1.
        counts: documents, outside, overlong, overlong with a mask, labels left out, documents
            without loss.
    """
    lengths = pair.document_lengths()
    begins = np.cumsum(lengths) - lengths
    taken = (lengths >= max(2, source.min_tokens)) & (lengths <= (source.max_tokens or np.inf))
    labels, begins = lengths[taken] - 1, begins[taken]
    num_windows = -(-labels // row_tokens)
    overlong = num_windows > 1
    if source.overlong == "truncate":
        num_windows = np.minimum(num_windows, 1)
    elif source.overlong == "drop":
        num_windows = np.where(overlong, 0, 1)
    document = np.repeat(np.arange(labels.size), num_windows)
    ends = np.cumsum(num_windows)
    offset = (np.arange(document.size) - np.repeat(ends - num_windows, num_windows)) * row_tokens
    begin, size = begins[document] + offset, np.minimum(row_tokens, labels[document] - offset)
    num_covered = pair.num_loss_labels(begin, size)
    pieces = np.stack([np.full_like(size, index), begin, size, num_covered], axis=1)
    # A part of a conversation without an answer has no label in the loss.
    pieces = pieces[num_covered > 0]
    num_overlong = int(np.count_nonzero(overlong))
    left_out = int(labels.sum() - pieces[:, 2].sum())
    chats = num_overlong if pair.loss_mask is not None else 0
    without = int(np.count_nonzero(pair.num_loss_labels(begins, labels) == 0))
    outside = lengths.size - labels.size
    return pieces, [labels.size, outside, num_overlong, chats, left_out, without]
