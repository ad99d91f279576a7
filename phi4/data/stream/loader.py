"""The loader: micro-batches of one data-parallel rank, from a stream that is independent of the
layout.

Every rank draws the entire global batch from its ledger and reads only its own rows, so nothing is
broadcast, all ranks have the same state, and a checkpoint resumes at any data-parallel size.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phi4.config import DataConfig, SourceConfig
from phi4.data.stream.batch import Batch, build_batch
from phi4.data.stream.kinds import open_source
from phi4.data.stream.ledger import BlendEntry, Draws
from phi4.data.stream.overlap import describe_overlaps
from phi4.data.stream.pair_batch import with_pairs
from phi4.data.stream.sources import SourceManifest, read_source
from phi4.data.stream.stream import Stream
from phi4.data.stream.units import ShardPool
from phi4.data.vocabulary.tokenizer import TokenizerFacts
from phi4.errors import DataError, LayoutError


class Loader:
    """Training batches, step by step.

    Attributes:
        stream: the stream that batches are cut from.
        manifests: shards of each source, by name.
        notes: lines to print at the start: a description of each source, for example what was
            packed into rows and what was dropped, and which sources share files.
    """

    def __init__(
        self,
        data: DataConfig,
        tokenizer: TokenizerFacts,
        seed: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Open the sources, and resume from a state if one is given.

        Raises:
            DataError: no source, a source is missing, damaged or from another tokenizer, or the
                state does not belong to these sources.
        """
        _require_weight(data.sources)
        _require_own_names(data.sources)
        if data.sequence_length % data.unit_tokens:
            raise DataError(
                f"data.sequence_length={data.sequence_length} is not a multiple of "
                f"data.unit_tokens={data.unit_tokens}; a row is an integer number of units"
            )
        self._data = data
        self._tokenizer = tokenizer
        self._seed = seed
        self._max_epochs = {source.name: source.max_epochs for source in data.sources}
        _make(data.cache_dir)
        self.manifests = {
            s.name: read_source(s.path, tokenizer, data.cache_dir) for s in data.sources
        }
        pool = ShardPool(data.max_open_shards)
        self._sources = [
            open_source(config, self.manifests[config.name], pool, tokenizer, data)
            for config in data.sources
        ]
        described = (source.describe() for source in self._sources)
        self.notes = [*filter(None, described), *describe_overlaps(self.manifests)]
        self.go_to(state)

    def go_to(self, state: dict[str, Any] | None) -> None:
        """Resume from a state of this loader or of an earlier one; None starts from the beginning.

        The sources stay open.

        Raises:
            DataError: the state does not belong to these sources.
        """
        data = self._data
        whole_rows = any(source.whole_rows for source in self._sources)
        blend = BlendEntry(
            weights={source.name: source.weight for source in data.sources},
            drawn={},
            draw_units=data.sequence_length // data.unit_tokens if whole_rows else 1,
            weigh_by=data.weigh_by,
        )
        self.stream = Stream(
            self._sources,
            blend,
            self._tokenizer,
            seed=self._seed,
            unit_tokens=data.unit_tokens,
            state=state,
        )

    def next_step(
        self, *, global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int
    ) -> list[Batch]:
        """Return this rank's micro-batches of the next optimizer step; the ledger advances by all
        ranks' rows.

        Args:
            global_batch_size: rows over all data-parallel ranks.
            micro_batch_size: rows of one returned batch.
            dp_rank: which slice of the rows; slices are contiguous.
            dp_size: number of slices.

        Raises:
            DataError: a token id is outside the vocabulary (names source, document, offset).
            LayoutError: the rows do not split into complete micro-batches.
        """
        if global_batch_size % (micro_batch_size * dp_size):
            raise LayoutError(
                f"global_batch_size={global_batch_size} is not a multiple of micro_batch_size="
                f"{micro_batch_size} x data={dp_size}; every rank runs complete micro-batches"
            )
        row_draws = self._data.sequence_length // self.stream.draw_tokens
        draws = self.stream.next_draws(global_batch_size * row_draws, self._max_epochs)
        num_draws = draws.source.size
        own = slice(dp_rank * num_draws // dp_size, (dp_rank + 1) * num_draws // dp_size)
        return self._batches(
            draws.source[own],
            draws.ordinal[own],
            micro_batch_size,
            self.stream.chosen_tokens_per_pair(draws),
        )

    def skip(self, num_rows: int) -> None:
        """Advance as if this many rows had been served."""
        self.stream.skip(num_rows * (self._data.sequence_length // self.stream.draw_tokens))

    def require_epochs(self, num_rows: int) -> None:
        """Raise an error now if `next_step` would raise it after some of the remaining rows.

        Raises:
            DataError: a source would be read more often than its `max_epochs`.
        """
        row_draws = self._data.sequence_length // self.stream.draw_tokens
        self.stream.require_epochs(num_rows * row_draws, self._max_epochs)

    def state(self) -> dict[str, Any]:
        """Return the ledger between two steps, as plain JSON."""
        return self.stream.state()

    def source_hashes(self) -> dict[str, str]:
        """Return the sha256 of each source's content, by source name."""
        return {name: manifest.content_hash for name, manifest in self.manifests.items()}

    def row(self, index: int) -> Batch:
        """Return row `index` of the stream from here, [1, S]; the ledger does not advance."""
        draws = self._row_draws(index)
        tokens_per_pair = self.stream.chosen_tokens_per_pair(draws)
        return self._batches(draws.source, draws.ordinal, 1, tokens_per_pair)[0]

    def describe_row(self, index: int) -> list[str]:
        """Describe the origin of that row's pieces, a line each."""
        draws = self._row_draws(index)
        return [
            line
            for source, ordinal in zip(draws.source.tolist(), draws.ordinal.tolist(), strict=True)
            for line in self.stream.describe(source, ordinal)
        ]

    def _row_draws(self, index: int) -> Draws:
        row_draws = self._data.sequence_length // self.stream.draw_tokens
        draws = self.stream.peek((index + 1) * row_draws)
        return Draws(draws.source[-row_draws:], draws.ordinal[-row_draws:], None)

    def _batches(
        self, source: np.ndarray, ordinal: np.ndarray, num_rows: int, tokens_per_pair: float
    ) -> list[Batch]:
        """Return draws as batches of some number of rows; all are read at once, in file order."""
        rows = self.stream.read(source, ordinal).as_rows(self._data.sequence_length)
        places = [slice(i, i + num_rows) for i in range(0, len(rows.tokens), num_rows)]
        batches = [
            build_batch(
                rows.tokens[place],
                rows.labels[place],
                rows.weights[place],
                eod_id=self._tokenizer.eod_id,
                document_mask=self._data.document_mask,
                starts=rows.starts[place],
            )
            for place in places
        ]
        if rows.pairs is None:
            return batches
        pairs = (rows.pairs.rows(place) for place in places)
        return [
            with_pairs(batch, columns, tokens_per_pair)
            for batch, columns in zip(batches, pairs, strict=True)
        ]


class HeldOut:
    """Batches of held-out documents, the same ones at every evaluation."""

    def __init__(self, data: DataConfig, tokenizer: TokenizerFacts, seed: int) -> None:
        """Open `data.held_out`.

        Raises:
            DataError: as `Loader`.
        """
        sources = data.model_copy(update={"sources": data.held_out})
        self._loader = Loader(sources, tokenizer, seed)

    @property
    def manifests(self) -> Mapping[str, SourceManifest]:
        """Shards of each source, by name."""
        return self._loader.manifests

    def batches(
        self,
        num_batches: int,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
    ) -> Iterator[list[Batch]]:
        """Yield the first global batches of the held-out stream, one list of micro-batches each.

        Only one iteration at a time: each restarts the stream.

        Args:
            num_batches: global batches.
            global_batch_size: rows of each, over all data-parallel ranks.
            micro_batch_size: as in `Loader.next_step`, like the rest.
            dp_rank: which slice of the rows.
            dp_size: number of slices.
        """
        self._loader.go_to(None)
        for _ in range(num_batches):
            yield self._loader.next_step(
                global_batch_size=global_batch_size,
                micro_batch_size=micro_batch_size,
                dp_rank=dp_rank,
                dp_size=dp_size,
            )


def open_held_out(data: DataConfig, tokenizer: TokenizerFacts, seed: int) -> dict[str, HeldOut]:
    """Open every source of `data.held_out` separately, by name.

    Raises:
        DataError: as `Loader`.
    """
    _require_own_names(data.held_out)
    return {
        source.name: HeldOut(data.model_copy(update={"held_out": (source,)}), tokenizer, seed)
        for source in data.held_out
    }


def _require_weight(sources: Sequence[SourceConfig]) -> None:
    if not any(source.weight for source in sources):
        raise DataError(
            "no data source with a weight above 0; set a .bin/.idx prefix in data.sources (or "
            "data.held_out); `phi4 data demo` writes some"
        )


def _require_own_names(sources: Sequence[SourceConfig]) -> None:
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"two sources are named {name!r}; every source needs its own name")


def _make(cache_dir: str | None) -> None:
    try:
        if cache_dir:
            Path(cache_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"data.cache_dir={cache_dir} cannot be created ({error.strerror}); use a directory "
            f"that every rank can write to"
        ) from None
