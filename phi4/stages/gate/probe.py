"""The rows that the start gate checks: the first rows of the run, and their documents one by
one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from phi4.config import Recipe
from phi4.data.stream.batch import Batch, build_batch
from phi4.data.stream.loader import Loader
from phi4.data.vocabulary.tokenizer import TokenizerFacts
from phi4.errors import DataError

NUM_ROWS = 2
MOST_DOCUMENTS = 16
"""Maximum number of documents that are evaluated alone; each costs a row's forward pass."""


@dataclass(frozen=True)
class ProbeRow:
    """One row of the stream.

    Attributes:
        batch: the row, [1, S].
        documents: where each of its documents comes from, in words, in order.
    """

    batch: Batch
    documents: tuple[str, ...]

    def describe(self, segment: int) -> str:
        """Describe the source, file, document and side of a segment in words."""
        ids, alternatives = self.batch.segments[0], self.batch.alternative_labels
        # The rejected side of a pivot has no position of its own: it shares that of the chosen one.
        places = np.flatnonzero(ids == segment)
        place = int(places[0]) if places.size else int(np.argmax(ids == segment - segment % 2))
        is_pivot = alternatives is not None and alternatives[0, place] >= 0
        what = f"token at label {place}" if is_pivot else "side"
        return f"{self._document(place)}, {_side(segment)} {what}"

    def document_of(self, place: int) -> int:
        """Index of the document that holds a column."""
        return int(np.searchsorted(self.batch.cu_seqlens, place, side="right")) - 1

    def _document(self, place: int) -> str:
        index = self.document_of(place)
        return self.documents[index] if index < len(self.documents) else f"document {index}"


@dataclass(frozen=True)
class LoneDocument:
    """One document of a probe row, alone in a row of the same length.

    Attributes:
        row: index of the probe row.
        batch: [1, S], padded; segments are numbered as in the probe row.
        segments: those that the document holds, of both sides where it has pivots.
    """

    row: int
    batch: Batch
    segments: np.ndarray


def read_probe(recipe: Recipe, tokenizer: TokenizerFacts, num_rows: int) -> list[ProbeRow]:
    """Read the first rows of the run's own stream.

    Raises:
        DataError: as `Loader`; also if a row has no pair, or a pair has no reference.
    """
    loader = Loader(recipe.data, tokenizer, recipe.run.seed)
    rows = [
        ProbeRow(loader.row(index), tuple(loader.describe_row(index))) for index in range(num_rows)
    ]
    for index, row in enumerate(rows):
        if not row.batch.num_segments:
            raise DataError(
                f"row {index} of the stream has no pair, so the start gate has nothing to check; "
                f"use sources of kind pairs or pivots"
            )
        _check_places(row)
        if "reference" not in row.batch.segment_extras:
            raise DataError(
                f"{row.describe(0)}: the batch has no reference log-probabilities; run `phi4 dpo "
                "cache-ref` and set data.reference_cache to its directory"
            )
    return rows


def _check_places(row: ProbeRow) -> None:
    """Check that every side is inside one document and every pivot on a chosen side.

    Raises:
        DataError: a side spans two documents, or a pivot is not on a chosen side.
    """
    ids, alternatives = row.batch.segments[0], row.batch.alternative_labels
    for segment in np.unique(ids[ids >= 0]).tolist():
        first, last = np.flatnonzero(ids == segment)[[0, -1]].tolist()
        if row.document_of(first) != row.document_of(last):
            raise DataError(
                f"start gate: {row.describe(segment)}: its loss tokens are labels {first} to {last}"
                " of the row, which span two documents, expected one; the loss mask is shifted"
            )
    if alternatives is None:
        return
    wrong = np.flatnonzero((alternatives[0] >= 0) & ((ids < 0) | (ids % 2 == 1)))
    if wrong.size:
        raise DataError(
            f"start gate: the pivot at label {wrong[0]} of a row belongs to segment "
            f"{ids[wrong[0]]}; expected an even segment, the chosen side of a pair; the mask or "
            f"the sides of pivots are shifted"
        )


def lone_documents(
    rows: Sequence[ProbeRow], tokenizer: TokenizerFacts, *, document_mask: bool
) -> list[LoneDocument]:
    """Return documents with loss tokens, each alone, at most MOST_DOCUMENTS spread over the
    rows."""
    places = [
        (row, document)
        for row, probe in enumerate(rows)
        for document in np.unique(
            [probe.document_of(int(i)) for i in np.flatnonzero(probe.batch.segments[0] >= 0)]
        ).tolist()
    ]
    count = min(len(places), MOST_DOCUMENTS)
    chosen = np.linspace(0, len(places) - 1, count).round().astype(int)
    return [
        _alone(row, rows[row].batch, document, tokenizer, document_mask)
        for row, document in (places[i] for i in chosen.tolist())
    ]


def _alone(
    row: int, batch: Batch, document: int, tokenizer: TokenizerFacts, document_mask: bool
) -> LoneDocument:
    begin, end = batch.cu_seqlens[document : document + 2].tolist()

    def moved(values: np.ndarray, rest: int) -> np.ndarray:
        result = np.full_like(values, rest)
        result[0, : end - begin] = values[0, begin:end]
        return result

    starts = np.zeros(batch.tokens.shape, dtype=bool)
    starts[0, end - begin : end - begin + 1] = True
    lone = build_batch(
        moved(batch.tokens, tokenizer.pad_id),
        moved(batch.labels, tokenizer.pad_id),
        moved(batch.loss_mask, 0),
        eod_id=tokenizer.eod_id,
        document_mask=document_mask,
        starts=starts,
    )
    segment_ids, alternatives = moved(batch.segments, -1), batch.alternative_labels
    segments = np.unique(segment_ids[segment_ids >= 0])
    if alternatives is not None:
        alternatives = moved(alternatives, -1)
        segments = np.union1d(segments, segment_ids[alternatives >= 0] + 1)
    return LoneDocument(
        row,
        replace(
            lone,
            segment_ids=segment_ids,
            num_segments=batch.num_segments,
            alternative_labels=alternatives,
        ),
        segments,
    )


def _side(segment: int) -> str:
    return "rejected" if segment % 2 else "chosen"
