"""Choose the points of a long curve to draw: the extremes of every bin, so that no spike is
lost."""

from itertools import pairwise

import numpy as np


def kept_points(values: np.ndarray, limit: int) -> np.ndarray:
    """Return indices of the points to draw, increasing.

    These are the smallest and the largest value of each of equal bins, and the first and the last
    point.

    Args:
        values: [n], finite.
        limit: at least 4; the maximum number of points. Shorter curves are kept unchanged.
    """
    if values.size <= limit:
        return np.arange(values.size)
    num_bins = (limit - 2) // 2
    edges = np.linspace(0, values.size, num_bins + 1).astype(int)
    kept = {0, values.size - 1}
    for begin, end in pairwise(edges):
        some = values[begin:end]
        kept |= {begin + int(some.argmin()), begin + int(some.argmax())}
    return np.array(sorted(kept))
