"""Add pairs to a micro-batch as an objective needs them: segments, alternative labels,
references."""

from dataclasses import replace

import numpy as np

from phi4.data.stream.batch import Batch
from phi4.data.stream.units import PairColumns


def with_pairs(batch: Batch, pairs: PairColumns, tokens_per_pair: float) -> Batch:
    """Add the pairs of its rows to a batch.

    Segments 2i and 2i + 1 of the batch are the chosen and the rejected side of its pair i. Segment
    extras are `tokens_per_pair` and, with a reference cache, `reference`.

    Args:
        batch: B rows.
        pairs: pairs of the same rows.
        tokens_per_pair: mean number of loss tokens of a chosen side over the global batch.
    """
    before = 2 * (np.cumsum(pairs.num_pairs) - pairs.num_pairs)
    segment_ids = np.where(pairs.segment_ids < 0, -1, pairs.segment_ids + before[:, None])
    num_segments = 2 * int(pairs.num_pairs.sum())
    extras = {"tokens_per_pair": np.full(num_segments, tokens_per_pair)}
    rows = zip(pairs.reference, pairs.num_pairs.tolist(), strict=True)
    reference = np.concatenate([row_S2[:count].reshape(-1) for row_S2, count in rows])
    if not np.isnan(reference).any():
        extras["reference"] = reference
    return replace(
        batch,
        segment_ids=segment_ids,
        num_segments=num_segments,
        alternative_labels=pairs.alternatives if (pairs.alternatives >= 0).any() else None,
        segment_extras=extras,
    )
