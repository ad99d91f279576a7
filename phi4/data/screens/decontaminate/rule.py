"""The report's hybrid rule: a shared 13-gram is contamination; 7-grams count by their share.

Source: report, appendix B.1, algorithm 1. It states no thresholds; ours come from the self-test.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from phi4.data.screens.decontaminate.benchmark import Item
from phi4.data.screens.decontaminate.index import NgramIndex, windows
from phi4.data.screens.decontaminate.normalise import NORMALISATIONS
from phi4.errors import DataError

LONG, SHORT = 13, 7
_SHOWN_GRAMS, _SHOWN_MATCHES = 20, 20


class Finding(StrEnum):
    """Result of the rule for a text."""

    LONG_MATCH = "13-gram match"
    SHORT_MATCH = "7-gram match"
    PARTIAL = "7-gram info match"
    CLEAN = "clean"

    @property
    def contaminated(self) -> bool:
        """Whether the text is excluded from training."""
        return self in (Finding.LONG_MATCH, Finding.SHORT_MATCH)


@dataclass(frozen=True)
class Thresholds:
    """Thresholds of the share of common 7-grams.

    Attributes:
        info: above it a text is a partial match, which is reported but kept.
        contaminated: at or above it a text is contaminated.
    """

    info: float
    contaminated: float

    def __post_init__(self) -> None:
        """Check the order."""
        if not 0 <= self.info <= self.contaminated <= 1:
            raise DataError(
                f"7-gram thresholds info={self.info}, contaminated={self.contaminated}; expected "
                "0 <= info <= contaminated <= 1"
            )


DEFAULT_THRESHOLDS = {
    "robust": Thresholds(info=0.1, contaminated=0.2),
    "paper": Thresholds(info=0.05, contaminated=0.1),
}
"""Thresholds chosen on one half of the self-test."""


def default_thresholds(normalisation: str) -> Thresholds:
    """Return the thresholds of a normalisation.

    Raises:
        DataError: it is unknown.
    """
    if normalisation not in DEFAULT_THRESHOLDS:
        raise DataError(
            f"normalisation {normalisation!r}; expected one of {', '.join(DEFAULT_THRESHOLDS)}"
        )
    return DEFAULT_THRESHOLDS[normalisation]


@dataclass(frozen=True)
class Match:
    """What a text has in common with one item.

    Attributes:
        item: its index.
        ratio: shared 7-grams divided by those of the smaller of the two.
        grams: some of the shared n-grams, 13-grams if there are any; empty from the twenty-first
            match of a text on.
        has_long: whether 13-grams are shared.
    """

    item: int
    ratio: float
    grams: tuple[str, ...]
    has_long: bool


@dataclass(frozen=True)
class Verdict:
    """The rule's result, with matches sorted by descending share."""

    finding: Finding
    matches: tuple[Match, ...] = ()


