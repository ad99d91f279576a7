"""Memory in which documents are collected and put in order, again and again.

It is kept because fresh pages cost more than the copying: without it, they are a tenth of the time
of tokenization and most of a merge's.
"""

import numpy as np


class SortBuffer:
    """Tokens of documents one after another, and the same documents in another order."""

    def __init__(self) -> None:
        self._tokens, self._sorted = np.empty((2, 0), dtype="<i4")

    def room(self, used: int, num_tokens: int) -> np.ndarray:
        """Places after the first `used`, which keep their content, [num_tokens] int32 to fill."""
        needed = used + num_tokens
        if needed > self._tokens.size:
            grown = np.empty(max(needed, 2 * self._tokens.size), dtype="<i4")
            grown[:used] = self._tokens[:used]
            self._tokens = grown
        return self._tokens[used:needed]

    def sorted(self, lengths: np.ndarray, order: np.ndarray) -> np.ndarray:
        """The first documents in another order; good until the next call.

        Args:
            lengths: [n], tokens of each document.
            order: [n], places of the documents.

        Returns:
            [sum of lengths], int32.
        """
        ends = np.cumsum(lengths, dtype=np.int64)
        places = zip((ends - lengths)[order].tolist(), ends[order].tolist(), strict=True)
        num_tokens = int(ends[-1])
        if num_tokens > self._sorted.size:
            self._sorted = np.empty(self._tokens.size, dtype="<i4")
        pieces = [self._tokens[begin:end] for begin, end in places]
        return np.concatenate(pieces, out=self._sorted[:num_tokens])
