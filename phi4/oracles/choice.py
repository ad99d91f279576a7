"""Multiple choice: the last letter that an answer states.

A letter counts if it is stated as the answer, in a box or by a phrase, and the last such statement
decides. Other letters count only if they are unambiguous; the article "A" and the pronoun "I" never
do. An answer that states several letters at once is wrong: it did not choose.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from phi4.oracles.verdict import Grade, Graded, ToGrade

_LAST_LETTER = "H"
"""Options of a key that does not list them; `I` is excluded because it is a word."""

_LETTER = r"(?:\(\s*([A-Za-z])\s*\)|\[\s*([A-Za-z])\s*\]|([A-Za-z])\))|\b([A-Za-z])\b"
_WHERE_STATED = re.compile(
    r"\\(?:boxed|fbox)\s*\{(?P<box>(?:[^{}]|\{[^{}]*\})*)\}"
    r"|(?:\banswers?\b|\b(?:correct|right|best)\s+(?:option|choice|letter)\b)"
    r"(?:\s+(?:is|are|would be|must be|should be))?\s*:?\s*"
    r"(?:(?:option|choice|letter)\s+)?(?P<word>[^\n]*)"
    r"|(?P<named>(?-i:\(?\b[A-Z]\b\)?))\s+is\s+(?:the\s+)?(?:correct|right|best)\b",
    re.IGNORECASE,
)
_DENIED = re.compile(
    r"[*_}]*\s+(?:is|are|was)\s+(?:wrong|incorrect|false|not|out)\b", re.IGNORECASE
)
_DELIMITER = re.compile(r"\\[()\[\]]|\$")
_FIRST = re.compile(rf"[\s*_$`\"'\\]*(?:\\?text\{{)?[\s*_$`]*(?:{_LETTER})")
_NEXT = re.compile(
    rf"[\s*_$`}}]*(?:,|/|&|\bor\b|\band\b|\\text\{{\s*(?:or|and)\s*\}})[\s*_$`]*(?:{_LETTER})"
)
_GOES_ON = re.compile(
    r"[*_$`}'\"]*(?:\s*$|\s*[.,;:!)\]\n(=\-–—]|\s+(?:because|since|as|is|or|and)\b)"
)
_ALONE = re.compile(
    r"^[\s*_>$-]*(?:([A-Z])[\s*_$]*(?:[.):]|$)|\(([A-Za-z])\))|\(([A-Za-z])\)", re.MULTILINE
)


@dataclass(frozen=True)
class ChoiceKey:
    """A parsed key.

    Attributes:
        letter: in upper case.
        options: text by letter; empty if the key does not list them.
    """

    letter: str
    options: Mapping[str, str]

    @property
    def letters(self) -> str:
        """Letters that an answer may state."""
        if self.options:
            return "".join(self.options)
        return ascii_uppercase[: ascii_uppercase.index(max(self.letter, _LAST_LETTER)) + 1]


class ChoiceOracle:
    """Grades whether the letter of an answer is the key's.

    A key is a letter, or `{"letter": "B", "options": [...]}` with the texts in order, or with a
    table of texts by letter; then an option's text, stated alone, counts as its letter.
    """

    name = "choice"

    def grade(self, answers: Sequence[ToGrade]) -> list[Graded]:
        """See `Oracle.grade`."""
        return [_graded(one) for one in answers]

    def close(self) -> None:
        """See `Oracle.close`."""


def _graded(one: ToGrade) -> Graded:
    try:
        key = _read_key(one.key)
    except ValueError as error:
        return Graded(Grade.UNGRADABLE, str(error))
    answer = _DELIMITER.sub(" ", one.answer)
    stated = _stated(answer, key)
    if len(stated) > 1:
        return Graded(Grade.WRONG, f"states {' and '.join(sorted(stated))}")
    if stated:
        letter = next(iter(stated))
        right = letter == key.letter
        return Graded(Grade.RIGHT) if right else Graded(Grade.WRONG, f"states {letter}")
    alone = _alone(answer, key)
    if len(alone) == 1:
        right = alone == {key.letter}
        return Graded(Grade.RIGHT) if right else Graded(Grade.WRONG, f"names {min(alone)}")
    if alone:
        return Graded(Grade.UNGRADABLE, f"names {', '.join(sorted(alone))}, and states none")
    if not answer.strip() or key.options:
        return Graded(Grade.WRONG, "states no letter and no option")
    return Graded(Grade.UNGRADABLE, "states no letter, and the key does not list the options")


def _read_key(key: object) -> ChoiceKey:
    letter, options = key, {}
    if isinstance(key, Mapping):
        letter, options = key.get("letter"), key.get("options", {})
        if set(key) - {"letter", "options"}:
            raise ValueError(f"key has {sorted(map(str, key))}; expected letter and options")
    if isinstance(options, list | tuple):
        options = dict(zip(ascii_uppercase, options, strict=False))
    if not isinstance(letter, str) or not re.fullmatch(r"\s*\(?[A-Za-z]\)?\s*", letter):
        raise ValueError(f"letter is {letter!r:.60}; expected one letter")
    if not isinstance(options, Mapping) or not all(
        isinstance(name, str) and re.fullmatch("[A-Za-z]", name) and isinstance(text, str)
        for name, text in options.items()
    ):
        raise ValueError("options is neither a list of texts nor a table of texts by letter")
    letter = letter.strip(" ()\t\n").upper()
    options = {name.upper(): text for name, text in options.items()}
    if options and letter not in options:
        raise ValueError(f"letter {letter} is not one of the options {', '.join(options)}")
    return ChoiceKey(letter, options)


def _stated(answer: str, key: ChoiceKey) -> set[str]:
    """Return the letters of the last statement that has any."""
    found: set[str] = set()
    for statement in _WHERE_STATED.finditer(answer):
        box, word, named = statement.group("box", "word", "named")
        text = next(one for one in (box, word, named) if one is not None)
        found = _letters(text, key, boxed=box is not None) or found
        if word is not None:
            # "The answer, by option C, is B": later text on the line counts too.
            found = _stated(word, key) or found
    return found


def _letters(text: str, key: ChoiceKey, boxed: bool) -> set[str]:
    """Return the letters that a statement begins with, or the one whose text it is."""
    first = _FIRST.match(text)
    letter = _letter(first, key.letters)
    if first and letter and (boxed or _goes_on(first, text)):
        letters, at = {letter}, first.end()
        while (other := _NEXT.match(text, at)) and (letter := _letter(other, key.letters)):
            letters.add(letter)
            at = other.end()
        return letters
    same = [name for name, option in key.options.items() if _plain(option) == _plain(text)]
    return set(same) if len(same) == 1 else set()


def _goes_on(first: re.Match, text: str) -> bool:
    """Return whether a letter is separate: "B.", "B because", not the "A" of "A function"."""
    if _DENIED.match(text, first.end()):
        return False
    is_bracketed = first[4] is None
    return is_bracketed or bool(_GOES_ON.match(text, first.end()))


def _letter(found: re.Match | None, letters: str) -> str | None:
    if found is None:
        return None
    letter = next(group for group in found.groups() if group is not None).upper()
    return letter if letter in letters else None


def _alone(answer: str, key: ChoiceKey) -> set[str]:
    """Return letters in brackets, or at the beginning of a line; of the last line if it has one."""
    last = answer.strip().rpartition("\n")[2]
    everywhere = set()
    for text in (last, answer):
        found_letters = (_letter(found, key.letters) for found in _ALONE.finditer(text))
        letters = {letter for letter in found_letters if letter is not None}
        if len(letters) == 1:
            return letters
        everywhere = letters
    if not everywhere:
        return _letters(answer.strip(), key, boxed=False)
    return everywhere


def _plain(text: str) -> str:
    return re.sub(r"[\s*_$`.]+", " ", text.casefold()).strip()
