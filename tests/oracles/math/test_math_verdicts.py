"""Verdicts on pairs of key and answer: right, or none at all, and never the wrong one.

Among them are the forty that math-verify 0.9.0 was measured on, with its mistakes: units dropped,
rounding, percentages, powers that do not end, the second box.
"""

from collections.abc import Iterator

import pytest

from phi4.oracles.math import MathOracle
from phi4.oracles.verdict import Grade, ToGrade

R, W, U = Grade.RIGHT, Grade.WRONG, Grade.UNGRADABLE

EXACT = [
    ("5 gallons", "5 liters", {U}),
    (r"\sin 30^\circ", "1/2", {U}),
    (r"\sin 30 \text{ degrees}", "0.5", {U}),
    (r"\frac{\pi}{3}", r"\pi + 60^\circ + 1", {U}),
    ("1 hour", "60", {U}),
    ("1 hour", "60 minutes", {R}),
    ("5", "5 or more", {U}),
    ("5", "2 or 5", {U}),
    (r"12.00 \text{ dollars}", r"\$12", {R}),
    ("3,5,7", "3,5", {W}),
    ("1/2", "0.5", {R}),
    (r"\frac12", "1/2", {R}),
    (r"\frac{1}{2}", r"\boxed{0.5}", {R}),
    ("0", "-0", {R}),
    (r"\{1,2,3\}", r"\{3,1,2\}", {R}),
    ("(1,2)", "(1,2)", {R}),
    ("(1,2)", "(2,1)", {W}),
    ("[0,1)", "[0,1]", {W}),
    ("5", "x=5", {R}),
    ("x=5", "5", {R}),
    ("1000", "1,000", {R}),
    ("5 cm", "5 m", {W}),
    (r"5\text{ cm}", r"5\text{ m}", {W}),
    ("1/2004!", "1/2006!", {W}),
    ("1/2^{99}", "1/2^{98}", {W}),
    ("0.1234567", "0.1234568", {W}),
    ("1000000.1", "1000000.1000001", {W}),
    ("50", r"50\%", {U}),
    (r"50\%", "50", {U}),
    ("0.5", "50%", {R}),
    (r"50\%", "0.5", {R}),
    ("A", "(A)", {R}),
    ("B", "(A)", {W}),
    ("1000", "1e3", {R}),
    ("72", r"\boxed{71} no wait \boxed{72}", {R}),
    ("71", r"\boxed{71} no wait \boxed{72}", {W}),
    ("5", "9^9^9", {U}),
    ("5", "9^{9^{9}}", {U}),
    ("5", "5^5^5^5^5", {U}),
    ("1", "(" * 40 + "1" + ")" * 40, {U}),
    (r"90^\circ", "90", {R}),
    ("90", r"90^{\circ}", {R}),
    (r"\$5", "5", {R}),
    ("5", "$5$", {R}),
    ("5 million", "5", {W}),
    ("5 million", "5000000", {R}),
    ("12 apples", "12", {R}),
    ("500 cm", "5 m", {R}),
    ("5", "500 cm", {U}),
    (r"3\frac{1}{2}", "3.5", {R}),
    ("3 1/2", "7/2", {R}),
    ("11/2", "1 1/2", {W}),
    ("101_2", "101_{2}", {R}),
    ("101_2", "101", {U}),
    (r"0.\overline{3}", "1/3", {R}),
    ("0.333", "1/3", {W}),
    (r"\text{Yes}", "yes", {R}),
    ("Yes", "No", {W}),
    ("5", "I do not know", {W}),
    ("5", "five", {U}),
    ("42", "The answer is 42.", {R}),
    ("1,2", "2,1", {R}),
    ("100,200", "200,100", {U}),
    (r"\{1,000, 2\}", r"\{1000, 2\}", {U, R}),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", {R}),
    (r"(-\infty,3]\cup[5,\infty)", r"(-\infty, 3] \cup [5, \infty)", {R}),
    (r"5\sqrt{2}\text{ cm}", r"5\sqrt{2}\text{ m}", {U, W}),
    (r"\infty", r"\infty", {R}),
    ("10^{10^{10}}", "10^{10^{10}}", {R}),
    ("2^{10}", "1024", {R}),
    ("-2^2", "-4", {R}),
    (r"6.02\times10^{23}", "6.02e23", {R}),
    (r"\frac{3}{4}", r"\dfrac34", {R}),
]
"""Decided by ourselves, or refused by ourselves."""

