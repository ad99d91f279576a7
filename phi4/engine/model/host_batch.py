"""The interface of a data batch for the engine, and the checks before the first collective."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from phi4.errors import DataError
from phi4.model.shape import Work

# Shape legend: B rows, S columns of a whole row, N segments.


class HostBatch(Protocol):
    """What the engine needs of a data batch (phi4.data.stream.batch.Batch); numpy arrays."""

    @property
    def tokens(self) -> np.ndarray:
        """[B, S] int64."""
        ...

    @property
    def labels(self) -> np.ndarray:
        """[B, S] int64."""
        ...

    @property
    def loss_mask(self) -> np.ndarray:
        """[B, S] float32."""
        ...

    @property
    def cu_seqlens(self) -> np.ndarray:
        """[documents + 1] int32, rows flattened."""
        ...

    @property
    def positions(self) -> np.ndarray:
        """[B, S] int64, restart at each document."""
        ...

    @property
    def segment_ids(self) -> np.ndarray | None:
        """[B, S] int64 in [0, num_segments), -1 for no segment."""
        ...

    @property
    def num_segments(self) -> int:
        """N, of this micro-batch."""
        ...

    @property
    def alternative_labels(self) -> np.ndarray | None:
        """[B, S] int64, an alternative label of a position; -1 where there is none."""
        ...

    @property
    def token_extras(self) -> Mapping[str, np.ndarray]:
        """[B, S] float32 each."""
        ...

    @property
    def segment_extras(self) -> Mapping[str, np.ndarray]:
        """[N, ...] each."""
        ...


def work_of(batches: Sequence[HostBatch]) -> Work:
    """Return tokens, squares of the documents' lengths and alternative labels of complete rows."""
    lengths = [np.diff(np.asarray(batch.cu_seqlens, dtype=np.int64)) for batch in batches]
    second = (batch.alternative_labels for batch in batches)
    return Work(
        num_tokens=sum(batch.tokens.size for batch in batches),
        squared_lengths=sum(int(np.square(of_batch).sum()) for of_batch in lengths),
        num_second_labels=sum(int((ids >= 0).sum()) for ids in second if ids is not None),
    )


def check_host_batches(batches: Sequence[HostBatch], vocab_size: int) -> None:
    """Check shapes, and the ids that objectives see. Token ids are checked by the data layer.

    Raises:
        DataError: an id or a shape is invalid, or micro-batches of one call differ in shape, which
            waiting pipeline ranks would not detect.
    """
    for batch in batches:
        shape = batches[0].tokens.shape
        _check_shape("tokens", batch.tokens.shape, shape)
        _check_shape("labels", batch.labels.shape, shape)
        _check_shape("loss_mask", batch.loss_mask.shape, shape)
        _check_segments(batch)
        if batch.alternative_labels is not None:
            _check_ids("alternative_labels", batch.alternative_labels, shape, vocab_size)
        for name, values in batch.token_extras.items():
            _check_shape(f"token_extras[{name!r}]", values.shape, shape)


def _check_segments(batch: HostBatch) -> None:
    if batch.segment_ids is not None:
        _check_ids("segment_ids", batch.segment_ids, batch.tokens.shape, batch.num_segments)
    elif batch.num_segments:
        raise DataError(
            f"num_segments={batch.num_segments} in a batch without segment_ids; pass segment_ids, "
            f"or num_segments=0"
        )
    for name, values in batch.segment_extras.items():
        expected = (batch.num_segments, *values.shape[1:])
        _check_shape(f"segment_extras[{name!r}]", values.shape, expected)


def _check_ids(name: str, ids: np.ndarray, shape: tuple[int, ...], count: int) -> None:
    _check_shape(name, ids.shape, shape)
    if not np.issubdtype(ids.dtype, np.integer):
        raise DataError(f"{name} is {ids.dtype}; expected integers; convert it to int64")
    low, high = (int(ids.min()), int(ids.max())) if ids.size else (-1, -1)
    if low < -1 or high >= count:
        raise DataError(
            f"{name} spans {low} to {high}; expected 0 to {count - 1}, or -1 for none; number "
            "segments from 0 within a micro-batch, and take labels from the model's vocabulary"
        )


def _check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise DataError(
            f"{name} has shape {found}; expected {expected}; pass rows of one shape, one value per "
            "token of them, and for segment_extras one per segment"
        )
