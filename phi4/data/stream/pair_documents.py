"""Place a document of preferences into part of a row: a pair of answers, or pivots of one text."""

import hashlib
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from phi4.data.files.token_file import TokenFile
from phi4.data.stream.pair_table import Pieces
from phi4.data.stream.units import Rows
from phi4.errors import DataError


class PairDocuments(Protocol):
    """Operations of a preference source that depend on the kind of its documents."""

    def pieces(self, file: TokenFile) -> Pieces:
        """Return the pieces to pack from one shard.

        Raises:
            DataError: the file does not contain such documents.
        """

    def fill(self, file: TokenFile, document: int, rows: Rows, pair: int) -> None:
        """Copy one document into a slice of exactly its number of labels.

        Args:
            file: an open shard.
            document: its index in the file.
            rows: [labels] each; `rows.pairs` belongs to the same slice.
            pair: index in its row of the first pair of the document.
        """

    def hashes(self, file: TokenFile, document: int) -> Iterator[int]:
        """Return 64-bit content hashes of a document's pairs, in order."""


class AnswerPairs:
    """Two sequences: the prompt with the chosen and with the rejected answer."""

    def __init__(self, max_response_tokens: int) -> None:
        """Set the number of loss tokens after which a side is truncated; 0 for none."""
        self._most = max_response_tokens

    def pieces(self, file: TokenFile) -> Pieces:
        """See `PairDocuments`; pairs whose sides are equal after truncation are dropped."""
        if file.loss_mask is None and file.num_documents:
            raise DataError(
                f"{file.prefix}.mask does not exist, so the answers of the pairs are unknown; "
                f"write the file with `phi4 data pairs`"
            )
        document = np.arange(file.num_documents)
        if self._most:
            sizes = np.array([self._sizes(file, int(i)) for i in document]).reshape(-1, 2, 2)
            differ = [self._differ(file, int(i)) for i in document]
            document, sizes = document[differ], sizes[differ]
        else:
            lengths = file.lengths.astype(np.int64)
            begins = np.cumsum(lengths) - lengths
            sizes = np.stack([lengths - 1, file.num_loss_labels(begins, lengths - 1)], axis=1)
            sizes = sizes.reshape(-1, 2, 2)
        labels, loss = sizes[..., 0], sizes[..., 1]
        self._check(file, document, loss)
        columns = (document, labels.sum(1), np.ones_like(document), loss[:, 0], loss.sum(1))
        return Pieces(np.stack(columns, axis=1), file.num_documents - document.size)

    def fill(self, file: TokenFile, document: int, rows: Rows, pair: int) -> None:
        """See `PairDocuments`."""
        place = 0
        for side, (ids, mask) in enumerate(self._sides(file, document)):
            here = slice(place, place + ids.size - 1)
            rows.tokens[here], rows.labels[here] = ids[:-1], ids[1:]
            rows.weights[here] = mask[1:]
            rows.starts[place] = True
            rows.pair_columns.segment_ids[0, here][mask[1:] != 0] = 2 * pair + side
            place += ids.size - 1

    def hashes(self, file: TokenFile, document: int) -> Iterator[int]:
        """See `PairDocuments`."""
        digest = hashlib.blake2b(digest_size=8)
        for ids, mask in self._sides(file, document):
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(ids.astype("<i4").tobytes() + mask.tobytes())
        yield int.from_bytes(digest.digest(), "little")

    def _sides(self, file: TokenFile, document: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Return ids and loss mask of both sides."""
        masks = file.sequences(document, file.loss_mask)
        for ids, mask in zip(file.sequences(document), masks, strict=True):
            end = ids.size
            if self._most:
                counted = np.flatnonzero(mask[1:])
                if counted.size > self._most:
                    end = int(counted[self._most - 1]) + 2
            yield ids[:end], mask[:end]

    def _sizes(self, file: TokenFile, document: int) -> list[tuple[int, int]]:
        sides = self._sides(file, document)
        return [(ids.size - 1, int(np.count_nonzero(mask[1:]))) for ids, mask in sides]

    def _differ(self, file: TokenFile, document: int) -> bool:
        (chosen, _), (rejected, _) = self._sides(file, document)
        return not np.array_equal(chosen, rejected)

    def _check(self, file: TokenFile, document: np.ndarray, loss: np.ndarray) -> None:
        empty = np.flatnonzero((loss == 0).any(axis=1))
        if empty.size:
            raise DataError(
                f"{file.prefix}.bin, document {document[empty[0]]}: the loss mask covers no token "
                "of an answer; write the file with `phi4 data pairs`, which lists such rows"
            )


class TokenPivots:
    """Four sequences: a trajectory, positions in it, chosen ids, rejected ids.

    A pivot is the choice of the token that follows a position. The difference of two
    log-probabilities there equals what direct preference optimisation computes from two sequences
    that differ in that token and end with it, so one pass over the trajectory serves all of its
    pivots.

    Source: report, section 4.3.
    """

    def pieces(self, file: TokenFile) -> Pieces:
        """See `PairDocuments`."""
        sizes = file.lengths.astype(np.int64).reshape(-1, 4)
        document = np.arange(len(sizes))
        same = (sizes[:, 1:] == sizes[:, 1:2]).all(axis=1) & (sizes[:, 1] > 0)
        if not same.all():
            raise DataError(
                f"{file.prefix}.bin, document {np.flatnonzero(~same)[0]}: expected as many chosen "
                "and rejected ids as positions, at least one; write it with `phi4 data pairs`"
            )
        pivots = sizes[:, 1]
        # The last position, which ends the document's second sequence.
        ends = np.cumsum(sizes.reshape(-1)).reshape(-1, 4)[:, 1]
        labels = file.tokens[ends - 1].astype(np.int64) + 1
        return Pieces(np.stack((document, labels, pivots, pivots, 2 * pivots), axis=1), 0)

    def fill(self, file: TokenFile, document: int, rows: Rows, pair: int) -> None:
        """See `PairDocuments`."""
        ids, positions, chosen, rejected = file.sequences(document)
        num_labels = rows.tokens.size
        rows.tokens[:] = ids[:num_labels]
        rows.labels[: ids.size - 1] = ids[1 : num_labels + 1]
        rows.labels[positions] = chosen
        rows.weights[:] = 0
        rows.weights[positions] = 1
        rows.starts[0] = True
        rows.pair_columns.alternatives[0, positions] = rejected
        rows.pair_columns.segment_ids[0, positions] = 2 * (pair + np.arange(positions.size))

    def hashes(self, file: TokenFile, document: int) -> Iterator[int]:
        """See `PairDocuments`."""
        ids, positions, chosen, rejected = file.sequences(document)
        prefix, begin = hashlib.blake2b(digest_size=8), 0
        for position, *pair in zip(
            *(x.tolist() for x in (positions, chosen, rejected)), strict=True
        ):
            prefix.update(ids[begin : position + 1].astype("<i4").tobytes())
            begin = position + 1
            digest = prefix.copy()
            digest.update(np.array(pair, "<i4").tobytes())
            yield int.from_bytes(digest.digest(), "little")
