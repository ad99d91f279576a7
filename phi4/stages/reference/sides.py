"""Sum log-probabilities over the two sides of pairs, from complete rows on the host."""

import numpy as np

from phi4.data.stream.batch import Batch
from phi4.engine.step_values import RowLogProbs


def segment_sums(batch: Batch, log_probs: RowLogProbs) -> np.ndarray:
    """Sum over the loss tokens of each segment of a micro-batch.

    Segments 2i and 2i + 1 are the chosen and the rejected side of pair i. Of a pivot, the
    alternative of its position counts for segment 2i + 1.

    Args:
        batch: with segment ids.
        log_probs: log probs of its rows.

    Returns:
        [num_segments] float64.
    """
    segment_ids = batch.segments
    place = segment_ids >= 0
    values = log_probs.labels[place].astype(np.float64) * batch.loss_mask[place]
    sums = np.bincount(segment_ids[place], values, minlength=batch.num_segments)
    if batch.alternative_labels is not None and log_probs.alternative_labels is not None:
        pivots = batch.alternative_labels >= 0
        rejected = log_probs.alternative_labels[pivots].astype(np.float64) * batch.loss_mask[pivots]
        segments = segment_ids[pivots] + 1
        sums += np.bincount(segments, rejected, minlength=batch.num_segments)
    return sums


def segment_tokens(batch: Batch) -> np.ndarray:
    """Loss tokens of each segment of a micro-batch, [num_segments] float64."""
    segment_ids = batch.segments
    place = segment_ids >= 0
    counts = np.bincount(segment_ids[place], batch.loss_mask[place], minlength=batch.num_segments)
    if batch.alternative_labels is not None:
        pivots = batch.alternative_labels >= 0
        segments = segment_ids[pivots] + 1
        counts += np.bincount(segments, batch.loss_mask[pivots], minlength=batch.num_segments)
    return counts
