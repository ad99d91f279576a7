"""The two readings of a text as words: the report's own, and one that survives re-formatting."""

import re
import string
import unicodedata
from collections.abc import Callable

Normaliser = Callable[[str], list[str]]

_PAPER_SPACES = str.maketrans({mark: " " for mark in string.punctuation if mark not in "()"})
_RUN_OF_SPACES = re.compile(" {2,}")


def paper(text: str) -> list[str]:
    """Words as the report's examples show them.

    Lower case; punctuation but parentheses becomes a space; runs of spaces are one; the text is
    split at single spaces, so a text that ends in punctuation has an empty last word. On the
    report's worked example this gives 38 and 41 7-grams, 15 of them shared. It shows no line break:
    here they stay inside words, which is the literal reading of that split.

    Source: report, appendix B.1.
    """
    return _RUN_OF_SPACES.sub(" ", text.lower().translate(_PAPER_SPACES)).split(" ")


def robust(text: str) -> list[str]:
    """Words that do not change with line breaks, case, punctuation or the format of numbers.

    NFKC and case folding; whatever is no letter, mark or digit separates words, invisible format
    characters vanish; Chinese and Japanese characters are words of their own. A number is one
    word however its thousands are marked and in whatever digits, `1,000` like `1000.0`; a fraction
    is a second word.
    """
    # Before NFKC, which makes the spaces inside numbers plain ones.
    text = unicodedata.normalize("NFKC", _NUMBER.sub(_unified_number, text)).casefold()
    if not text.isascii():
        # Case folding can undo the composition.
        text = unicodedata.normalize("NFKC", text)
    return _IDEOGRAPH.sub(r" \g<0> ", text.translate(_SEPARATED)).split()


class _SeparatorTable(dict):
    """What str.translate does with a character, worked out when it is first met."""

    def __missing__(self, code: int) -> str | None:
        character = chr(code)
        category = unicodedata.category(character)
        result = None if category == "Cf" else character if category[0] in "LMN" else " "
        self[code] = result
        return result


_SEPARATED = _SeparatorTable()
_IDEOGRAPH = re.compile("[\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
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
