"""Split text into words in two ways: the report's, and one that is robust to formatting."""

import html
import re
import string
import unicodedata
from collections.abc import Callable

from phi4.data.screens.words import split_words

Normaliser = Callable[[str], list[str]]

_PAPER_SPACES = str.maketrans({mark: " " for mark in string.punctuation if mark not in "()"})
_RUN_OF_SPACES = re.compile(" {2,}")


def paper(text: str) -> list[str]:
    """Split as in the report's examples.

    Lower case; punctuation except parentheses becomes a space; runs of spaces become one; the text
    is split at single spaces, so a text that ends in punctuation has an empty last word. On the
    report's worked example this gives 38 and 41 7-grams, 15 of them shared. The report shows no
    line break: here they stay inside words, which is the literal reading of that split.

    Source: report, appendix B.1.
    """
    return _RUN_OF_SPACES.sub(" ", text.lower().translate(_PAPER_SPACES)).split(" ")


def robust(text: str) -> list[str]:
    """Split into words that do not depend on line breaks, case, punctuation or the format of
    numbers.

    The words of `split_words`, with HTML entities decoded and words joined that were hyphenated at
    a line end. A number is one word regardless of thousands separators and digits, `1,000` like
    `1000.0`; a fraction is a second word.
    """
    for _ in range(_MAX_ESCAPES if "&" in text else 0):
        escaped, text = text, _ENTITY.sub(lambda match: html.unescape(match[0]), text)
        if text == escaped:
            break
    text = _LINE_END_HYPHEN.sub("", text)
    # Before the compatibility form, which turns the spaces inside numbers into plain spaces.
    return split_words(_NUMBER.sub(_unified_number, text))


_MAX_ESCAPES = 3
"""Doubly encoded entities such as `&amp;nbsp;` are common; deeper ones are not."""
_ENTITY = re.compile("&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
# Any white space, because extraction often turns the line break into a space.
_LINE_END_HYPHEN = re.compile(r"[-\u00ad\u2010](?<=[^\W\d_].)\s+(?=[^\W\d_])")
_THOUSANDS_MARK = "[,_'\u2019\u00a0\u2009\u202f\uff0c]"
_NUMBER = re.compile(
    rf"""(?P<whole> (?<!\d)(?<!\d{_THOUSANDS_MARK})            # 1,000 but not the end of 5,1,000
            \d{{1,3}} (?P<mark>{_THOUSANDS_MARK})\d{{3}} (?:(?P=mark)\d{{3}})* (?!\d)
        | \d+
        | (?<!\w)(?=\.\d)                                     # .5
        ) (?:\.(?P<fraction>\d+))?""",
    re.VERBOSE,
)


def _unified_number(match: re.Match[str]) -> str:
    found = match[0]
    if found.isascii() and found.isdigit():
        return found.lstrip("0") or "0"
    digits = "".join(mark for mark in match["whole"] if mark.isdigit())
    whole = _ascii(digits).lstrip("0") or "0"
    fraction = _ascii(match["fraction"] or "").rstrip("0")
    return f"{whole} {fraction}" if fraction else whole


def _ascii(digits: str) -> str:
    return digits if digits.isascii() else "".join(str(unicodedata.decimal(d)) for d in digits)


NORMALISATIONS: dict[str, Normaliser] = {"robust": robust, "paper": paper}
"""By name; the first is the default."""
