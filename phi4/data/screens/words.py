"""Split text into words; the segmentation used by deduplication and decontamination.

A word is a run of letters, marks and digits, by their Unicode categories, because `\\w` excludes
the vowel signs of half of the world's scripts. Scripts without spaces between words are split into
units that depend only on neighbouring characters, so that a passage has the same words in any
context and a change affects only the words around it.
"""

import re
import unicodedata
from itertools import pairwise

_ZERO_WIDTH_SPACE = "\u200b"
_IDEOGRAPH = re.compile(
    "[\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""Chinese and Japanese, in which each character is a word."""
# Thai and Lao, Myanmar, Khmer, Tai Le and New Tai Lue, Tai Tham, Balinese, Javanese, Tai Viet.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u1b00-\u1b7f"
    "\ua980-\ua9df\uaa60-\uaadf"
)
_UNSPACED_RUN = re.compile(f"[{_UNSPACED}]+")
_HIDDEN_BREAK = re.compile(f"(?<=[{_UNSPACED}]){_ZERO_WIDTH_SPACE}+(?=[{_UNSPACED}])")
_MULTIPLIER = 0x9E3779B1
_CUT_SHIFT = 30
"""Keeps two of 32 bits: one pair of characters in four ends a unit, about the length of words."""


def split_words(text: str) -> list[str]:
    """Split into words in compatibility form and lower case, without punctuation and symbols.

    A zero-width space separates words, except in scripts without spaces; other invisible format
    characters are removed.
    """
    if text.isascii():
        return text.lower().translate(_SEPARATED).split()
    # Case folding can undo the composition.
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = _HIDDEN_BREAK.sub("", text).translate(_SEPARATED)
    return _UNSPACED_RUN.sub(_units, _IDEOGRAPH.sub(r" \g<0> ", text)).split()


class _SeparatorTable(dict):
    """Table for str.translate, computed per character on first use."""

    def __missing__(self, code: int) -> str | None:
        character = chr(code)
        category = unicodedata.category(character)
        result = None if category == "Cf" else character if category[0] in "LMN" else " "
        self[code] = result
        return result


_SEPARATED = _SeparatorTable({ord(_ZERO_WIDTH_SPACE): " "})


def _units(match: re.Match[str]) -> str:
    """Insert spaces in a run of characters between neighbours that end a unit."""
    run = match[0]
    pieces = [" ", run[0]]
    for before, after in pairwise(run):
        mixed = (ord(before) << 16 ^ ord(after)) * _MULTIPLIER & 0xFFFFFFFF
        if not mixed >> _CUT_SHIFT:
            pieces.append(" ")
        pieces.append(after)
    return "".join(pieces) + " "