VERIFIED = [
    (r"\begin{pmatrix}-1\\2\end{pmatrix}", r"\begin{pmatrix} -1 \\ 2 \end{pmatrix}", {R}),
    (r"\frac{1}{3}\pi", "1.047197551196597746154214461", {W}),
    ("p - q", "q-p", {W}),
    ("5", "5x", {W}),
    (r"|x|", "x", {W, U}),
    (r"\frac{\sqrt{3}}{2}", r"\sqrt{3/4}", {R}),
    (r"\sqrt{8}", r"2\sqrt{2}", {R}),
    ("(0,1)", "0<x<1", {R, U}),
    ("0<x<1", "(0,1)", {R, U}),
    ("x^2+2x+1", "(x+1)^2", {R}),
    ("x^2+2x+1", "(x+2)^2", {W}),
    (r"\frac{\pi}{3}", r"\pi/3", {R}),
    (r"\frac{\pi}{3}", r"\pi/4", {W}),
    (r"\sqrt{2}/2^{99}", r"\sqrt{2}/2^{98}", {W}),
    ("5", "x", {W}),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}", {W}),
    ("3+4i", "4i+3", {R}),
    (r"\log_2 8", "3", {R}),
    (r"\pm 3", "3,-3", {R}),
    (r"\pm 3", "3", {W, U}),
    (r"5\sqrt2", r"\sqrt{50}\text{ cm}", {R}),
    (r"(1,\sqrt{2})", "(1, 1.41421356237309)", {W, U}),
    (r"\sqrt{2}", "1.41421356237309", {W}),
    ("2x+1", "2y+1", {U, W}),
    (r"x \ge 3", r"3 \le x", {R}),
    (r"x \ge 3", "x > 3", {W, U}),
]
"""Decided by math-verify and a second look."""


@pytest.fixture(scope="module")
def oracle() -> Iterator[MathOracle]:
    opened = MathOracle(num_workers=1)
    yield opened
    opened.close()


@pytest.mark.parametrize(("key", "answer", "allowed"), EXACT)
def test_exact_verdict(oracle: MathOracle, key: str, answer: str, allowed: set[Grade]) -> None:
    [one] = oracle.grade([ToGrade(answer, key)])
    assert one.outcome in allowed, one
    assert one.versions == {}


@pytest.mark.parametrize(("key", "answer", "allowed"), VERIFIED)
def test_verdict_of_math_verify(
    oracle: MathOracle, key: str, answer: str, allowed: set[Grade]
) -> None:
    [one] = oracle.grade([ToGrade(answer, key)])
    assert one.outcome in allowed, one
    assert one.versions == {"math-verify": "0.9.0"}


@pytest.mark.parametrize(
    ("key", "answer", "allowed"),
    [
        (5, "5", {R}),
        (2.5, r"\boxed{5/2}", {R}),
        (True, "1", {U}),
        (None, "1", {U}),
        (["5"], "5", {U}),
        ("", "5", {U}),
        ("5", "", {W}),
        pytest.param(10**5000, "1", {U}, id="huge"),
        ("5", "x" * 300, {U}),
        ("5", "1" * 300, {U}),
        ("7" * 300, "7" * 300, {R}),
        (r"so \boxed{5}", "5", {R}),
    ],
)
def test_keys_and_answers_of_other_kinds(
    oracle: MathOracle, key: object, answer: str, allowed: set[Grade]
) -> None:
    [one] = oracle.grade([ToGrade(answer, key)])
    assert one.outcome in allowed, one
