"""Index the n-grams of the benchmarks, in arrays proportional to the size of the benchmarks.

Words of the benchmarks have ids; an n-gram is found by a 64-bit hash of its ids and then compared
word by word, so a hit is exact. A window with a word that is in no benchmark is not looked up.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_UNKNOWN = -1


@dataclass(frozen=True)
class _Grams:
    """All distinct n-grams of one length.

    Attributes:
        n: words per gram.
        hashes: uint64 [G], ascending.
        places: int64 [G], position of each gram's first occurrence among all tests' words.
        offsets: int64 [G + 1] into `tests`.
        tests: int32, the tests that contain the gram.
    """

    n: int
    hashes: np.ndarray
    places: np.ndarray
    offsets: np.ndarray
    tests: np.ndarray


class NgramIndex:
    """The n-grams of each test.

    Attributes:
        num_grams: by n, int64 [tests], distinct n-grams of each test.
    """

    def __init__(self, tests: Sequence[Sequence[str]], lengths: Sequence[int]) -> None:
        """Index tests, each a list of words, by n-grams of the given lengths."""
        self._vocabulary: dict[str, int] = {}
        numbers = self._vocabulary
        self._words = np.array(
            [numbers.setdefault(word, len(numbers)) for test in tests for word in test], np.int32
        )
        self._names = list(numbers)
        ends = np.cumsum([len(test) for test in tests], dtype=np.int64)
        test_of = np.repeat(np.arange(len(tests), dtype=np.int32), [len(test) for test in tests])
        self._grams: dict[int, _Grams] = {}
        seed = 0
        while len(self._grams) < len(set(lengths)):
            generator = np.random.default_rng(seed)
            self._salts = generator.integers(2**64, size=len(numbers) + 1, dtype=np.uint64)
            built = {n: self._build(n, ends, test_of) for n in lengths}
            self._grams = {n: grams for n, grams in built.items() if grams is not None}
            seed += 1
        self.num_grams = {
            n: np.bincount(grams.tests, minlength=len(tests)) for n, grams in self._grams.items()
        }

    def number(self, words: Sequence[str]) -> np.ndarray:
        """Return ids of words, int32; -1 for a word that is in no test."""
        get = self._vocabulary.get
        return np.fromiter((get(word, _UNKNOWN) for word in words), np.int32, len(words))

    def find(self, ids: np.ndarray, n: int, starts: np.ndarray | None = None) -> tuple:
        """Find windows of a document that are n-grams of a test.

        Args:
            ids: `number(words)`.
            n: one of the lengths of this index.
            starts: positions to check; all by default.

        Returns:
            (starts, grams): positions and gram indices of the hits; int64, of equal length.
        """
        grams = self._grams[n]
        nothing = np.empty(0, np.int64)
        if starts is None:
            unknown = np.concatenate([[0], np.cumsum(ids == _UNKNOWN)])
            starts = np.flatnonzero(unknown[n:] == unknown[:-n]) if len(ids) >= n else nothing
        if not len(starts) or not len(grams.hashes):
            return nothing, nothing
        hashes = self._hash(ids, n, starts)
        grams_found = np.searchsorted(grams.hashes, hashes)
        grams_found[grams_found == len(grams.hashes)] = 0
        hit = grams.hashes[grams_found] == hashes
        starts, grams_found = starts[hit], grams_found[hit]
        equal = np.ones(len(starts), bool)
        for shift in range(n):
            equal &= self._words[grams.places[grams_found] + shift] == ids[starts + shift]
        return starts[equal], grams_found[equal]

    def tests_of(self, n: int, grams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return tests that contain the given n-grams.

        Returns:
            (owners, tests): pairs of an index into `grams` and a test, of equal length, sorted by
            owner.
        """
        found = self._grams[n]
        firsts = found.offsets[grams]
        counts = found.offsets[grams + 1] - firsts
        owners = np.repeat(np.arange(len(grams)), counts)
        within = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
        return owners, found.tests[np.repeat(firsts, counts) + within]

    def text(self, n: int, gram: int) -> str:
        """Return the words of an n-gram."""
        place = self._grams[n].places[gram]
        return " ".join(self._names[word] for word in self._words[place : place + n])

    def num_distinct(self, n: int) -> int:
        """Distinct n-grams of all tests."""
        return len(self._grams[n].hashes)

    def _hash(self, ids: np.ndarray, n: int, starts: np.ndarray) -> np.ndarray:
        salted = self._salts[ids]
        result = np.zeros(len(starts), np.uint64)
        for shift in range(n):
            result = result * _MULTIPLIER + salted[starts + shift]
        return result

    def _build(self, n: int, ends: np.ndarray, test_of: np.ndarray) -> _Grams | None:
        """Index grams of one length; None if two different ones have equal hashes."""
        places = np.arange(len(self._words), dtype=np.int64)
        places = places[places + n <= ends[test_of]]
        hashes = self._hash(self._words, n, places)
        distinct, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
        for shift in range(n):
            ours = self._words[places + shift]
            if not np.array_equal(ours, ours[first[inverse]]):
                return None
        num_tests = len(ends)
        pairs = np.unique(inverse * num_tests + test_of[places])
        offsets = np.searchsorted(pairs, np.arange(len(distinct) + 1) * num_tests)
        return _Grams(n, distinct, places[first], offsets, (pairs % num_tests).astype(np.int32))


def windows(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """Return all n-grams of a text, in order, with repetitions."""
    return (tuple(words[start : start + n]) for start in range(len(words) - n + 1))
