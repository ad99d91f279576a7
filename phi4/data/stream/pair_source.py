"""Sources of preferences: two answers to one prompt, or two tokens at one position, packed into
rows.

Both sides of a pair are in the same row, so no split of the batch separates them, and their margin
is a difference of two sums of that row.
"""

import numpy as np

from phi4.config import DataConfig, SourceConfig
from phi4.data.files.token_file import TokenFile, check_ids
from phi4.data.stream.pair_documents import AnswerPairs, PairDocuments, TokenPivots
from phi4.data.stream.pair_table import PairTable, Piece
from phi4.data.stream.references import open_references
from phi4.data.stream.sources import SourceManifest
from phi4.data.stream.units import Rows, ShardPool
from phi4.data.vocabulary.tokenizer import TokenizerFacts
from phi4.errors import DataError


class PairSource:
    """Rows of pairs or pivots under one name; a `Source`.

    Attributes:
        name: as in the recipe.
        kind: pairs or pivots.
        content: sha256 of its content and of how it is packed.
        row_tokens: tokens in a row.
        num_units: rows.
        num_items: pairs or pivots, numbered in the order of the files.
        manifest: manifest of its shards.
        whole_rows: True, a unit is a complete row.
        has_pairs: True, `fill` expects rows with `pairs`.
    """

    whole_rows = True
    has_pairs = True

    def __init__(
        self,
        source: SourceConfig,
        manifest: SourceManifest,
        pool: ShardPool,
        tokenizer: TokenizerFacts,
        data: DataConfig,
        documents: PairDocuments,
    ) -> None:
        """Find or compute the table of rows, and open the recipe's reference cache if there is one.

        Raises:
            DataError: see `PairTable`, `open_references`.
        """
        self._table = PairTable(source, manifest, pool, data, documents.pieces)
        self.name, self.kind, self.content = source.name, source.kind, self._table.content
        self.row_tokens, self.num_units = data.sequence_length, self._table.num_rows
        self.num_items = self._table.num_items
        self.manifest = manifest
        self._documents = documents
        self._pool = pool
        self._tokenizer = tokenizer
        self._references = self._read_references(data.reference_cache)

    @classmethod
    def open(
        cls,
        config: SourceConfig,
        manifest: SourceManifest,
        pool: ShardPool,
        tokenizer: TokenizerFacts,
        data: DataConfig,
    ) -> "PairSource":
        """Open a source of the recipe; see `kinds.OpenKind`.

        Raises:
            DataError: see the constructor.
        """
        pairs = config.kind == "pairs"
        documents = AnswerPairs(config.max_response_tokens) if pairs else TokenPivots()
        return cls(config, manifest, pool, tokenizer, data, documents)

    def describe(self) -> str:
        """Describe pairs, rows, and dropped items in words."""
        table = self._table
        filled = table.num_labels / (self.num_units * self.row_tokens)
        words = (
            f"source {self.name!r}: {self.num_items:,} {self.kind} in {self.num_units:,} rows of "
            f"{self.row_tokens:,} tokens, {filled:.1%} filled"
        )
        if table.num_left_out:
            words += f"; {table.num_left_out:,} dropped: equal within max_response_tokens"
        return words

    def fill(self, unit: int, rows: Rows) -> None:
        """Copy one row into [row_tokens] slices; the rest is padding.

        Raises:
            DataError: an id is outside the vocabulary (names source, document, offset), or a pair
                has no reference.
        """
        place = pair = 0
        for piece in self._table.row(unit):
            part = rows.stretch(place, piece.num_labels)
            self._documents.fill(self._file(piece), piece.document, part, pair)
            place, pair = place + piece.num_labels, pair + piece.num_items
        second = rows.pair_columns.alternatives[0, :place]
        for ids in (rows.tokens[:place], rows.labels[:place], np.maximum(second, 0)):
            check_ids(ids, self._tokenizer.vocab_size, lambda at: self.locate(unit, at))
        rows.pair_columns.num_pairs[:] = pair
        if self._references is not None:
            rows.pair_columns.reference[0, :pair] = self._of_cache(self._references, unit)
        if place < self.row_tokens:
            rows.starts[place] = True
            rows.pad(place, self._tokenizer.pad_id)

    def loss_tokens(self, units: np.ndarray) -> np.ndarray:
        """Return labels of weight 1 in each row, both sides, [n] int64, at least 2."""
        return self._table.row_counts[units, 2]

    def pair_counts(self, units: np.ndarray) -> np.ndarray:
        """Return pairs, and loss tokens of their chosen sides, in each row, [n, 2] int64."""
        return self._table.row_counts[units, :2]

    def row_items(self, unit: int) -> np.ndarray:
        """Return the items of the pairs of a row, [pairs] int64."""
        pieces = self._table.row(unit)
        return np.concatenate([p.first_item + np.arange(p.num_items) for p in pieces])

    def item_hashes(self) -> np.ndarray:
        """Return 64-bit content hashes of the items, [num_items] uint64; reads all shards."""
        hashes = np.empty(self.num_items, dtype=np.uint64)
        for unit in range(self.num_units):
            for piece in self._table.row(unit):
                found = self._documents.hashes(self._file(piece), piece.document)
                for item, digest in enumerate(found, start=piece.first_item):
                    hashes[item] = digest
        return hashes

    def locate_item(self, item: int) -> str:
        """Describe source, file and document of an item in words."""
        for unit in range(self.num_units):
            for piece in self._table.row(unit):
                if 0 <= item - piece.first_item < piece.num_items:
                    return self._place(piece)
        raise IndexError(f"source {self.name!r} has {self.num_items} items, requested {item}")

    def locate(self, unit: int, offset: int) -> str:
        """Describe source, file, document and offset of a token of a row in words."""
        for piece in self._table.row(unit):
            if offset < piece.num_labels:
                return f"{self._place(piece)}, label {offset}"
            offset -= piece.num_labels
        return f"source {self.name!r}, padding"

    def _place(self, piece: Piece) -> str:
        return f"source {self.name!r}, {self._file(piece).prefix}.bin, document {piece.document}"

    def _file(self, piece: Piece) -> TokenFile:
        return self._pool.open(self.manifest.shards[piece.shard])

    def _read_references(self, cache_dir: str | None) -> np.ndarray | None:
        if cache_dir is None:
            return None
        return open_references(cache_dir).log_probs_of(self)

    def _of_cache(self, references: np.ndarray, unit: int) -> np.ndarray:
        items = self.row_items(unit)
        found = references[items]
        missing = np.flatnonzero(np.isnan(found).any(axis=1))
        if missing.size:
            place = self.locate_item(int(items[missing[0]]))
            raise DataError(
                f"the reference cache has no log-probabilities of {place}; run `phi4 dpo "
                "cache-ref` again"
            )
        return found
