"""Exact values agree with the fractions of the standard library, and none takes long."""

import time
from contextlib import suppress
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4.oracles.math.rational import MAX_DIGITS, NotRationalError, TooLargeError, rational

FRACTIONS = st.fractions(min_value=-(10**6), max_value=10**6, max_denominator=10**6)


@given(FRACTIONS)
def test_every_spelling_of_a_fraction_is_its_value(value: Fraction) -> None:
    over, under = abs(value.numerator), value.denominator
    sign = "-" if value < 0 else ""
    for text in (f"{value}", f"{sign}\\frac{{{over}}}{{{under}}}", f"{sign}({over})/{{{under}}}"):
        assert rational(text) == value


@given(st.integers(-(10**12), 10**12), st.integers(0, 12))
def test_decimals_are_exact(digits: int, places: int) -> None:
    value = Fraction(digits, 10**places)
    text = f"{'-' if digits < 0 else ''}{abs(digits) // 10**places}"
    text += f".{abs(digits) % 10**places:0{places}d}" if places else ""
    assert rational(text) == value
    assert rational(f"{digits}e-{places}") == rational(f"{digits}\\times 10^{{-{places}}}") == value
    assert rational(f"{abs(digits):,}") == abs(digits)


@given(FRACTIONS, FRACTIONS, st.sampled_from("+-*/"))
def test_arithmetic_is_that_of_fractions(one: Fraction, other: Fraction, sign: str) -> None:
    if sign == "/" and other == 0:
        return
    value = {
        "+": lambda: one + other,
        "-": lambda: one - other,
        "*": lambda: one * other,
        "/": lambda: one / other,
    }[sign]()
    assert rational(f"({one}){sign}({other})") == value


@given(st.integers(-20, 20), st.integers(-20, 20))
def test_powers_are_that_of_fractions(base: int, exponent: int) -> None:
    if base != 0:
        assert rational(f"({base})^{{{exponent}}}") == Fraction(base) ** exponent


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-2^2", -4),
        ("2^3^2", 512),
        ("5!", 120),
        (r"\frac12", Fraction(1, 2)),
        (r"\frac34", Fraction(3, 4)),
        (r"3\frac{1}{2}", Fraction(7, 2)),
        ("-1 1/2", Fraction(-3, 2)),
        (r"0.1\overline{6}", Fraction(1, 6)),
        ("2(3)", 6),
        ("8/2/2", 2),
        ("--5", 5),
        ("(-1)^{99999999}", -1),
        ("1^{10^9}", 1),
        ("1,234.5", Fraction(2469, 2)),
        (".5", Fraction(1, 2)),
        ("1E+3", 1000),
    ],
)
def test_value(text: str, value: Fraction) -> None:
    assert rational(text) == value


@pytest.mark.parametrize(
    "text",
    [
        *("9^9^9", "9^{9^{9}}", "5^5^5^5^5", "10^{-99999}", "1e999999999", "99999!", "9999!!"),
        *("(" * 99 + "1" + ")" * 99, "-" * 150 + "1", "((9^9999)^9999)", "2^66000*2^66000"),
    ],
)
def test_large_numbers_are_refused_before_they_are_computed(text: str) -> None:
    with pytest.raises((TooLargeError, NotRationalError)):
        rational(text)


def test_largest_numbers_are_cheap() -> None:
    begun = time.thread_time()
    rational(f"1/(10^{{{MAX_DIGITS - 100}}}-1)+1/(10^{{99}}-1)")
    assert time.thread_time() - begun < 2


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "1/0", "2^{1/2}", "0^0", "1,2", "1..2", "(1", "1)", r"\frac{1}", "1 2", "3!!"),
        *(r"\sqrt{4}", "1/", "^2", "0.333...", "(-3)!", "1/2!x", "5%", r"\frac", "{1)"),
    ],
)
def test_anything_else_is_none(text: str) -> None:
    with pytest.raises(NotRationalError):
        rational(text)


@given(st.text(alphabet="0123456789+-*/^!().,e{} \\frac", max_size=40))
def test_any_text_has_a_value_or_none(text: str) -> None:
    with suppress(NotRationalError, TooLargeError):
        assert isinstance(rational(text), Fraction)
