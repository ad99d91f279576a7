"""A worker process that runs math-verify: one line of JSON in, one out.

A result of math-verify is accepted only if a second check agrees. Its "equal" is checked with sixty
digits, because it rounds; its "not equal" counts only between two expressions of one kind, because
it does not recognise that an interval and an inequality may be equal. Only its LaTeX parser is
used: the other one evaluates text.
"""

import json
import logging
import os
import resource
import sys
from collections.abc import Sequence
from importlib import import_module
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sympy

ADDRESS_SPACE_BYTES = 2 << 30
CPU_SECONDS = 10
"""Time limit of one question; the first one also includes the import."""
_IMPORT_SECONDS = 60

_DIGITS = 60
_SAME = 40
"""Number of leading digits that must agree."""


def main() -> None:
    """Serve standard input until it ends."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _allow(_IMPORT_SECONDS)
    logging.disable(logging.CRITICAL)
    # Before the first question, because an import may take longer than a question's limit.
    import_module("math_verify")

    for line in sys.stdin:
        _allow(CPU_SECONDS)
        key, answer = json.loads(line)
        try:
            grade, reason = judge(key, answer)
        except Exception as error:
            grade, reason = "ungradable", f"math-verify failed: {type(error).__name__}"
        print(json.dumps([grade, reason]), file=channel, flush=True)


def judge(key: str, answer: str) -> tuple[str, str]:
    """Return grade and reason for two expressions in LaTeX without units."""
    from math_verify import verify

    keys, answers = _parsed(key), _parsed(answer)
    for text, found in (("key", keys), ("answer", answers)):
        if not found:
            return "ungradable", f"math-verify cannot parse the {text}"
    # strict=False would treat a variable as equal to any other.
    equal = any(
        verify([one], [other], float_rounding=12, strict=True, timeout_seconds=None)
        for one, other in ((keys[0], answers[0]), (answers[0], keys[0]))
    )
    return _second_look(keys[0], answers[0], equal)


def _allow(seconds: int) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(used.ru_utime + used.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (spent + seconds, resource.RLIM_INFINITY))


def _parsed(text: str) -> list:
    from math_verify import parse
    from math_verify.parser import LatexExtractionConfig

    found = parse(
        f"${text}$",
        extraction_config=[LatexExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )
    return [one for one in found if not isinstance(one, str)]


def _second_look(key: "sympy.Basic", answer: "sympy.Basic", equal: bool) -> tuple[str, str]:
    import sympy

    if isinstance(key, sympy.Expr) and isinstance(answer, sympy.Expr):
        return _expressions(key, answer, equal)
    if _kind(key) != _kind(answer) or _kind(key) == "relation":
        if equal:
            return "right", ""
        return "ungradable", "math-verify finds no equality, which is unreliable for these kinds"
    if not equal:
        return "wrong", "another value than the key"
    if _same_items(key, answer) is False:
        return "wrong", "another value than the key, beyond the rounding of math-verify"
    return "right", ""


def _kind(value: object) -> str:
    import sympy
    from sympy.core.relational import Relational
    from sympy.logic.boolalg import Boolean

    if isinstance(value, Relational | Boolean):
        return "relation"
    if isinstance(value, sympy.FiniteSet):
        return "finite set"
    if isinstance(value, sympy.Set):
        return "set"
    return "matrix" if isinstance(value, sympy.MatrixBase) else type(value).__name__


def _expressions(key: "sympy.Basic", answer: "sympy.Basic", equal: bool) -> tuple[str, str]:
    symbols = key.free_symbols, answer.free_symbols
    if not any(symbols):
        same = _same_number(key, answer)
        if same is None:
            return ("right", "") if equal else ("ungradable", "no numeric value to compare")
        if same and not equal:
            return "ungradable", "equal to sixty digits, but math-verify finds no equality"
        return ("right", "") if same else ("wrong", "another value than the key")
    if bool(symbols[0]) != bool(symbols[1]) and not equal:
        return "wrong", "one is a number and the other has a variable"
    same = _same_at_points(key, answer)
    if equal and same is not False:
        return "right", ""
    if not equal and same is False and symbols[0] == symbols[1]:
        return "wrong", "another value than the key"
    return "ungradable", "math-verify and evaluation at some points disagree"


def _same_number(one: object, other: object) -> bool | None:
    """Return whether two numbers agree; None if they have no numeric value."""
    import sympy

    values = [sympy.N(value, _DIGITS) for value in (one, other)]
    if not all(value.is_number and value.is_finite for value in values):
        return None
    largest = max(abs(value) for value in values)
    return bool(abs(values[0] - values[1]) <= largest * sympy.Float(10, _DIGITS) ** -_SAME)


def _same_at_points(one: "sympy.Basic", other: "sympy.Basic") -> bool | None:
    """Return whether two expressions agree at those of three points where both have a value."""
    import sympy

    symbols = sorted(one.free_symbols | other.free_symbols, key=str)
    seen = []
    for start in (7, 41, 97):
        point = {
            symbol: sympy.Rational(start + 5 * number, 11 + 2 * number)
            for number, symbol in enumerate(symbols)
        }
        seen.append(_same_number(one.subs(point), other.subs(point)))
    known = [same for same in seen if same is not None]
    return all(known) if known else None


def _same_items(key: "sympy.Basic", answer: "sympy.Basic") -> bool | None:
    """Return whether the numbers in two collections agree; None if they are not only numbers."""
    import sympy

    if isinstance(key, sympy.FiniteSet):
        return _same_sets(list(islice(key, 50)), list(islice(answer, 50)))
    if isinstance(key, sympy.Interval) and isinstance(answer, sympy.Interval):
        rows = [[key.start, key.end], [answer.start, answer.end]]
    elif isinstance(key, sympy.MatrixBase | sympy.Tuple) and len(key) == len(answer):
        rows = [list(key), list(answer)]
    else:
        return None
    return _all([_same_or_infinite(one, other) for one, other in zip(*rows, strict=True)])


def _same_sets(key: Sequence, answer: Sequence) -> bool | None:
    if any(getattr(one, "free_symbols", True) for one in (*key, *answer)):
        return None
    found = [any(_same_or_infinite(one, other) for other in answer) for one in key]
    return all(found) and len(key) == len(answer)


def _same_or_infinite(one: object, other: object) -> bool | None:
    if one == other:
        return True
    if getattr(one, "free_symbols", True) or getattr(other, "free_symbols", True):
        return None
    return _same_number(one, other)


def _all(seen: Sequence[bool | None]) -> bool | None:
    return False if False in seen else None if None in seen else True


if __name__ == "__main__":
    main()
