"""Window sources: documents kept whole, packed into rows, one row the unit that the ledger counts.

A document longer than a row is cut into windows that share one token, as units do; windows and
shorter documents fill rows best-fit. Natural long documents teach long attention and joined short
ones do not (technical report, section 3.3), and the same packing serves chat records with a mask.
The table of rows is computed once and kept beside the shards under a name that its inputs define.
"""

import hashlib
import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np

from phi4.data.packing import best_fit
from phi4.data.sources import SourceManifest
from phi4.data.token_file import TokenFile, check_ids
from phi4.data.token_writer import write_atomically
from phi4.data.tokenizer import TokenizerFacts
from phi4.data.units import Rows, ShardPool
from phi4.errors import DataError


class WindowSource:
    """Rows of whole documents under one name.

    Attributes:
        name: as in the recipe.
        content: sha256 that says what it holds and how that is packed.
        row_tokens: tokens in a row.
        num_units: rows.
        whole_rows: True, a unit is a whole row.
    """

    whole_rows = True

    def __init__(
        self,
        name: str,
        manifest: SourceManifest,
        pool: ShardPool,
        tokenizer: TokenizerFacts,
        row_tokens: int,
        bounds: tuple[int, int],
    ) -> None:
        """Read the table of rows, or compute and keep it.

        Args:
            name: as in the recipe.
            manifest: the source's shards.
            pool: opens them.
            tokenizer: whose ids they hold.
            row_tokens: tokens in a row.
            bounds: shortest and longest document taken, in tokens; 0 sets no limit.

        Raises:
            DataError: no document is within the bounds.
        """
        self.name = name
        self.row_tokens = row_tokens
        self._shards = manifest.shards
        self._pool = pool
        self._tokenizer = tokenizer
        key = f"1 {manifest.content_hash} {row_tokens} {bounds[0]} {bounds[1]}"
        self.content = hashlib.sha256(key.encode()).hexdigest()
        kept = Path(self._shards[0].prefix).parent / f"{self.content[:16]}.windows.npy"
        table = self._table(kept, bounds)
        self.num_units, num_pieces = table[:2].tolist()
        if not self.num_units:
            raise DataError(
                f"source {name!r}: no document of {manifest.path} has {bounds[0]} to "
                f"{bounds[1] or 'any number of'} tokens and a label; change min_tokens or "
                "max_tokens"
            )
        split = np.cumsum([2, self.num_units + 1, self.num_units])
        self._row_starts = table[split[0] : split[1]]
        self._row_loss = table[split[1] : split[2]]
        self._pieces = table[split[2] :].reshape(num_pieces, 3)

    def fill(self, unit: int, rows: Rows) -> None:
        """Copy one row into [row_tokens] slices; what is left over is padding.

        Raises:
            DataError: an id is outside the vocabulary (names source, document, offset).
        """
        place = 0
        for shard, begin, num_labels in self._row(unit):
            pair = self._pool.open(self._shards[shard])
            window = pair.tokens[begin : begin + num_labels + 1]
            check_ids(window, self._tokenizer.vocab_size, self._locator(pair, begin))
            here = slice(place, place + num_labels)
            rows.tokens[here], rows.labels[here] = window[:-1], window[1:]
            rows.weights[here] = _learnt(pair, begin, num_labels)
            rows.starts[place] = True
            place += num_labels
        if place < self.row_tokens:
            rows.starts[place] = True
            rows.pad(place, self._tokenizer.pad_id)

    def loss_tokens(self, units: np.ndarray) -> np.ndarray:
        """Labels of weight 1 in each row, [n] int64, at least 1."""
        return np.maximum(1, self._row_loss[units])

    def locate(self, unit: int, offset: int) -> str:
        """Source, file, document and offset behind a token of a row, in words."""
        for shard, begin, num_labels in self._row(unit):
            if offset < num_labels:
                return self._locator(self._pool.open(self._shards[shard]), begin)(offset)
            offset -= num_labels
        return f"source {self.name!r}, padding"

    def _row(self, unit: int) -> list[list[int]]:
        return self._pieces[self._row_starts[unit] : self._row_starts[unit + 1]].tolist()

    def _locator(self, pair: TokenFile, begin: int) -> Callable[[int], str]:
        def locate(place: int) -> str:
            document, inside = pair.locate(begin + place)
            return f"source {self.name!r}, {pair.prefix}.bin, document {document}, offset {inside}"

        return locate

    def _table(self, kept: Path, bounds: tuple[int, int]) -> np.ndarray:
        """[num_rows, num_pieces, row starts, loss tokens of each row, pieces], flat int64."""
        if not kept.exists():
            pieces = np.concatenate(
                [
                    _pieces(index, self._pool.open(shard), bounds, self.row_tokens)
                    for index, shard in enumerate(self._shards)
                ]
            )
            order, row_starts = best_fit(pieces[:, 2], self.row_tokens)
            pieces = pieces[order]
            loss = np.add.reduceat(self._losses(pieces), row_starts[:-1]) if len(pieces) else []
            sizes = [row_starts.size - 1, len(pieces)]
            parts = [sizes, row_starts, loss, pieces.reshape(-1)]
            table = np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
            if not os.access(kept.parent, os.W_OK):
                return table
            write_atomically(kept, _npy(table))
        return np.load(kept, mmap_mode="r").view(np.ndarray)

    def _losses(self, pieces: np.ndarray) -> np.ndarray:
        pairs = [self._pool.open(shard) for shard in self._shards]
        if all(pair.learnt is None for pair in pairs):
            return pieces[:, 2]
        learnt = (_learnt(pairs[shard], begin, n) for shard, begin, n in pieces.tolist())
        return np.array([np.count_nonzero(piece) for piece in learnt], dtype=np.int64)


def _pieces(index: int, pair: TokenFile, bounds: tuple[int, int], row_tokens: int) -> np.ndarray:
    """(shard, first token, labels) of every window of every document taken, [n, 3] int64."""
    lengths = pair.document_lengths()
    begins = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    shortest, longest = bounds
    taken = (lengths >= max(2, shortest)) & (lengths <= (longest or np.inf))
    labels, begins = lengths[taken] - 1, begins[taken]
    num_windows = -(-labels // row_tokens)
    document = np.repeat(np.arange(labels.size), num_windows)
    ends = np.cumsum(num_windows)
    offset = (np.arange(document.size) - np.repeat(ends - num_windows, num_windows)) * row_tokens
    size = np.minimum(row_tokens, labels[document] - offset)
    return np.stack([np.full_like(size, index), begins[document] + offset, size], axis=1)


def _learnt(pair: TokenFile, begin: int, num_labels: int) -> np.ndarray:
    if pair.learnt is None:
        return np.ones(num_labels, dtype=bool)
    return pair.learnt[begin + 1 : begin + 1 + num_labels].astype(bool)


def _npy(table: np.ndarray) -> bytes:
    stream = BytesIO()
    np.save(stream, table)
    return stream.getvalue()
