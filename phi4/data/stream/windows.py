"""Window sources: intact documents packed into rows; one row is the unit that the ledger counts.

A document longer than a row is cut into windows that share one token, as units do; windows and
shorter documents fill rows best-fit. Natural long documents train long-range attention, joined
short ones do not (technical report, section 3.3); the same packing is used for chat records with a
mask.
"""

from collections.abc import Callable

import numpy as np

from phi4.config import DataConfig, SourceConfig
from phi4.data.files.token_file import TokenFile, check_ids
from phi4.data.stream.sources import SourceManifest
from phi4.data.stream.units import Rows, ShardPool
from phi4.data.stream.window_table import WindowTable
from phi4.data.vocabulary.tokenizer import TokenizerFacts


class WindowSource:
    """Rows of intact documents under one name; a `Source`.

    Attributes:
        name: name in the recipe.
        content: sha256 of its content and of how it is packed.
        row_tokens: tokens in a row.
        num_units: rows.
        whole_rows: True, a unit is a complete row.
        has_pairs: False.
        num_without_loss: documents without a token in the loss.
    """

    whole_rows = True
    has_pairs = False

    def __init__(
        self,
        source: SourceConfig,
        manifest: SourceManifest,
        pool: ShardPool,
        tokenizer: TokenizerFacts,
        row_tokens: int,
        cache_dir: str | None = None,
    ) -> None:
        """Find or compute the table of rows.

        Args:
            source: source of the recipe.
            manifest: the source's shards.
            pool: opens the shards.
            tokenizer: tokenizer that produced their ids.
            row_tokens: tokens in a row.
            cache_dir: directory of the cached table; next to the shards if None.

        Raises:
            DataError: see `WindowTable`.
        """
        self._table = WindowTable(source, manifest, pool, row_tokens, cache_dir)
        self.name, self.content = source.name, self._table.content
        self.row_tokens, self.num_units = row_tokens, self._table.num_rows
        self.num_without_loss = self._table.num_without_loss
        self._overlong = source.overlong or "cut"
        self._shards = manifest.shards
        self._pool = pool
        self._tokenizer = tokenizer

    @classmethod
    def open(
        cls,
        config: SourceConfig,
        manifest: SourceManifest,
        pool: ShardPool,
        tokenizer: TokenizerFacts,
        data: DataConfig,
    ) -> "WindowSource":
        """Open a source of the recipe; see `kinds.OpenKind`.

        Raises:
            DataError: see `WindowTable`.
        """
        return cls(config, manifest, pool, tokenizer, data.sequence_length, data.cache_dir)

    def describe(self) -> str:
        """Describe documents, rows, and dropped documents in words."""
        table = self._table
        filled = table.num_labels / (self.num_units * self.row_tokens)
        words = (
            f"source {self.name!r}: {table.num_documents:,} documents in {self.num_units:,} rows "
            f"of {self.row_tokens:,} tokens, {filled:.1%} filled"
        )
        if table.num_overlong:
            words += f'; {table.num_overlong:,} longer than a row (overlong="{self._overlong}")'
        if table.num_left_out:
            words += f", {table.num_left_out:,} tokens dropped"
        if table.num_outside:
            words += f"; {table.num_outside:,} outside min_tokens and max_tokens"
        if not table.is_kept:
            words += "; packed again by every rank, because the shards' directory is not writable: "
            words += "set data.cache_dir"
        return words

    def fill(self, unit: int, rows: Rows) -> None:
        """Copy one row into [row_tokens] slices; the rest is padding.

        Raises:
            DataError: an id is outside the vocabulary (names source, document, offset).
        """
        place = 0
        for shard, begin, num_labels in self._table.row(unit):
            pair = self._pool.open(self._shards[shard])
            window = pair.tokens[begin : begin + num_labels + 1]
            check_ids(window, self._tokenizer.vocab_size, self._locator(pair, begin))
            here = slice(place, place + num_labels)
            rows.tokens[here], rows.labels[here] = window[:-1], window[1:]
            rows.weights[here] = _loss_mask(pair, begin, num_labels)
            rows.starts[place] = True
            place += num_labels
        if place < self.row_tokens:
            rows.starts[place] = True
            rows.pad(place, self._tokenizer.pad_id)

    def loss_tokens(self, units: np.ndarray) -> np.ndarray:
        """Return labels of weight 1 in each row, [n] int64, at least 1."""
        return self._table.row_loss[units]

    def locate(self, unit: int, offset: int) -> str:
        """Describe source, file, document and offset of a token of a row in words."""
        for shard, begin, num_labels in self._table.row(unit):
            if offset < num_labels:
                return self._locator(self._pool.open(self._shards[shard]), begin)(offset)
            offset -= num_labels
        return f"source {self.name!r}, padding"

    def _locator(self, pair: TokenFile, begin: int) -> Callable[[int], str]:
        def locate(place: int) -> str:
            document, inside = pair.locate(begin + place)
            return f"source {self.name!r}, {pair.prefix}.bin, document {document}, offset {inside}"

        return locate


def _loss_mask(pair: TokenFile, begin: int, num_labels: int) -> np.ndarray:
    if pair.loss_mask is None:
        return np.ones(num_labels, dtype=bool)
    return pair.loss_mask[begin + 1 : begin + 1 + num_labels].astype(bool)
