"""Units: the fixed pieces that a source is cut into, and that the ledger counts.

Unit u of a shard holds tokens [u * U, (u + 1) * U] inclusive: neighbours share one token, which is
the last label of one and the first input of the other. Every token except a shard's first is thus a
label exactly once, regardless of the run's sequence length.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from phi4.config import DataConfig, SourceConfig
from phi4.data.files.token_file import TokenFile, check_ids
from phi4.data.stream.sources import SourceManifest, SourceShard
from phi4.data.vocabulary.tokenizer import TokenizerFacts
from phi4.errors import DataError


@dataclass(frozen=True, eq=False)
class PairColumns:
    """The pairs in rows and their positions; a pair is entirely in one row.

    Segments 2i and 2i + 1 are the chosen and the rejected side of a row's pair i. The rejected side
    of a pivot is the alternative label of its position, not a segment.
    """

    segment_ids: np.ndarray
    """[n, S] int32, the segment that each label counts for, -1 for none."""
    alternatives: np.ndarray
    """[n, S] int64, the alternative label of a position, -1 for none."""
    reference: np.ndarray
    """[n, S, 2] float64, at index i log-probabilities of both sides of pair i; NaN without a
    reference cache."""
    num_pairs: np.ndarray
    """[n] int64."""

    @staticmethod
    def empty(num_rows: int, num_tokens: int) -> "PairColumns":
        """Return rows without pairs."""
        shape = (num_rows, num_tokens)
        return PairColumns(
            np.full(shape, -1, np.int32),
            np.full(shape, -1, np.int64),
            np.full((*shape, 2), np.nan),
            np.zeros(num_rows, np.int64),
        )

    def rows(self, place: slice) -> "PairColumns":
        """Return some rows as a view."""
        columns = (self.segment_ids, self.alternatives, self.reference, self.num_pairs)
        return PairColumns(*(column[place] for column in columns))

    def stretch(self, place: slice) -> "PairColumns":
        """Return some tokens of every row as a view; the pairs are still those of the full rows."""
        ids, alternatives = self.segment_ids[:, place], self.alternatives[:, place]
        return PairColumns(ids, alternatives, self.reference, self.num_pairs)


@dataclass(frozen=True, eq=False)
class Rows:
    """Arrays that a batch is built from; [n, S] each. Sources fill slices of it."""

    tokens: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    """float32, 1 where the label is in the loss, else 0."""
    starts: np.ndarray
    """bool, True where a piece begins that is unrelated to the previous one."""
    pairs: PairColumns | None = None
    """Only for blends with a source of pairs, whose pieces are complete rows."""

    @property
    def pair_columns(self) -> PairColumns:
        """The columns of pairs, of a blend that has some."""
        assert self.pairs is not None, "the blend has no source of pairs"
        return self.pairs

    @staticmethod
    def empty(num_rows: int, num_tokens: int, *, have_pairs: bool = False) -> "Rows":
        """Allocate rows with undefined content and no document starts."""
        shape = (num_rows, num_tokens)
        # One block: an allocator that got it back once keeps its pages for the next one.
        tokens, labels = np.empty((2, *shape), dtype=np.int64)
        pairs = PairColumns.empty(*shape) if have_pairs else None
        return Rows(tokens, labels, np.empty(shape, np.float32), np.zeros(shape, bool), pairs)

    def pad(self, begin: int, pad_id: int) -> None:
        """Fill the rest of a slice with padding of weight 0."""
        self.tokens[begin:] = self.labels[begin:] = pad_id
        self.weights[begin:] = 0

    def as_rows(self, num_tokens: int) -> "Rows":
        """Return the same tokens in rows of another length, as a view."""
        return self._each(lambda column: column.reshape(-1, num_tokens), self.pairs)

    def cut(self, row: int, begin: int, num_tokens: int) -> "Rows":
        """Return a view of part of one row, [num_tokens] each."""
        place = (row, slice(begin, begin + num_tokens))
        pairs = None if self.pairs is None else self.pairs.rows(slice(row, row + 1))
        return self._each(lambda column: column[place], pairs)

    def stretch(self, begin: int, num_tokens: int) -> "Rows":
        """Return a view of part of a slice, [num_tokens] each."""
        place = slice(begin, begin + num_tokens)
        pairs = None if self.pairs is None else self.pairs.stretch(place)
        return self._each(lambda column: column[place], pairs)

    def _each(
        self, change: Callable[[np.ndarray], np.ndarray], pairs: PairColumns | None
    ) -> "Rows":
        starts = change(self.starts)
        return Rows(change(self.tokens), change(self.labels), change(self.weights), starts, pairs)


class ShardPool:
    """Open shards; the least recently used ones are closed beyond a limit."""

    def __init__(self, max_open: int) -> None:
        self._max_open = max_open
        self._opened: dict[str, TokenFile] = {}

    def open(self, shard: SourceShard) -> TokenFile:
        """Return the pair of a shard.

        Raises:
            DataError: it is missing, damaged, or differs from the source manifest.
        """
        pair = self._opened.pop(shard.prefix, None)
        if pair is None:
            pair = TokenFile(shard.prefix)
            if pair.num_tokens != shard.num_tokens:
                raise DataError(
                    f"{shard.prefix}.bin holds {pair.num_tokens} tokens, but its manifest has "
                    f"{shard.num_tokens}; tokenize again or run `phi4 data adopt`"
                )
            if (pair.loss_mask is not None) != shard.has_mask:
                raise DataError(
                    f"{shard.prefix}.mask {'is missing' if shard.has_mask else 'is not its own'}, "
                    "says its manifest; copy all files of the pair again or run `phi4 data adopt`"
                )
            if len(self._opened) >= self._max_open:
                del self._opened[next(iter(self._opened))]
        self._opened[shard.prefix] = pair
        return pair


class UnitSource:
    """An ordered list of shards under one name, addressed by unit; a `Source`.

    Attributes:
        name: name in the recipe.
        content: sha256 of its content.
        row_tokens: labels per unit.
        num_units: units of all shards; the last one of a shard may be partial.
        whole_rows: False, a row may join several units.
        has_pairs: False.
    """

    whole_rows = False
    has_pairs = False

    def __init__(
        self,
        name: str,
        manifest: SourceManifest,
        pool: ShardPool,
        tokenizer: TokenizerFacts,
        unit_tokens: int,
    ) -> None:
        """Cut the shards, by their sizes alone.

        Raises:
            DataError: no shard fills a unit.
        """
        self.name = name
        self.content = manifest.content_hash
        self.row_tokens = unit_tokens
        self._shards = shards = manifest.shards
        self._pool = pool
        self._tokenizer = tokenizer
        labels = np.array([max(0, shard.num_tokens - 1) for shard in shards], dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(-(-labels // unit_tokens))])
        self.num_units = int(self._starts[-1])
        if labels.max() < unit_tokens:
            raise DataError(
                f"source {name!r}: the longest shard of {manifest.path} has {labels.max()} labels, "
                f"but a unit has {unit_tokens} (data.unit_tokens), so every row would be padded; "
                'add text, set kind="windows", or remove the source'
            )

    @classmethod
    def open(
        cls,
        config: SourceConfig,
        manifest: SourceManifest,
        pool: ShardPool,
        tokenizer: TokenizerFacts,
        data: DataConfig,
    ) -> "UnitSource":
        """Open a source of the recipe; see `kinds.OpenKind`.

        Raises:
            DataError: no shard fills a unit, or the shards hold conversations and the recipe does
                not allow to cut them.
        """
        if config.overlong is None and any(shard.has_mask for shard in manifest.shards):
            raise DataError(
                f"source {config.name!r}: {manifest.path} holds conversations, which a stream cuts "
                'anywhere; set kind="windows" to keep them intact, or overlong="cut" if '
                "that is intended"
            )
        return cls(config.name, manifest, pool, tokenizer, data.unit_tokens)

    def describe(self) -> str:
        """Return an empty string: every token is served."""
        return ""

    def fill(self, unit: int, rows: Rows) -> None:
        """Copy one unit into [unit_tokens] slices; after a partial unit comes padding.

        The label after an end-of-document token has weight 0, like those that the file masks.

        Raises:
            DataError: an id is outside the vocabulary (names source, document, offset).
        """
        pair, begin = self._place(unit)
        window = pair.tokens[begin : begin + self.row_tokens + 1]
        check_ids(window, self._tokenizer.vocab_size, lambda place: self.locate(unit, place))
        filled = window.size - 1
        if filled < self.row_tokens:
            rows.pad(filled, self._tokenizer.pad_id)
        rows.tokens[: filled + 1] = window[: self.row_tokens]
        rows.labels[:filled] = window[1:]
        np.not_equal(window[:-1], self._tokenizer.eod_id, out=rows.weights[:filled])
        if pair.loss_mask is not None:
            rows.weights[:filled] *= pair.loss_mask[begin + 1 : begin + 1 + filled] != 0
        rows.starts[0] = True

    def loss_tokens(self, units: np.ndarray) -> np.ndarray:
        """Return labels of weight 1 in each unit, [n] int64, at least 1."""
        return np.array([self._loss_tokens(unit) for unit in units.tolist()], dtype=np.int64)

    def locate(self, unit: int, offset: int) -> str:
        """Describe source, file, document and offset of a token of a unit in words."""
        pair, begin = self._place(unit)
        document, inside = pair.locate(begin + offset)
        return f"source {self.name!r}, {pair.prefix}.bin, document {document}, offset {inside}"

    def _loss_tokens(self, unit: int) -> int:
        pair, begin = self._place(unit)
        window = pair.tokens[begin : begin + self.row_tokens + 1]
        loss_mask = window[:-1] != self._tokenizer.eod_id
        if pair.loss_mask is not None:
            loss_mask &= pair.loss_mask[begin + 1 : begin + window.size].astype(bool)
        return max(1, int(np.count_nonzero(loss_mask)))

    def _place(self, unit: int) -> tuple[TokenFile, int]:
        shard = int(self._starts.searchsorted(unit, side="right")) - 1
        pair = self._pool.open(self._shards[shard])
        return pair, (unit - int(self._starts[shard])) * self.row_tokens
