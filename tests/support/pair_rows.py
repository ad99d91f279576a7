"""Rows of packed pairs and pivots, as the loader makes them of files; one item after the other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from phi4.data.stream.batch import Batch, build_batch

EOD = 0
"""No id of an item; padding, too."""


@dataclass(frozen=True, eq=False)
class Document:
    """What one document writes into a row, [n] each; segments count from those of its row."""

    tokens: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    segment_ids: np.ndarray
    alternatives: np.ndarray


@dataclass(frozen=True, eq=False)
class Pair:
    """Two answers to one prompt, ids.

    Attributes:
        prompt: at least one id.
        chosen: the better answer.
        rejected: the worse one.
        reference: log-probabilities of both under the reference model.
    """

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    reference: tuple[float, float] = (0.0, 0.0)

    @property
    def references(self) -> list[tuple[float, float]]:
        """Per pair, chosen and rejected."""
        return [self.reference]

    @property
    def num_chosen_tokens(self) -> int:
        """That the loss covers."""
        return len(self.chosen)

    def documents(self) -> Iterator[Document]:
        """The chosen side, then the rejected one."""
        for side, answer in enumerate((self.chosen, self.rejected)):
            ids = np.concatenate((self.prompt, answer))
            is_answer = np.arange(1, len(ids)) >= len(self.prompt)
            nothing = np.full(len(ids) - 1, -1)
            segment_ids = np.where(is_answer, side, -1)
            yield Document(ids[:-1], ids[1:], is_answer, segment_ids, nothing)


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Pairs of single tokens at some positions of one document.

    Attributes:
        ids: of the document.
        positions: [k]; pivot i stands after ids[: positions[i] + 1].
        chosen: [k].
        rejected: [k].
        references: [k, 2] log-probabilities under the reference model.
    """

    ids: np.ndarray
    positions: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    references: np.ndarray

    @property
    def num_chosen_tokens(self) -> int:
        """That the loss covers."""
        return len(self.positions)

    def documents(self) -> Iterator[Document]:
        """One, which holds all pivots."""
        size = len(self.ids)
        labels, weights = np.append(self.ids[1:], EOD), np.zeros(size, dtype=bool)
        segment_ids, alternatives = np.full((2, size), -1)
        labels[self.positions], weights[self.positions] = self.chosen, True
        segment_ids[self.positions] = 2 * np.arange(len(self.positions))
        alternatives[self.positions] = self.rejected
        yield Document(self.ids, labels, weights, segment_ids, alternatives)

    def as_pairs(self) -> list[Pair]:
        """The same pairs in the standard form, each side a document of its own."""
        columns = zip(self.positions, self.chosen, self.rejected, self.references, strict=True)
        return [
            Pair(self.ids[: p + 1], np.array([chosen]), np.array([rejected]), tuple(reference))
            for p, chosen, rejected, reference in columns
        ]


@dataclass(frozen=True, eq=False)
class Conversation:
    """No pair: a document whose tokens have weights as labels, [n] each."""

    ids: np.ndarray
    weights: np.ndarray
    references: tuple[()] = ()
    num_chosen_tokens: int = 0

    def documents(self) -> Iterator[Document]:
        """One."""
        nothing = np.full(len(self.ids) - 1, -1)
        yield Document(self.ids[:-1], self.ids[1:], self.weights[1:], nothing, nothing)


Row = Sequence[Pair | Trajectory | Conversation]


def num_pairs(rows: Sequence[Row]) -> int:
    """Pivots count as pairs."""
    return sum(len(item.references) for row in rows for item in row)


def mean_chosen_tokens(rows: Sequence[Row]) -> float:
    """Mean number of chosen loss tokens per pair."""
    return sum(item.num_chosen_tokens for row in rows for item in row) / num_pairs(rows)


def pair_batch(rows: Sequence[Row], length: int, tokens_per_pair: float = 1.0) -> Batch:
    """A micro-batch of rows of items; an empty row is a dummy.

    Args:
        rows: items of each row, which fit into it.
        length: tokens of a row.
        tokens_per_pair: mean number of chosen loss tokens per pair of the global batch.
    """
    shape = len(rows), length
    tokens, labels = np.full((2, *shape), EOD)
    weights, starts = np.zeros((2, *shape), dtype=bool)
    segment_ids, alternatives = np.full((2, *shape), -1)
    references: list[tuple[float, float]] = []
    for row, items in enumerate(rows):
        begin = 0
        for item in items:
            first_segment = 2 * len(references)
            for document in item.documents():
                place = row, slice(begin, begin + len(document.tokens))
                tokens[place], labels[place] = document.tokens, document.labels
                weights[place], alternatives[place] = document.weights, document.alternatives
                inside = document.segment_ids >= 0
                segment_ids[place] = np.where(inside, document.segment_ids + first_segment, -1)
                starts[row, begin] = True
                begin += len(document.tokens)
            references.extend(tuple(pair) for pair in item.references)
    num_segments = 2 * len(references)
    return replace(
        build_batch(tokens, labels, weights, eod_id=EOD, starts=starts),
        segment_ids=segment_ids,
        num_segments=num_segments,
        alternative_labels=alternatives if (alternatives >= 0).any() else None,
        segment_extras={
            "reference": np.array(references, dtype=np.float64).reshape(num_segments),
            "tokens_per_pair": np.full(num_segments, tokens_per_pair),
        },
    )
