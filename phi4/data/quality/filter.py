"""The filter of corrupted text and foreign languages: what a row must look like to be kept.

Which language a text has is asked of a callable from outside; no model comes with this package.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path

from phi4.data.quality.corruption import Oddity, Profile, learn_profile
from phi4.data.quality.rows import MAX_ROW_BYTES, Line, RowError, parse, read_lines, text_of
from phi4.data.quality.screen import Rejection
from phi4.errors import DataError

Identify = Callable[[str], str]
"""A text in, the code of its language out."""


@dataclass(frozen=True)
class Findings:
    """What the filter decides on."""

    oddity: Oddity | None
    language: str | None


@dataclass(frozen=True)
class Filter:
    """Limits of what is kept.

    Attributes:
        profile: normal text, from `learn_profile`; one of many languages finds none of them odd
            only if all of them are common in it.
        max_deviations: a text is kept while its worst window is within these of the median.
        identify: names the language of a text; a function of a module when there are worker
            processes.
        languages: codes that are kept; all when empty.
    """

    profile: Profile
    max_deviations: float = 8.0
    identify: Identify | None = None
    languages: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        """Check that the settings belong together."""
        if self.max_deviations <= 0:
            raise DataError(f"max_deviations {self.max_deviations}; expected more than 0")
        if (self.identify is None) != (not self.languages):
            raise DataError("languages and a function that identifies them go together; give both")

    def analyse(self, text: str) -> Findings:
        """Measure a text; depends on no other.

        Raises:
            DataError: the callable gave no language code.
        """
        language = self.identify(text) if self.identify else None
        if self.identify and not isinstance(language, str):
            raise DataError(
                f"{self.identify.__name__} gave {language!r:.60}; expected a language code as text"
            )
        return Findings(self.profile.oddity(text), language)

    def decide(self, found: Findings, _: Line) -> Rejection | None:
        """A rejection for a text that is odd or of another language."""
        oddity = found.oddity
        if oddity is not None and abs(oddity.deviations) > self.max_deviations:
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


def learn_from_rows(
    paths: Sequence[Path], rows_per_file: int = 5000, max_row_bytes: int = MAX_ROW_BYTES
) -> Profile:
    """What is normal in the first rows of each file; rows that cannot be read teach nothing.

    Raises:
        DataError: a file cannot be read, or the rows are too few.
    """

    def texts() -> Iterator[str]:
        for path in paths:
            for line in islice(read_lines([path], max_row_bytes), rows_per_file):
                try:
                    yield text_of(parse(line, max_row_bytes))
                except RowError:
                    continue

    return learn_profile(texts())


def load_identify(name: str) -> Identify:
    """A function given as `module:function`.

    Raises:
        DataError: there is no such function.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(f"{name} cannot be loaded ({error}); expected module:function") from None
    if not callable(found):
        raise DataError(f"{name} is no function; expected one from a text to a language code")
    return found
