"""Parse percent signs, units and bases at the end of an answer.

An amount is a number and the text of its unit. A few units of length, mass and time are converted,
because ignoring them would make 5 cm and 5 m equal; other units are equal if their texts are.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

PERCENT = "%"

_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_NO_UNITS = set(
    [
        "or",
        "and",
        "more",
        "less",
        "than",
        "to",
        "if",
        "is",
        "not",
        "mod",
        "at",
        "least",
        "most",
        "about",
        "approximately",
        "times",
        "base",
        "only",
        "per",
        "pi",
        "sqrt",
        "inf",
        "infinity",
        "dozen",
        "half",
        "none",
        "no",
        "of",
        "i",
        "e",
        "x",
        "y",
        "z",
        "n",
        "k",
    ]
)
"""Words after a number that make it something other than an amount."""

_TEXT = re.compile(r"\s*\\text\{\s*([^{}]*[A-Za-z][^{}]*?)\s*\}(?:\^\{?([0-9])\}?)?$")
_DEGREES = re.compile(r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)\s*([CF]?)$")
_WORDS = re.compile(
    r"(?<=[\d)}])(\s*)([A-Za-zµ]+(?: [A-Za-z]+)?(?:/[A-Za-z]+)?)(?:\^\{?([0-9])\}?)?$"
)
_ANGLES = re.compile(r"sin|cos|tan|cot|sec|csc")
_MONEY = re.compile(r"^(-?)\s*([$€£])\s*(?=[\d.\\(])")

_FACTORS: Mapping[str, tuple[str, Fraction]] = {
    name: (kind, Fraction(factor))
    for kind, row in {
        "length": {
            "mm millimeter millimetre": "1/1000",
            "cm centimeter centimetre": "1/100",
            "m meter metre": "1",
            "km kilometer kilometre": "1000",
            "in inch inches": "254/10000",
            "ft foot feet": "3048/10000",
            "yd yard": "9144/10000",
            "mi mile": "1609344/1000",
        },
        "mass": {
            "mg milligram": "1/1000000",
            "g gram": "1/1000",
            "kg kilogram": "1",
            "lb lbs pound": "45359237/100000000",
        },
        "time": {
            "ms millisecond": "1/1000",
            "s sec second": "1",
            "min minute": "60",
            "h hr hour": "3600",
            "day": "86400",
            "week": "604800",
        },
    }.items()
    for names, factor in row.items()
    for name in names.split()
}


@dataclass(frozen=True)
class Amount:
    """A text without its unit.

    Attributes:
        body: the rest, to be parsed as a number or as an expression.
        unit: text in lower case without a plural s; empty if there is none.
        scale: factor of a word such as `million`.
    """

    body: str
    unit: str = ""
    scale: int = 1


def amount(text: str) -> Amount:
    """Split a text from `final_answer.spelled`."""
    money = ""
    if found := _MONEY.match(text):
        text, money = found[1] + text[found.end() :], found[2]
    for take in (_percent, _degrees, _text_unit, _word_unit):
        if (taken := take(text)) is not None and taken.body:
            if (money and taken.unit) or _is_angle(taken):
                return Amount(text)
            return Amount(taken.body, taken.unit or money, taken.scale)
    return Amount(text, money)


def _is_angle(taken: Amount) -> bool:
    """Return whether the degrees are the argument of a function: `\\sin 30^\\circ`."""
    return taken.unit.startswith("degree") and bool(_ANGLES.search(taken.body))


def factor(unit: str) -> tuple[str, Fraction] | None:
    """Return kind of a unit and its size in the kind's first unit; None for one that is not
    converted."""
    return _FACTORS.get(unit)


def _percent(text: str) -> Amount | None:
    if text.endswith("%"):
        return Amount(text[:-1].rstrip(), PERCENT)
    return None


def _degrees(text: str) -> Amount | None:
    found = _DEGREES.search(text)
    return Amount(text[: found.start()], f"degree{found[1]}") if found else None


def _text_unit(text: str) -> Amount | None:
    found = _TEXT.search(text)
    return _unit(text[: found.start()].rstrip(), found[1], found[2]) if found else None


def _word_unit(text: str) -> Amount | None:
    found = _WORDS.search(text)
    # `5m` may be five times m; `5 m` and `5cm` are amounts.
    if found is None:
        return None
    known = found[2] in _FACTORS or len(found[2]) > 1
    if not known or (not found[1] and (len(found[2]) == 1 or found[2] not in _FACTORS)):
        return None
    return _unit(text[: found.start()], found[2], found[3])


def _unit(body: str, words: str, power: str | None) -> Amount | None:
    names = words.strip(" .").split()
    scale = 1
    if names and names[0].lower() in _SCALES:
        scale = 10 ** _SCALES[names.pop(0).lower()]
    if any(name.lower() in _NO_UNITS for name in names):
        return None
    unit = " ".join(_singular(name) for name in names)
    if unit in ("percent", "percentage point", "per cent"):
        unit = PERCENT
    if unit in ("dollar", "usd"):
        unit = "$"
    return Amount(body, f"{unit}^{power}" if power and unit else unit, scale)


def _singular(name: str) -> str:
    if name in _FACTORS:
        return name
    name = name.lower()
    return name[:-1] if len(name) > 2 and name.endswith("s") else name