class Detector:
    """The rule over a set of benchmark items.

    Attributes:
        items: as given.
        too_short: by item, True if it has fewer than seven words: it cannot be found.
    """

    def __init__(
        self,
        items: Sequence[Item],
        normalisation: str = "robust",
        thresholds: Thresholds | None = None,
    ) -> None:
        """Index the items.

        Args:
            items: items of any number of benchmarks.
            normalisation: how items and texts are split into words.
            thresholds: default to those of the normalisation.

        Raises:
            DataError: the normalisation is unknown.
        """
        self.items = tuple(items)
        self.normalisation = normalisation
        self.thresholds = thresholds or default_thresholds(normalisation)
        self._normalise = NORMALISATIONS[normalisation]
        self._index = NgramIndex([self._normalise(item.text) for item in items], (LONG, SHORT))
        self._allowed = np.zeros(self._index.num_distinct(LONG), bool)
        self.too_short = self._index.num_grams[SHORT] == 0

    def check(self, text: str) -> Verdict:
        """Apply the rule to one training text."""
        words = self._normalise(text)
        ids = self._index.number(words)
        starts, grams = self._index.find(ids, SHORT)
        if not len(starts):
            return Verdict(Finding.CLEAN)
        long_starts, long_grams = self._long(ids, starts)
        not_allowed = ~self._allowed[long_grams]
        long_starts, long_grams = long_starts[not_allowed], long_grams[not_allowed]
        ratios = self._ratios(words, np.unique(grams))
        finding = self._finding(len(long_starts) > 0, max(ratios.values()))
        if finding is Finding.CLEAN:
            return Verdict(finding)
        places = {LONG: self._places(long_starts, long_grams, LONG)}
        places[SHORT] = self._places(starts, grams, SHORT)
        has_long = set(places[LONG][0].tolist())
        ordered = sorted(ratios, key=lambda item: (item not in has_long, -ratios[item], item))
        matches: list[Match] = []
        for item in ordered:
            n = LONG if item in has_long else SHORT
            if n == LONG or ratios[item] > self.thresholds.info:
                shown = () if len(matches) >= _SHOWN_MATCHES else _shown(words, places[n], item, n)
                matches.append(Match(item, ratios[item], shown, n == LONG))
        return Verdict(finding, tuple(matches))

    def long_grams(self, text: str) -> np.ndarray:
        """Return the distinct 13-grams of the items that a text contains, as numbers; for
        `allow_common`."""
        ids = self._index.number(self._normalise(text))
        starts, _ = self._index.find(ids, SHORT)
        return np.unique(self._long(ids, starts)[1])

    def allow_common(self, texts_grams: Iterable[np.ndarray], min_texts: int = 2) -> None:
        """Allow the 13-grams that several texts of a reference corpus contain.

        Args:
            texts_grams: `long_grams` of each text of a corpus that contains no benchmark.
            min_texts: a phrase is common from this many texts on.
        """
        counts = np.zeros(len(self._allowed), np.int64)
        for grams in texts_grams:
            counts[grams] += 1
        self._allowed |= counts >= min_texts

    def allowed(self) -> list[str]:
        """Return the 13-grams on the allow-list."""
        return [self._index.text(LONG, gram) for gram in np.flatnonzero(self._allowed)]

    def _long(self, ids: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # A 13-gram of a test begins and ends with a 7-gram of that test.
        candidates = np.intersect1d(starts, starts - (LONG - SHORT), assume_unique=True)
        return self._index.find(ids, LONG, candidates)

    def _ratios(self, words: Sequence[str], shared: np.ndarray) -> dict[int, float]:
        """Return shares of common 7-grams of the items that have any."""
        items, counts = np.unique(self._index.tests_of(SHORT, shared)[1], return_counts=True)
        sizes = self._index.num_grams[SHORT][items]
        smaller = np.minimum(sizes, _num_distinct(words, int(sizes.max())))
        return dict(zip(items.tolist(), (counts / smaller).tolist(), strict=True))

    def _places(
        self, starts: np.ndarray, grams: np.ndarray, n: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return items of the distinct n-grams of a text, and the position where each first
        occurs."""
        distinct, first = np.unique(grams, return_index=True)
        owners, items = self._index.tests_of(n, distinct)
        return items, starts[first[owners]]

    def _finding(self, has_long: bool, ratio: float) -> Finding:
        if has_long:
            return Finding.LONG_MATCH
        if ratio <= self.thresholds.info:
            return Finding.CLEAN
        return Finding.SHORT_MATCH if ratio >= self.thresholds.contaminated else Finding.PARTIAL


def _shown(
    words: Sequence[str], places: tuple[np.ndarray, np.ndarray], item: int, n: int
) -> tuple[str, ...]:
    items, first_words = places
    starts = np.unique(first_words[items == item])[:_SHOWN_GRAMS].tolist()
    return tuple(" ".join(words[start : start + n]) for start in starts)


def _num_distinct(words: Sequence[str], limit: int) -> int:
    """Count distinct 7-grams of a text, up to a limit."""
    seen: set[tuple[str, ...]] = set()
    for gram in windows(words, SHORT):
        seen.add(gram)
        if len(seen) == limit:
            break
    return len(seen)
