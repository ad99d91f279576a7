"""A reusable buffer in which documents are collected and sorted.

It is reused because fresh pages cost more than the copying: allocating them would take a tenth of
the time of tokenization and most of a merge's.
"""

import numpy as np


class SortBuffer:
    """Tokens of consecutive documents, and the same documents in another order."""

    def __init__(self) -> None:
        self._tokens, self._sorted = np.empty((2, 0), dtype="<i4")

    def room(self, used: int, num_tokens: int) -> np.ndarray:
        """Return space after the first `used` tokens, which are kept, [num_tokens] int32 to
        fill."""
        needed = used + num_tokens
        if needed > self._tokens.size:
            grown = np.empty(max(needed, 2 * self._tokens.size), dtype="<i4")
            grown[:used] = self._tokens[:used]
            self._tokens = grown
        return self._tokens[used:needed]

    def sorted(self, lengths: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Return the first documents in another order; valid until the next call.

        Args:
            lengths: [n], tokens of each document.
            order: [n], indices of the documents.

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
