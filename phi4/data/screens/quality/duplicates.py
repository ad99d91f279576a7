"""Detect exact and near duplicates, of which the first is kept.

Equal texts are found by a 128-bit hash. Similar ones are proposed by locality-sensitive hashing of
MinHash signatures, tuned for high recall, and then verified by the shingles themselves. The state
belongs to one process and grows with the kept texts, at most 8 kB each, so larger corpora are
processed source by source. Needs the extra `data`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from phi4.data.screens.quality.rows import Line
from phi4.data.screens.quality.screen import Rejection
from phi4.data.screens.words import split_words
from phi4.errors import DataError, PlatformError

try:
    import xxhash
    from datasketch import MinHash
except ImportError as error:
    raise PlatformError(
        f"{error.name} is needed to find duplicates and is missing; install it with `pip install "
        f"phi4[data]`"
    ) from None

_SHINGLE_WORDS = 5
_NUM_PERMUTATIONS = 128
_MAX_SHINGLES = 1024
"""Texts with more shingles are compared by their smallest hashes, a fair sample."""
_MISSED = 0.02
"""Fraction of the texts at exactly the requested similarity that hashing may miss."""
# Copies share its permutations, which are slow to draw.
_EMPTY = MinHash(_NUM_PERMUTATIONS, hashfunc=int, scheme="affine32")
_MIXER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Sketch:
    """The stored state of a text.

    Attributes:
        digest: 16 bytes; equal for equal texts.
        signature: uint32 [128], MinHash of the shingles; None where only equal texts count.
        shingles: uint32 [n], the n <= 1024 smallest hashes of shingles in ascending order.
    """

    digest: bytes
    signature: np.ndarray | None = None
    shingles: np.ndarray | None = None


class Duplicates:
    """Decisions on rows in their order."""

    def __init__(self, similarity: float | None = 0.8) -> None:
        """Start with nothing seen.

        Args:
            similarity: Jaccard similarity of the sets of shingles at or above which texts are near
                duplicates; None finds equal texts only. It is exact between texts with together at
                most 1,024 shingles. For longer ones it is estimated with a standard deviation of at
                most 0.013, and the limit is two of these lower.

        Raises:
            DataError: similarity is not in (0, 1].
        """
        if similarity is not None and not 0 < similarity <= 1:
            raise DataError(f"similarity {similarity}; expected more than 0 and at most 1")
        self._similarity = similarity
        self._first: dict[bytes, tuple[Path, int]] = {}
        self._near = None if similarity is None else _Neighbours(similarity)

    def sketcher(self) -> Callable[[str], Sketch]:
        """Return the function that sketches texts for these decisions; it carries no state to
        workers."""
        return partial(sketch, near=self._similarity is not None)

    def decide(self, found: Sketch, line: Line) -> Rejection | None:
        """Return a rejection for a text that equals or nearly equals one that was kept before."""
        place = (line.path, line.number)
        first = self._first.setdefault(found.digest, place)
        if first is not place:
            return _rejection("exact duplicate", first, 1.0)
        if self._near is None or found.signature is None:
            return None
        neighbour = self._near.find(found)
        if neighbour is None:
            self._near.add(found, place)
            return None
        return _rejection("near duplicate", *neighbour)


class _Neighbours:
    """Kept texts, found by their similarity."""

    def __init__(self, similarity: float) -> None:
        self._similarity = similarity
        self._rows = _rows_per_band(similarity)
        self._margin = 2 * (similarity * (1 - similarity) / _MAX_SHINGLES) ** 0.5
        # Three standard deviations below the similarity misses one in seven hundred.
        deviation = (similarity * (1 - similarity) / _NUM_PERMUTATIONS) ** 0.5
        self._least_share = similarity - 3 * deviation
        # One index is the common case, and a list of it would take most of the memory.
        self._bands: list[dict[bytes, int | list[int]]] = [
            {} for _ in range(_NUM_PERMUTATIONS // self._rows)
        ]
        self._signatures = np.empty((1024, _NUM_PERMUTATIONS), np.uint32)
        self._shingles: list[np.ndarray] = []
        self._places: list[tuple[Path, int]] = []

    def find(self, found: Sketch) -> tuple[tuple[Path, int], float] | None:
        """Return place and similarity of a similar enough text, the likeliest first."""
        assert found.signature is not None and found.shingles is not None
        proposed: set[int] = set()
        for band, key in zip(self._bands, self._keys(found.signature), strict=True):
            members = band.get(key)
            if members is not None:
                proposed.update((members,) if isinstance(members, int) else members)
        candidates = np.fromiter(sorted(proposed), np.int64, len(proposed))
        shares = np.mean(self._signatures[candidates] == found.signature, axis=1)
        for which in np.argsort(-shares, kind="stable").tolist():
            if shares[which] < self._least_share:
                return None
            index = int(candidates[which])
            similarity, is_exact = _jaccard(self._shingles[index], found.shingles)
            if similarity >= self._similarity - (0 if is_exact else self._margin):
                return self._places[index], similarity
        return None

    def add(self, found: Sketch, place: tuple[Path, int]) -> None:
        """Keep a text."""
        assert found.signature is not None and found.shingles is not None
        index = len(self._places)
        if index == len(self._signatures):
            self._signatures = np.concatenate([self._signatures, np.empty_like(self._signatures)])
        self._signatures[index] = found.signature
        self._shingles.append(found.shingles)
        self._places.append(place)
        for band, key in zip(self._bands, self._keys(found.signature), strict=True):
            members = band.setdefault(key, index)
            if isinstance(members, list):
                members.append(index)
            elif members != index:
                band[key] = [members, index]

    def _keys(self, signature: np.ndarray) -> list[bytes]:
        whole, width = signature.tobytes(), self._rows * signature.itemsize
        return [whole[i * width : (i + 1) * width] for i in range(len(self._bands))]


def sketch(text: str, near: bool = True) -> Sketch:
    """Hash a text, and its shingles if near duplicates matter.

    Shingles are five words of `split_words`. A text of fewer words is only a duplicate of equal
    texts: it is too short to tell `a + b` from `a - b`.
    """
    digest = xxhash.xxh3_128_digest(text.encode())
    words = split_words(text) if near else []
    if len(words) < _SHINGLE_WORDS:
        return Sketch(digest)
    hash_of = {word: xxhash.xxh3_64_intdigest(word.encode()) for word in set(words)}
    hashes = np.fromiter(map(hash_of.__getitem__, words), np.uint64, len(words))
    last = len(words) - _SHINGLE_WORDS + 1
    shingles = np.zeros(last, np.uint64)
    for shift in range(_SHINGLE_WORDS):
        shingles = (shingles ^ hashes[shift : shift + last]) * _MIXER
    shingles = np.unique((shingles >> np.uint64(32)).astype(np.uint32))
    minhash = _EMPTY.copy()
    minhash.update_batch(shingles.tolist())
    return Sketch(digest, minhash.hashvalues, shingles[:_MAX_SHINGLES].copy())


def _jaccard(a: np.ndarray, b: np.ndarray) -> tuple[float, bool]:
    """Return the similarity of two sets by their smallest hashes, and whether it is exact."""
    merged = np.sort(np.concatenate([a, b]))
    is_shared = merged[1:] == merged[:-1]
    union = np.delete(merged, np.flatnonzero(is_shared) + 1)[:_MAX_SHINGLES]
    num_shared = np.count_nonzero(merged[1:][is_shared] <= union[-1])
    return num_shared / len(union), len(union) < _MAX_SHINGLES


def _rows_per_band(similarity: float) -> int:
    """Return the most rows, which propose the fewest pairs, that miss at most `_MISSED` of the
    similar ones."""
    rows = range(_NUM_PERMUTATIONS, 1, -1)
    enough = (r for r in rows if (1 - similarity**r) ** (_NUM_PERMUTATIONS // r) <= _MISSED)
    return next(enough, 1)


def _rejection(reason: str, first: tuple[Path, int], similarity: float) -> Rejection:
    path, number = first
    return Rejection(
        reason, {"of": {"file": str(path), "line": number}, "similarity": round(similarity, 4)}
    )
