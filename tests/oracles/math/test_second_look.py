"""What math-verify says is believed only where a second look agrees."""

import pytest
import sympy
from sympy.abc import x, y

from phi4.oracles.math.verify_worker import _second_look

ROOT, TINY = sympy.sqrt(2), sympy.Rational(1, 10**30)


@pytest.mark.parametrize(
    ("key", "answer", "equal", "grade"),
    [
        (ROOT, ROOT + TINY, True, "wrong"),
        (ROOT, sympy.sqrt(8) / 2, True, "right"),
        (ROOT, sympy.sqrt(8) / 2, False, "ungradable"),
        (ROOT, sympy.sqrt(3), False, "wrong"),
        (sympy.oo, sympy.oo, True, "right"),
        (sympy.oo, sympy.Integer(5), False, "ungradable"),
        ((x + 1) ** 2, x**2 + 2 * x + 1, True, "right"),
        (x + 1, x + 1 + TINY, True, "ungradable"),
        (x + 1, x + 2, False, "wrong"),
        (x + 1, y + 1, False, "ungradable"),
        (sympy.Integer(5), x, False, "wrong"),
        (sympy.Interval(0, 1), sympy.And(x >= 0, x <= 1), False, "ungradable"),
        (sympy.Interval(0, 1), sympy.And(x >= 0, x <= 1), True, "right"),
        (sympy.Interval(0, 1), sympy.Interval(0, 1 + TINY), True, "wrong"),
        (sympy.Interval(0, 1), sympy.Interval(0, 2), False, "wrong"),
        (x > 3, x >= 3, False, "ungradable"),
        (sympy.FiniteSet(1, ROOT), sympy.FiniteSet(1, ROOT + TINY), True, "wrong"),
        (sympy.FiniteSet(1, x), sympy.FiniteSet(1, x), True, "right"),
        (sympy.Tuple(1, ROOT), sympy.Tuple(1, ROOT + TINY), True, "wrong"),
        (sympy.Matrix([1, 2]), sympy.Matrix([1, 3]), False, "wrong"),
        (sympy.FiniteSet(3, -3), sympy.Tuple(3, -3), False, "ungradable"),
    ],
)
def test_grade(key: object, answer: object, equal: bool, grade: str) -> None:
    assert _second_look(key, answer, equal)[0] == grade
