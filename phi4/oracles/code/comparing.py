"""Compare a value that a program printed with the expected one.

Both are plain JSON, parsed by our own reader from bytes, so no object of the program takes part in
the comparison. A number equals a number of the same value, 2 and 2.0; true is not a number.
"""

import json
import math


def same_value(got: object, expected: object, tolerance: float | None) -> bool:
    """Return whether two JSON values are equal.

    Args:
        got: value from the program.
        expected: value in the key.
        tolerance: for numbers, absolute or relative, whichever is larger; None for exact.
    """
    if isinstance(expected, bool) or isinstance(got, bool):
        return got is expected
    if isinstance(expected, int | float):
        return isinstance(got, int | float) and _same_number(got, expected, tolerance)
    if isinstance(expected, list):
        if not isinstance(got, list) or len(got) != len(expected):
            return False
        pairs = zip(got, expected, strict=True)
        return all(same_value(one, other, tolerance) for one, other in pairs)
    if isinstance(expected, dict):
        if not isinstance(got, dict) or got.keys() != expected.keys():
            return False
        return all(same_value(got[name], value, tolerance) for name, value in expected.items())
    return type(got) is type(expected) and got == expected


def same_output(got: bytes, expected: str, tolerance: float | None) -> bool:
    """Return whether a program's output equals the expected text, except for space at line ends.

    Empty lines at the end are ignored. With a tolerance, words that are numbers on both sides may
    differ by it, and any white space separates words.
    """
    try:
        text = got.decode("utf-8")
    except UnicodeDecodeError:
        return False
    if tolerance is None:
        return _lines(text) == _lines(expected)
    words, others = text.split(), expected.split()
    return len(words) == len(others) and all(
        _same_word(word, other, tolerance) for word, other in zip(words, others, strict=True)
    )


def read_json(text: bytes) -> object:
    """Parse a JSON value.

    Raises:
        ValueError: it is invalid, too deep, or has NaN, an infinity or a number of thousands of
            digits.
    """
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _lines(text: str) -> list[str]:
    lines = [line.rstrip() for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _same_word(word: str, other: str, tolerance: float) -> bool:
    if word == other:
        return True
    try:
        numbers = float(word), float(other)
    except ValueError:
        return False
    return _same_number(*numbers, tolerance)


def _same_number(got: float, expected: float, tolerance: float | None) -> bool:
    if got == expected:
        return True
    if tolerance is None:
        return False
    try:
        return math.isclose(got, expected, rel_tol=min(tolerance, 1.0), abs_tol=tolerance)
    except OverflowError:
        return False
