"""Check whether a passage already occurs in clean text, without using words or n-grams of words.

The self-test's ground truth must be independent of the rule that it tests. This check uses runs of
eight letters, in any order: an item is not inserted if a single clean passage contains half of it.
"""

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable

_RUN = 8
_SAMPLED = 4
_LEAKED_SHARE = 0.5
_FEWEST_LETTERS = 40
_NO_LETTERS = re.compile(r"[\W\d_]+")


class CleanText:
    """Passages, indexed by the runs of letters in them."""

    def __init__(self, passages: Iterable[str]) -> None:
        """Index passages."""
        self._passages_of: defaultdict[int, list[int]] = defaultdict(list)
        for number, passage in enumerate(passages):
            for run in _runs(passage):
                self._passages_of[run].append(number)

    def holds(self, text: str) -> bool:
        """Return whether one passage contains half of a text's runs; False for texts of under 40
        letters."""
        runs = _runs(text)
        if len(_letters(text)) < _FEWEST_LETTERS or not runs:
            return False
        shared = Counter(number for run in runs for number in self._passages_of.get(run, ()))
        return max(shared.values(), default=0) >= _LEAKED_SHARE * len(runs)


def _letters(text: str) -> bytes:
    return _NO_LETTERS.sub("", text).lower().encode()


def _runs(text: str) -> set[int]:
    """Return checksums of runs of letters; a fixed quarter of all, to save memory."""
    letters = _letters(text)
    sums = (zlib.crc32(letters[start : start + _RUN]) for start in range(len(letters) - _RUN + 1))
    return {value for value in sums if value % _SAMPLED == 0}
