"""Arithmetic modulo 10 by rewriting, as solved by a writer who makes mistakes.

An expression of digits, `+` and `*` becomes shorter by one operator at a time:
`3+5+5*2=8+5*2=8+0=8`. Products come before sums, but the writer sometimes computes a sum before a
product. A model trained on such a writer learns both the rule and the mistake, so the choice of the
next operator often decides whether the answer is right, at varying positions, and the answer key
needs no data.
"""

import random
from dataclasses import dataclass

SEPARATOR = "="
"""Separates the steps; the text after the last one is the answer."""
_LEFTMOST = 0.7
"""Probability that the writer takes the first of the operators that may be next."""


@dataclass(frozen=True)
class Writer:
    """Error rates of a writer.

    Attributes:
        precedence_error: probability of computing a sum before an adjacent product, whenever there
            is one.
        slip: probability that a step also changes a digit.
    """

    precedence_error: float = 0.4
    slip: float = 0.01


def draw_expression(draw: random.Random, num_operators: int) -> str:
    """Digits with `+` or `*` between them, all equally likely."""
    digits = [str(draw.randrange(10)) for _ in range(num_operators + 1)]
    return digits[0] + "".join(draw.choice("+*") + digit for digit in digits[1:])


def value(expression: str) -> int:
    """Return its value modulo 10."""
    total = 0
    for term in expression.split("+"):
        product = 1
        for digit in term.split("*"):
            product *= int(digit)
        total += product
    return total % 10


def write_solution(draw: random.Random, expression: str, writer: Writer) -> str:
    """Write the steps from an expression to a digit, `8+5*2=8+0=8` for `3+5+5*2`."""
    steps = []
    while len(expression) > 1:
        expression = _reduced(expression, _next_operator(draw, expression, writer))
        if draw.random() < writer.slip:
            place = 2 * draw.randrange((len(expression) + 1) // 2)
            digit = str(draw.randrange(10))
            expression = expression[:place] + digit + expression[place + 1 :]
        steps.append(expression)
    return SEPARATOR.join(steps)


def _next_operator(draw: random.Random, expression: str, writer: Writer) -> int:
    """Return the position of the operator that the writer takes."""
    right: list[int] = []
    wrong: list[int] = []
    for place in range(1, len(expression), 2):
        beside = (expression[place - 2 : place - 1], expression[place + 2 : place + 3])
        comes_too_early = expression[place] == "+" and "*" in beside
        (wrong if comes_too_early else right).append(place)
    if wrong and draw.random() < writer.precedence_error:
        return draw.choice(wrong)
    return right[0] if draw.random() < _LEFTMOST else draw.choice(right)


def _reduced(expression: str, place: int) -> str:
    left, right = int(expression[place - 1]), int(expression[place + 1])
    result = left + right if expression[place] == "+" else left * right
    return f"{expression[: place - 1]}{result % 10}{expression[place + 2 :]}"
