"""Filter corrupted text and unwanted languages.

The language is identified by an external callable; no model is included in this package.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path

from phi4.data.screens.quality.corruption import Oddity, Profile, learn_profile
from phi4.data.screens.quality.inputs import list_inputs
from phi4.data.screens.quality.rows import (
    DEFAULT_FORMAT,
    Line,
    RowError,
    RowFormat,
    parse,
    read_lines,
    text_of,
)
from phi4.data.screens.quality.screen import Rejection, Rule
from phi4.errors import DataError

Identify = Callable[[str], str]
"""Maps a text to the code of its language."""

ACCEPTED_SHARE = 0.1
"""Corruption is rare in text that is worth filtering; a larger fraction indicates that the profile
was learned from the wrong text."""
_LEARNT_ROWS_PER_FILE = 5_000
_LEARNT_ROWS = 50_000


@dataclass(frozen=True)
class TextFindings:
    """Measurements that the filter decides on."""

    oddity: Oddity | None
    language: str | None


@dataclass(frozen=True)
class Filter:
    """Limits for keeping a text.

    Attributes:
        profile: normal text, from `learn_profile`; a profile of many languages accepts all that are
            common in it.
        max_deviations: a text is kept if its worst window is within this distance of the median.
        identify: returns the language of a text; must be a module-level function if there are
            worker processes.
        languages: codes that are kept; all when empty.
    """

    profile: Profile
    max_deviations: float = 8.0
    identify: Identify | None = None
    languages: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        """Check that the settings are consistent."""
        if self.max_deviations <= 0:
            raise DataError(f"max_deviations {self.max_deviations}; expected more than 0")
        if (self.identify is None) != (not self.languages):
            raise DataError(
                "languages needs a function that identifies them, and vice versa; give both"
            )

    def analyse(self, text: str) -> TextFindings:
        """Measure a text, independently of others.

        Raises:
            DataError: the callable returned no language code.
        """
        language = self.identify(text) if self.identify else None
        if self.identify and not isinstance(language, str):
            raise DataError(
                f"{self.identify.__name__} returned {language!r:.60}; expected a language code as "
                f"text"
            )
        return TextFindings(self.profile.oddity(text), language)

    def is_odd(self, found: TextFindings) -> bool:
        """Return whether a text is corrupted."""
        return found.oddity is not None and abs(found.oddity.deviations) > self.max_deviations

    def decide(self, found: TextFindings, _: Line) -> Rejection | None:
        """Return a rejection for a text that is corrupted or in another language."""
        oddity = found.oddity
        if oddity is not None and self.is_odd(found):
            side = "high" if oddity.deviations > 0 else "low"
            details = {
                "value": round(oddity.value, 4),
                "deviations": round(oddity.deviations, 2),
                "start_byte": oddity.start,
            }
            return Rejection(f"{side} {oddity.name}", details)
        if self.languages and found.language not in self.languages:
            return Rejection("other language", {"language": found.language})
        return None


class CorruptionLimit:
    """A filter's decisions, with a limit on the fraction of rejected texts.

    The profile is what most of the sample is. If that is the corrupted part, a filter keeps exactly
    what it should reject, which only the total fraction reveals.
    """

    def __init__(self, keep: Filter, accepted_share: float, remedy: str) -> None:
        """Start with nothing decided.

        Args:
            keep: decides on single texts.
            accepted_share: maximum fraction of the texts that are long enough to be judged.
            remedy: what to do about a larger one.

        Raises:
            DataError: the share is not in [0, 1].
        """
        if not 0 <= accepted_share <= 1:
            raise DataError(f"accepted share {accepted_share}; expected 0 to 1")
        self._keep = keep
        self._accepted_share = accepted_share
        self._remedy = remedy
        self._num_judged = 0
        self._reasons: Counter[str] = Counter()

    def rule(self) -> Rule[TextFindings]:
        """Return the filter for `screen`."""
        return Rule(self._keep.analyse, self.decide, self.conclude)

    def decide(self, found: TextFindings, line: Line) -> Rejection | None:
        """Decide as the filter does, and count."""
        rejection = self._keep.decide(found, line)
        self._num_judged += found.oddity is not None
        if rejection is not None and self._keep.is_odd(found):
            self._reasons[rejection.reason] += 1
        return rejection

    def conclude(self) -> None:
        """Raise an error if too much was rejected.

        Raises:
            DataError: too many texts were found to be corrupted.
        """
        odd = self._reasons.total()
        if odd > self._accepted_share * self._num_judged:
            reasons = ", ".join(f"{count} {name}" for name, count in self._reasons.most_common())
            raise DataError(
                f"{odd} of {self._num_judged} texts would be quarantined as corrupted ({reasons}), "
                f"the limit is {self._accepted_share:.0%}; nothing was kept: {self._remedy}"
            )


def learn_from_rows(paths: Sequence[Path], row_format: RowFormat = DEFAULT_FORMAT) -> Profile:
    """Estimate normal text from the first rows of each file; unreadable rows are ignored.

    At most 5,000 rows of a file and 50,000 of all are held in memory.

    Raises:
        DataError: a file cannot be read, or the rows are too few.
    """
    files = [item.path for item in list_inputs(paths)]
    rows_per_file = max(1, min(_LEARNT_ROWS_PER_FILE, _LEARNT_ROWS // max(1, len(files))))

    def texts() -> Iterator[str]:
        for path in files[:_LEARNT_ROWS]:
            for line in islice(read_lines([path], row_format), rows_per_file):
                try:
                    yield text_of(parse(line, row_format), row_format)
                except RowError:
                    continue

    return learn_profile(texts())


def load_identify(name: str) -> Identify:
    """Load a function given as `module:function`.

    Raises:
        DataError: there is no such function.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(f"{name} cannot be loaded ({error}); expected module:function") from None
    if not callable(found):
        raise DataError(
            f"{name} is not a function; expected one that maps a text to a language code"
        )
    return found
