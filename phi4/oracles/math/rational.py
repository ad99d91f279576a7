"""Parse rational numbers in LaTeX or plain text, exactly.

Every expression of integers, decimals, fractions, powers and factorials has an exact value here, or
none; nothing is rounded. Sizes are checked before they are computed, so that `9^9^9` is cheap.
"""

import re
from fractions import Fraction

MAX_DIGITS = 20_000
"""Maximum digits of a numerator or denominator. Beyond it computing the gcd takes too long."""
_MAX_BITS = MAX_DIGITS * 10 // 3
_MAX_DEPTH = 30

_NUMBER = re.compile(
    r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)(?:\\overline\{\d+\})?(?:[eE][+-]?\d+)?"
)
_MIXED = re.compile(r"(-?)(\d+) ?(?:\\frac\{(\d+)\}\{(\d+)\}|(?<= )(\d+)/(\d+))")
_TOKEN = re.compile(rf"\s*(?:({_NUMBER.pattern})|(\\[a-zA-Z]+|[-+*/^!(){{}}]))")


class TooLargeError(Exception):
    """A number that is too large to compute."""


class NotRationalError(Exception):
    """The text is not a supported rational number."""


def rational(text: str) -> Fraction:
    """Return the value of a text from `final_answer.spelled`.

    Raises:
        NotRationalError: it is something else.
        TooLargeError: it has more than MAX_DIGITS digits, or is nested too deep.
    """
    if mixed := _MIXED.fullmatch(text):
        sign, whole, *parts = mixed.groups()
        over, under = (int(part) for part in parts if part is not None)
        if not 0 < over < under:
            raise NotRationalError(text)
        value = int(whole) + Fraction(over, under)
        return -value if sign else value
    tokens, at = [], 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise NotRationalError(text)
        tokens.append(found[1] or found[2])
        at = found.end()
    reader = _Reader(tokens)
    value = reader.sum(0)
    if reader.next is not None:
        raise NotRationalError(text)
    return value


class _Reader:
    """Recursive descent parser over tokens."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._at = 0

    @property
    def next(self) -> str | None:
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def sum(self, depth: int) -> Fraction:
        if depth > _MAX_DEPTH:
            raise TooLargeError("nested too deep")
        value = self._product(depth)
        while self.next in ("+", "-"):
            sign = self._take()
            other = self._product(depth)
            value = _checked(value + other if sign == "+" else value - other)
        return value

    def _product(self, depth: int) -> Fraction:
        value = self._signed(depth)
        while True:
            if self.next in ("*", r"\times", r"\cdot"):
                self._take()
                value = _checked(value * self._signed(depth))
            elif self.next in ("/", r"\div"):
                self._take()
                value = _divided(value, self._signed(depth))
            elif self.next == "(":
                value = _checked(value * self._power(depth))
            else:
                return value

    def _signed(self, depth: int) -> Fraction:
        if depth > _MAX_DEPTH:
            raise TooLargeError("nested too deep")
        if self.next in ("+", "-"):
            return -self._signed(depth + 1) if self._take() == "-" else self._signed(depth + 1)
        return self._power(depth)

    def _power(self, depth: int) -> Fraction:
        base = self._atom(depth)
        if self.next == "!":
            self._take()
            base = _factorial(base)
        if self.next != "^":
            return base
        self._take()
        return _powered(base, self._signed(depth + 1))

    def _atom(self, depth: int) -> Fraction:
        token = self._take()
        if token in ("(", "{"):
            value = self.sum(depth + 1)
            if self._take() != {"(": ")", "{": "}"}[token]:
                raise NotRationalError("brackets do not match")
            return value
        if token == r"\frac":
            return _divided(self._part(depth), self._part(depth))
        if token[0].isdigit() or token[0] == ".":
            return _number(token)
        raise NotRationalError(token)

    def _part(self, depth: int) -> Fraction:
        """Parse a numerator or denominator: in braces, or one digit."""
        token = self.next
        if token is not None and token.isdigit():
            if len(token) > 1:
                self._tokens[self._at] = token[1:]
                return Fraction(token[0])
            return Fraction(self._take())
        if token != "{":
            raise NotRationalError("a fraction without parts")
        return self._atom(depth)

    def _take(self) -> str:
        token = self.next
        if token is None:
            raise NotRationalError("it ends too early")
        self._at += 1
        return token


def _number(text: str) -> Fraction:
    text, _, exponent = text.lower().partition("e") if "overline" not in text else (text, "", "")
    plain = text.replace(",", "")
    if "\\" in plain:
        head, _, period = plain.rstrip("}").partition(r"\overline{")
        if "." not in head:
            raise NotRationalError(text)
        decimals = len(head.partition(".")[2])
        repeating = Fraction(int(period), (10 ** len(period) - 1) * 10**decimals)
        return _decimal(head) + repeating
    if exponent and abs(int(exponent)) > MAX_DIGITS:
        raise TooLargeError(f"a power of ten of {exponent}")
    return _checked(_decimal(plain) * Fraction(10) ** int(exponent or 0))


def _decimal(text: str) -> Fraction:
    whole, _, decimals = text.partition(".")
    return Fraction(int(whole + decimals or "0"), 10 ** len(decimals))


def _checked(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        raise TooLargeError(f"more than {MAX_DIGITS} digits")
    return value


def _divided(value: Fraction, other: Fraction) -> Fraction:
    if other == 0:
        raise NotRationalError("a division by zero")
    return _checked(value / other)


def _powered(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1 or (base == 0 and exponent <= 0):
        raise NotRationalError("a root, or a power of zero")
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    # A base of one bit is 0 or 1, and so are its powers.
    if bits > 1 and bits * abs(exponent.numerator) > 2 * _MAX_BITS:
        raise TooLargeError(f"a power with more than {MAX_DIGITS} digits")
    if bits <= 1:
        exponent = exponent % 2 + 2
    return _checked(base ** int(exponent))


def _factorial(value: Fraction) -> Fraction:
    if value.denominator != 1 or value < 0:
        raise NotRationalError("a factorial of a non-integer")
    if value.numerator.bit_length() * value.numerator > 2 * _MAX_BITS:
        raise TooLargeError(f"a factorial with more than {MAX_DIGITS} digits")
    product = 1
    for factor in range(2, value.numerator + 1):
        product *= factor
    return _checked(Fraction(product))
