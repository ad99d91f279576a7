"""Detect corrupted text: windows whose bytes are unlike those of normal text.

Two numbers per window of at most 2,048 bytes: bits per byte under the byte-pair frequencies of
normal text, high for encodings gone wrong, binary data and shuffled letters; and the compression
ratio, low for repetition and high for noise. Normal is estimated from rows, for each size of
window, as median and median absolute deviation, which a few corrupted rows do not move. A text is
judged by its worst window, so that a broken page in a long book is detected.
"""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from phi4.errors import DataError

WINDOW_BYTES = 2048
_SMALLEST_BYTES = 128
_SIZES = (128, 256, 512, 1024, WINDOW_BYTES)
_FEWEST_WINDOWS = 30
_DEVIATION = 1.4826
"""Median absolute deviation to standard deviation of a normal distribution."""
_LEAST_DEVIATION = 0.01
NAMES = ("bits per byte", "compression ratio")


@dataclass(frozen=True)
class Oddity:
    """The most unusual measurement of a text.

    Attributes:
        name: which of the two measures.
        value: its value in the worst window.
        deviations: distance from the median of windows of this size; negative below it.
        start: first byte of the window.
    """

    name: str
    value: float
    deviations: float
    start: int


@dataclass(frozen=True)
class Profile:
    """Statistics of normal text.

    Attributes:
        bits: float32 [256, 256], -log2 of the probability of the second byte after the first.
        median, deviation: float64 [sizes, 2], of windows with the sizes 128, 256, ... 2,048.
    """

    bits: np.ndarray
    median: np.ndarray
    deviation: np.ndarray

    def oddity(self, text: str) -> Oddity | None:
        """Return the worst measure of the worst window; None for texts under 128 bytes.

        Low bits per byte are not unusual: they are very plain text.
        """
        worst = None
        raw = text.encode()
        for start, window in _windows(raw, WINDOW_BYTES):
            if len(window) < _SMALLEST_BYTES:
                continue
            size = int(np.searchsorted(_SIZES, len(window), side="right")) - 1
            values = _measured(window, self.bits)
            deviations = (values - self.median[size]) / self.deviation[size]
            badness = np.array([deviations[0], abs(deviations[1])])
            which = int(badness.argmax())
            if worst is None or badness[which] > abs(worst.deviations):
                worst = Oddity(NAMES[which], float(values[which]), float(deviations[which]), start)
        return worst


def learn_profile(texts: Iterable[str]) -> Profile:
    """Estimate the statistics of normal text from a sample.

    Raises:
        DataError: the sample is too small.
    """
    sample = [text.encode() for text in texts]
    counts = np.ones((256, 256))
    for raw in sample:
        array = np.frombuffer(raw, np.uint8)
        np.add.at(counts, (array[:-1], array[1:]), 1)
    bits = (np.log2(counts.sum(axis=1, keepdims=True)) - np.log2(counts)).astype(np.float32)
    median, deviation = np.empty((len(_SIZES), 2)), np.empty((len(_SIZES), 2))
    for row, size in enumerate(_SIZES):
        windows = (w for raw in sample for _, w in _windows(raw, size) if len(w) == size)
        values = np.array([_measured(window, bits) for window in windows])
        if len(values) >= _FEWEST_WINDOWS:
            median[row] = np.median(values, axis=0)
            spread = np.median(np.abs(values - median[row]), axis=0)
            deviation[row] = np.maximum(_DEVIATION * spread, _LEAST_DEVIATION * median[row])
        elif row:
            # Larger windows vary less; the deviation of the next smaller size is the more lenient
            # one.
            median[row], deviation[row] = median[row - 1], deviation[row - 1]
        else:
            raise DataError(
                f"{len(values)} pieces of {size} bytes are too few to estimate normal text; "
                f"give a reference with at least {_FEWEST_WINDOWS}"
            )
    return Profile(bits, median, deviation)


def _windows(raw: bytes, size: int) -> Iterator[tuple[int, bytes]]:
    for start in range(0, len(raw), size):
        yield start, raw[start : start + size]


def _measured(window: bytes, bits: np.ndarray) -> np.ndarray:
    array = np.frombuffer(window, np.uint8)
    pairs = bits[array[:-1], array[1:]]
    return np.array([pairs.mean(), len(zlib.compress(window, 6)) / len(window)])
