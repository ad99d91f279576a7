"""The loader: micro-batches of one data-parallel rank, cut from a stream that no layout changes.

Every rank draws the whole global batch from its ledger and reads only its own rows, so nothing is
broadcast, all ranks hold the same state, and a checkpoint continues at any data-parallel size.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from phi4.config import DataConfig
from phi4.data.batch import Batch, build_batch
from phi4.data.manifest import file_sha256, manifest_path
from phi4.data.stream import Stream
from phi4.data.token_file import TokenFile
from phi4.data.tokenizer import TokenizerFacts
from phi4.data.units import Source
from phi4.errors import DataError, LayoutError


class Loader:
    """Training batches, step by step."""

    def __init__(
        self,
        data: DataConfig,
        tokenizer: TokenizerFacts,
        seed: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Open the sources, and go on from a state where one is given.

        Raises:
            DataError: no source, a source is missing, damaged or from another tokenizer, or the
                state does not belong to these sources.
        """
        self._data = data
        self._tokenizer = tokenizer
        sources = _open_sources(data, tokenizer)
        weights = [source.weight for source in data.sources]
        self._stream = Stream(sources, weights, tokenizer, seed=seed, state=state)

    def next_step(
        self, *, global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int
    ) -> list[Batch]:
        """This rank's micro-batches of the next optimizer step; the ledger moves by all of them.

        Args:
            global_batch_size: rows over all data-parallel ranks.
            micro_batch_size: rows of one returned batch.
            dp_rank: which slice of the rows; slices are contiguous.
            dp_size: number of slices.

        Raises:
            DataError: a token id is outside the vocabulary (names source, document, offset).
            LayoutError: the rows do not split into whole micro-batches.
        """
        if global_batch_size % (micro_batch_size * dp_size):
            raise LayoutError(
                f"global_batch_size={global_batch_size} is not a multiple of micro_batch_size="
                f"{micro_batch_size} x data={dp_size}; every rank runs whole micro-batches"
            )
        row_units = self._data.sequence_length // self._data.unit_tokens
        source, ordinal = self._stream.next_units(global_batch_size * row_units)
        own = slice(dp_rank * source.size // dp_size, (dp_rank + 1) * source.size // dp_size)
        source, unit = source[own], self._stream.units(source[own], ordinal[own])
        size = micro_batch_size * row_units
        starts = range(0, unit.size, size)
        return [self._batch(source[i : i + size], unit[i : i + size]) for i in starts]

    def state(self) -> dict[str, Any]:
        """The ledger between two steps, plain JSON."""
        return self._stream.state()

    def source_hashes(self) -> dict[str, str]:
        """sha256 of each source's manifest, by source name."""
        return {s.name: file_sha256(manifest_path(s.path)) for s in self._data.sources}

    def _batch(self, source: np.ndarray, unit: np.ndarray) -> Batch:
        rows = (-1, self._data.sequence_length)
        tokens, labels, weights = self._stream.read(source, unit)
        return build_batch(
            tokens.reshape(rows),
            labels.reshape(rows),
            weights.reshape(rows),
            eod_id=self._tokenizer.eod_id,
            document_mask=self._data.document_mask,
            unit_tokens=self._data.unit_tokens,
        )


class HeldOut:
    """Batches of documents that are never trained on, the same ones at every evaluation."""

    def __init__(self, data: DataConfig, tokenizer: TokenizerFacts, seed: int) -> None:
        """Open `data.held_out`.

        Raises:
            DataError: as `Loader`.
        """
        self._data = data.model_copy(update={"sources": data.held_out})
        self._tokenizer = tokenizer
        self._seed = seed
        self._start = Loader(self._data, tokenizer, seed).state()

    def batches(
        self,
        num_batches: int,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
    ) -> Iterator[list[Batch]]:
        """The first global batches of the held-out stream, one list of micro-batches for each.

        Args:
            num_batches: global batches.
            global_batch_size: rows of each, over all data-parallel ranks.
            micro_batch_size: as in `Loader.next_step`, like the rest.
            dp_rank: which slice of the rows.
            dp_size: number of slices.
        """
        loader = Loader(self._data, self._tokenizer, self._seed, self._start)
        for _ in range(num_batches):
            yield loader.next_step(
                global_batch_size=global_batch_size,
                micro_batch_size=micro_batch_size,
                dp_rank=dp_rank,
                dp_size=dp_size,
            )


def _open_sources(data: DataConfig, tokenizer: TokenizerFacts) -> list[Source]:
    if not any(source.weight for source in data.sources):
        raise DataError(
            "no data source with a weight above 0; name a .bin/.idx prefix under data.sources (or "
            "data.held_out), `phi4 data demo` writes some"
        )
    names = [source.name for source in data.sources]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"two sources are named {name!r}; every source needs its own name")
    opened = []
    for config in data.sources:
        shard = TokenFile(config.path)
        shard.require_tokenizer(tokenizer)
        opened.append(Source(config.name, [shard], data.unit_tokens))
    return opened
