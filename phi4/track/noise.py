"""Confidence intervals of means and medians of steps with autocorrelated noise."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

LEVEL = 0.95
"""Confidence level of every interval."""

MIN_INDEPENDENT = 12
"""Minimum number of independent steps; with fewer the width of an interval is unreliable."""

_FEWEST, _MOST = 6, 10
"""Number of batches of a mean. More would narrow the interval only slightly, and be too short for
noise with a small long-range component."""

_BATCH_TIMES = 4
"""Length of a batch in steps, in autocorrelation times."""

_NUM_DRAWS = 1_000
_LONGEST = 2_000
"""Maximum number of values of a median; more add no information."""


@dataclass(frozen=True)
class IntervalEstimate:
    """A number with its 95% interval.

    Attributes:
        value: the number.
        low: lower end.
        high: upper end.
        num_independent: effective number of independent values.
    """

    value: float
    low: float
    high: float
    num_independent: float

    @property
    def is_sound(self) -> bool:
        """Whether the width is reliable."""
        return self.num_independent >= MIN_INDEPENDENT

    def excludes(self, value: float) -> bool:
        """Return whether a value is outside the interval."""
        return not self.low <= value <= self.high


def mean_of(values: np.ndarray) -> IntervalEstimate:
    """Estimate the mean of a series and its interval by batch means.

    A batch is several autocorrelation times long, so that the means of batches are nearly
    independent. Their remaining dependence is that of an AR(1) process with the series' own first
    autocorrelation, and is corrected for. Source: Alexopoulos and Seila 1996 (batch means).

    Args:
        values: [n], n > 1, finite, in order.
    """
    memory = _memory(values)
    num_batches = int(np.clip(values.size // (_BATCH_TIMES * _times(memory)), _FEWEST, _MOST))
    num_batches = min(num_batches, values.size)
    begins = np.linspace(0, values.size, num_batches + 1).astype(int)
    means = np.add.reduceat(values, begins[:-1]) / np.diff(begins)
    of_batch, of_all = (
        _variance_of_mean(memory, size) for size in (values.size / num_batches, values.size)
    )
    seen = num_batches / (num_batches - 1) * (of_batch - of_all)
    half = student_quantile((1 + LEVEL) / 2, num_batches - 1)
    half *= float(means.std(ddof=1)) * math.sqrt(of_all / seen)
    mean = float(values.mean())
    return IntervalEstimate(mean, mean - half, mean + half, values.size / _times(memory))


def ratio_of_medians(above: np.ndarray, below: np.ndarray) -> IntervalEstimate:
    """Estimate median over median and its interval, by a moving block bootstrap with a fixed seed.

    Args:
        above: [n], positive, in order.
        below: [m], positive, in order.
    """
    above, below = _thinned(above), _thinned(below)
    random = np.random.default_rng(0)
    drawn = _medians(above, random) / _medians(below, random)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    independent = min(values.size / _times(_memory(values)) for values in (above, below))
    return IntervalEstimate(float(np.median(above) / np.median(below)), low, high, independent)


def student_quantile(probability: float, freedom: int) -> float:
    """Return a quantile of Student's t, accurate to 1% from 3 degrees of freedom on.

    Source: Abramowitz and Stegun, 26.7.5.
    """
    z, n = NormalDist().inv_cdf(probability), freedom
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4)
    )


def _memory(values: np.ndarray) -> float:
    """Return the first autocorrelation, corrected for its bias in short series; in [0, 1)."""
    apart = values - values.mean()
    spread = float(apart @ apart)
    if spread == 0:
        return 0.0
    first = float(apart[1:] @ apart[:-1]) / spread
    return min(max(first + (1 + 3 * max(first, 0.0)) / values.size, 0.0), 0.99)


def _times(memory: float) -> float:
    """Return the number of steps equivalent to one independent step, for AR(1) noise."""
    return (1 + memory) / (1 - memory)


def _variance_of_mean(memory: float, size: float) -> float:
    """Return the variance of the mean of AR(1) noise with variance 1."""
    ends = 2 * memory * (1 - memory**size) / (size * (1 - memory**2))
    return _times(memory) / size * (1 - ends)


def _thinned(values: np.ndarray) -> np.ndarray:
    return values[:: math.ceil(values.size / _LONGEST)]


def _medians(values: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return medians of series that are assembled from blocks of the given one."""
    size = values.size
    length = min(size, max(1, round(_BATCH_TIMES * _times(_memory(values)))))
    num_blocks = math.ceil(size / length)
    begins = random.integers(size - length + 1, size=(_NUM_DRAWS, num_blocks))
    places = (begins[:, :, None] + np.arange(length)).reshape(_NUM_DRAWS, -1)[:, :size]
    return np.median(values[places], axis=1)
