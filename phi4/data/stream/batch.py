"""A micro-batch for the engine: tokens, labels, weights and document boundaries.

Boundaries and positions are derived from the tokens, by one function for served and synthetic
batches, so boundaries and text always agree.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, eq=False)
class Batch:
    """B rows of S tokens.

    Attributes:
        tokens: [B, S] int64.
        labels: [B, S] int64, the token that follows.
        loss_mask: [B, S] float32, weight of each label.
        cu_seqlens: [num_documents + 1] int32, starts of documents in the rows flattened in row
            order, closed by B * S; every row start is a boundary.
        positions: [B, S] int64, distance to the last boundary.
        segment_ids: [B, S] int64, the segment that each label counts for, in [0, num_segments), -1
            for none. Ids count within the batch; a segment is whatever an objective sums over, for
            example one answer.
        num_segments: N.
        alternative_labels: [B, S] int64, a second label of the same position, -1 if there is none:
            the rejected token of a pair that differs in one token.
        token_extras: name -> [B, S] float32, passed to the objective.
        segment_extras: name -> [N, ...], passed to the objective, for example a reference's
            log-probabilities.
    """

    tokens: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    cu_seqlens: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray | None = None
    num_segments: int = 0
    alternative_labels: np.ndarray | None = None
    token_extras: Mapping[str, np.ndarray] = field(default_factory=dict)
    segment_extras: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def segments(self) -> np.ndarray:
        """Segment ids, of a batch that has some."""
        assert self.segment_ids is not None, "the batch has no segments"
        return self.segment_ids


def build_batch(
    tokens: np.ndarray,
    labels: np.ndarray,
    loss_mask: np.ndarray,
    *,
    eod_id: int,
    document_mask: bool = True,
    starts: np.ndarray | None = None,
) -> Batch:
    """Derive boundaries and positions; add segments and extras with `dataclasses.replace`.

    Args:
        tokens: [B, S] integers.
        labels: [B, S] integers.
        loss_mask: [B, S].
        eod_id: the token after which a document starts.
        document_mask: whether documents inside a row are boundaries; row starts always are.
        starts: [B, S] bool, further positions where a document starts: pieces that a row is joined
            from.
    """
    tokens = np.ascontiguousarray(tokens, dtype=np.int64)
    num_tokens, row_tokens = tokens.size, tokens.shape[1]
    begins = np.zeros(num_tokens, dtype=bool)
    if document_mask:
        np.equal(tokens.reshape(-1)[:-1], eod_id, out=begins[1:])
        if starts is not None:
            begins |= starts.reshape(-1)
    begins[::row_tokens] = True
    bounds = np.append(np.flatnonzero(begins), num_tokens)
    # Increments whose running sum counts up and returns to 0 where a document begins.
    positions = np.ones(num_tokens, dtype=np.int64)
    positions[0] = 0
    positions[bounds[1:-1]] -= np.diff(bounds[:-1])
    np.cumsum(positions, out=positions)
    return Batch(
        tokens=tokens,
        labels=np.ascontiguousarray(labels, dtype=np.int64),
        loss_mask=np.ascontiguousarray(loss_mask, dtype=np.float32),
        cu_seqlens=bounds.astype(np.int32),
        positions=positions.reshape(tokens.shape),
    )
