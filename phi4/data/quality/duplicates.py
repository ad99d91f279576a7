"""Exact and near duplicates: the first of them stays.

Equal texts are found by a 128-bit hash, similar ones by MinHash over five-word shingles and
locality-sensitive hashing. The state is one process's and grows with the kept texts, about
5 kB each, so larger corpora are screened source by source. Needs the extra `data`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from phi4.data.quality.rows import Line
from phi4.data.quality.screen import Rejection
from phi4.errors import DataError, PlatformError

try:
    import xxhash
    from datasketch import MinHash, MinHashLSH
except ImportError as error:
    raise PlatformError(
        f"{error.name} finds duplicates and is missing; install it with `pip install phi4[data]`"
    ) from None

_SHINGLE_WORDS = 5
_NUM_PERMUTATIONS = 128
_WORD = re.compile(r"\w+")
# Copies share its permutations, which are slow to draw.
_EMPTY = MinHash(_NUM_PERMUTATIONS, hashfunc=xxhash.xxh32_intdigest, scheme="affine32")


@dataclass(frozen=True)
class Sketch:
    """What is kept of a text.

    Attributes:
        digest: 16 bytes; equal for equal texts.
        signature: uint32 [128], MinHash of the shingles; None when only equal texts are looked for.
    """

    digest: bytes
    signature: np.ndarray | None


class Duplicates:
    """Decisions on rows in their order."""

    def __init__(self, similarity: float | None = 0.8) -> None:
        """Start with nothing seen.

        Args:
            similarity: Jaccard similarity of shingle sets from which on texts are near duplicates;
                None finds equal texts only.

        Raises:
            DataError: similarity is not in (0, 1].
        """
        if similarity is not None and not 0 < similarity <= 1:
            raise DataError(f"similarity {similarity}; expected more than 0 and at most 1")
        self._similarity = similarity
        self._first: dict[bytes, tuple[Path, int]] = {}
        self._signatures: list[np.ndarray] = []
        self._places: list[tuple[Path, int]] = []
        if similarity is not None:
            self._lsh = MinHashLSH(threshold=similarity, num_perm=_NUM_PERMUTATIONS)

    def sketcher(self) -> Callable[[str], Sketch]:
        """The function that sketches texts for these decisions; it carries no state to workers."""
        return partial(sketch, near=self._similarity is not None)

    def decide(self, found: Sketch, line: Line) -> Rejection | None:
        """A rejection for a text that is, or is nearly, one that was kept before."""
        place = (line.path, line.number)
        first = self._first.setdefault(found.digest, place)
        if first is not place:
            return _rejection("exact duplicate", first, 1.0)
        if found.signature is None:
            return None
        minhash = _EMPTY.copy()
        minhash.hashvalues = found.signature
        shares = {
            key: float(np.mean(self._signatures[key] == found.signature))
            for key in self._lsh.query(minhash)
        }
        best = max(sorted(shares), key=shares.__getitem__, default=None)
        if best is not None and shares[best] >= self._similarity:
            return _rejection("near duplicate", self._places[best], shares[best])
        self._lsh.insert(len(self._places), minhash)
        self._signatures.append(found.signature)
        self._places.append(place)
        return None


def sketch(text: str, near: bool = True) -> Sketch:
    """Hash a text, and its shingles when near duplicates matter.

    Shingles are five words in lower case without punctuation; a shorter text is one shingle.
    """
    digest = xxhash.xxh3_128_digest(text.encode())
    if not near:
        return Sketch(digest, None)
    words = _WORD.findall(text.lower())
    last = max(1, len(words) - _SHINGLE_WORDS + 1)
    shingles = {" ".join(words[i : i + _SHINGLE_WORDS]).encode() for i in range(last)}
    minhash = _EMPTY.copy()
    minhash.update_batch(shingles)
    return Sketch(digest, minhash.hashvalues)


def _rejection(reason: str, first: tuple[Path, int], similarity: float) -> Rejection:
    path, number = first
    return Rejection(
        reason, {"of": {"file": str(path), "line": number}, "similarity": round(similarity, 4)}
    )
