"""What a text states last, in one spelling."""

import pytest

from phi4.oracles.math.final_answer import final_answer, spelled, tight


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{71} no wait \boxed{72}", "72"),
        (r"so $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{\{1, \{2\}\}}", r"\{1, \{2\}\}"),
        (r"\boxed{5} and then \boxed{6", "5"),
        (r"\boxed 7 is it", "7"),
        (r"\fbox{8}", "8"),
        ("The answer is 4. No: the answer is 5. That is all.", "5"),
        ("work\n#### 1,234", "1,234"),
        ("Final answer: $x = 3$", "$x = 3$"),
        ("first\nx = 12\n\n", "x = 12"),
        ("the answer is:\n12", "12"),
        ("", None),
        (r"\boxed{}", None),
        (" \n ", None),
    ],
)
def test_last_statement(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "same"),
    [
        (r"$\dfrac{1}{2}$.", r"\frac{1}{2}"),
        (r"\left( 1,\, 2 \right)", "( 1, 2 )"),
        ("$5", "$5"),
        (r"$\$5$", "$5"),
        (r"50\%", "50%"),
        ("−3", "-3"),
        ("0.333...", "0.333..."),
        (r"\leftarrow", r"\leftarrow"),
        ("90°", r"90^\circ"),
    ],
)
def test_spelling(text: str, same: str) -> None:
    assert spelled(text) == same


def test_space_between_numbers_means_something() -> None:
    assert tight("1 1/2") == "1 1/2"
    assert tight("( 1 , 2 )") == "(1,2)"
