"""Decide whether two final answers are equal, as far as exact arithmetic can.

The result is right, wrong or undecided, never an approximation. Undecided cases go to math-verify.

- `50%` and `0.5` are equal; `50%` and `50` may be, by what the question asked for: ungradable.
- Two units: the same text, or two that are converted; else ungradable. One unit: the number counts,
  because the question mostly names the unit that the other side leaves out.
- `{1,2}` and `2,1` are the same numbers; brackets that differ are an interval or not: only equal
  ones are compared here.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from phi4.oracles.math.final_answer import MAX_CHARACTERS, spelled, tight
from phi4.oracles.math.rational import NotRationalError, TooLargeError, rational
from phi4.oracles.math.units import PERCENT, Amount, amount, factor
from phi4.oracles.verdict import Grade

_NAMED = re.compile(r"([A-Za-z]|\\[a-z]+)\s*=\s*([^=]+)$")
_WORD = re.compile(r"[A-Za-z][A-Za-z ]*$")
_LETTER = re.compile(r"\(?(?:\\text\{)?\(?([A-Z])\)?\}?\)?$")
_BASE = re.compile(r"[0-9A-Fa-f]\s*_\s*[{\d]")
_DECIDED_WORDS = {"yes", "no", "true", "false"}
_NUMBER_WORDS = re.compile(
    r"zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|teen|twenty|thirty|"
    r"forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand|million|half|third|quarter|dozen|"
    r"infinit|none|undefined|pi\b"
)
_GROUPED = re.compile(r"(?<!\d)\d{1,3}(?:,\d{3})+(?!\d)")
_BRACKETS = {("\\{", "\\}"): "set", ("(", ")"): "round", ("[", "]"): "square"}
_HALF_OPEN = {("(", "]"): "left open", ("[", ")"): "right open"}


@dataclass(frozen=True)
class Compared:
    """Result of the exact comparison.

    Attributes:
        grade: None if undecided.
        reason: why.
        key, answer: for the next grader, without units.
    """

    grade: Grade | None
    reason: str = ""
    key: str = ""
    answer: str = ""


def compare(key: str, answer: str) -> Compared:
    """Compare a key and a final answer, both as written."""
    key, answer = _bare(spelled(key), spelled(answer))
    if tight(key) == tight(answer) and key:
        return Compared(Grade.RIGHT)
    for text, who in ((key, "key"), (answer, "answer")):
        if len(text) > MAX_CHARACTERS:
            return _open(f"the {who} is longer than {MAX_CHARACTERS} characters")
    if _BASE.search(key) or _BASE.search(answer):
        return _based(tight(key), tight(answer))
    try:
        if words := _words(key, answer):
            return words
        return _compare_amounts(amount(key), amount(answer))
    except TooLargeError as error:
        return _open(f"a number is too large: {error}")


def _open(reason: str) -> Compared:
    return Compared(Grade.UNGRADABLE, reason)


def _wrong(reason: str = "value differs from the key") -> Compared:
    return Compared(Grade.WRONG, reason)


def _bare(key: str, answer: str) -> tuple[str, str]:
    """Remove `x =` if both have the same name or only one has a name."""
    named = [_NAMED.match(text) for text in (key, answer)]
    names = {found[1] for found in named if found}
    if len(names) == 1:
        key, answer = (
            found[2] if found else text for found, text in zip(named, (key, answer), strict=True)
        )
    return key, answer


def _words(key: str, answer: str) -> Compared | None:
    """Compare letters and words; None if one of them is neither."""
    letters = [found[1] for text in (key, answer) if (found := _LETTER.match(text))]
    if len(letters) == 2:
        return Compared(Grade.RIGHT) if letters[0] == letters[1] else _wrong()
    texts = [re.sub(r"\\text\{([^{}]*)\}", r"\1", text).strip() for text in (key, answer)]
    plain = [bool(_WORD.match(text)) and len(text) > 1 for text in texts]
    if not any(plain):
        return None
    if all(plain):
        key, answer = (text.casefold() for text in texts)
        if key == answer:
            return Compared(Grade.RIGHT)
        if {key, answer} <= _DECIDED_WORDS:
            return _wrong()
        return _open("words differ from the key's")
    number, words = (texts[0], texts[1]) if plain[1] else (texts[1], texts[0])
    if _exact(number) is not None and not _NUMBER_WORDS.search(words.lower()):
        return _wrong("one is a number and the other is text")
    return _open("holds words")


def _based(key: str, answer: str) -> Compared:
    """Compare numbers with a base subscript: equal bases, or undecided."""
    pattern = r"(?:\(|\\text\{)?(\w+)[)}]?_\{?(\w+)\}?"
    found = [match for text in (key, answer) if (match := re.fullmatch(pattern, text))]
    if len(found) == 2 and found[0][2] == found[1][2]:
        same = found[0][1].lstrip("0").lower() == found[1][1].lstrip("0").lower()
        return Compared(Grade.RIGHT) if same else _wrong()
    return _open("only one is in this base")


def _compare_amounts(key: Amount, answer: Amount) -> Compared:
    of_key, of_answer = _exact(key.body, key.scale), _exact(answer.body, answer.scale)
    units = key.unit, answer.unit
    if of_key is None or of_answer is None:
        return _compare_inexact(key, answer, (of_key, of_answer))
    if PERCENT in units and key.unit != answer.unit:
        return _percent(of_key, of_answer, *units)
    if all(units) and key.unit != answer.unit:
        return _converted(of_key, of_answer, *units)
    if of_key == of_answer:
        return Compared(Grade.RIGHT)
    if _may_be_lists(key.body, answer.body):
        return _open("1,000 may be a number or a list")
    if any(units) and not all(units) and factor(key.unit or answer.unit) is not None:
        return _open("only one has a unit, and the numbers differ")
    return _wrong()


def _compare_inexact(
    key: Amount, answer: Amount, values: tuple[Fraction | None, Fraction | None]
) -> Compared:
    if PERCENT in (key.unit, answer.unit) and key.unit != answer.unit:
        return _open("only one is a percentage")
    if key.unit and answer.unit and key.unit != answer.unit:
        return _open("unit differs from the key's and is not converted")
    if key.scale != 1 or answer.scale != 1:
        return _open("a number word after a non-number")
    if values == (None, None) and not key.unit and not answer.unit:
        decided = _collections(tight(key.body), tight(answer.body))
        if decided is not None:
            return decided
    return Compared(None, "", key.body, answer.body)


def _percent(key: Fraction, answer: Fraction, key_unit: str, answer_unit: str) -> Compared:
    if key_unit and answer_unit:
        return _wrong("a percentage and an amount")
    percentage, other = (key, answer) if key_unit else (answer, key)
    if percentage / 100 == other:
        return Compared(Grade.RIGHT)
    if percentage == other:
        return _open("only one is a percentage")
    return _wrong()


def _converted(key: Fraction, answer: Fraction, key_unit: str, answer_unit: str) -> Compared:
    of_key, of_answer = factor(key_unit), factor(answer_unit)
    if of_key is None or of_answer is None:
        return _open("unit differs from the key's and is not converted")
    if of_key[0] != of_answer[0] or key * of_key[1] != answer * of_answer[1]:
        return _wrong("amount differs from the key")
    return Compared(Grade.RIGHT)


def _exact(text: str, scale: int = 1) -> Fraction | None:
    try:
        return rational(text) * scale
    except NotRationalError:
        return None


def _collections(key: str, answer: str) -> Compared | None:
    """Compare sets, tuples and intervals of exact numbers; None if one is something else."""
    (key_kind, key_items), (answer_kind, answer_items) = _items(key), _items(answer)
    if key_kind is None or answer_kind is None:
        return None
    kinds = (key_kind, answer_kind)
    exact = [[_exact(item) for item in row] for row in (key_items, answer_items)]
    if any(None in row for row in exact):
        return None
    unordered = set(kinds) <= {"set", "list"}
    if unordered or kinds[0] == kinds[1]:
        if set(exact[0]) == set(exact[1]) if unordered else exact[0] == exact[1]:
            return Compared(Grade.RIGHT)
        grouped = _GROUPED.search(key) or _GROUPED.search(answer)
        return _open("1,000 may be a number or a list") if grouped else _wrong()
    if set(kinds) & set(_HALF_OPEN.values()) and "list" not in kinds and "set" not in kinds:
        return _wrong("interval differs from the key")
    return _open("brackets differ from the key's")


def _may_be_lists(key: str, answer: str) -> bool:
    """Return whether two numbers with commas are the same list, if they are lists."""
    lists = [sorted(re.split(r"\s*,\s*", text)) for text in (key, answer)]
    return lists[0] == lists[1] and len(lists[0]) > 1


def _items(text: str) -> tuple[str | None, list[str]]:
    """Return kind and items of a collection."""
    kind = "list"
    for (opening, closing), name in (_BRACKETS | _HALF_OPEN).items():
        if text.startswith(opening) and text.endswith(closing):
            kind, text = name, text[len(opening) : -len(closing)]
            break
    items, depth, item = [], 0, ""
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            items.append(item.strip())
            item = ""
        else:
            item += character
    items.append(item.strip())
    is_one = len(items) < 2 and kind != "set"
    return (None if is_one or not all(items) else kind), items
