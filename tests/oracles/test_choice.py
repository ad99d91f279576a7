"""The letter that an answer states last, and no other."""

import pytest

from phi4.oracles.choice import ChoiceOracle
from phi4.oracles.verdict import Grade, ToGrade

R, W, U = Grade.RIGHT, Grade.WRONG, Grade.UNGRADABLE
TOLD = {"letter": "B", "options": ["red", "blue", "green", "a dog"]}

CASES = [
    ("B", "(B)", R),
    ("B", "B.", R),
    ("B", "The answer is B", R),
    ("B", r"\boxed{B}", R),
    ("B", r"\boxed{\text{B}}", R),
    ("B", r"\boxed{\text{(B) blue}}", R),
    ("A", "A good question. The answer is (B).", W),
    ("B", "A good question. The answer is (B).", R),
    ("A", "The answer is a function of x.", U),
    ("A", "A function", U),
    ("C", "The answer is B. Wait, the answer is C.", R),
    ("B", "The answer is B. Wait, the answer is C.", W),
    ("B", "The answer is B or C", W),
    ("B", r"\boxed{A, B}", W),
    ("B", "(A) is false.\n(B) is true.", R),
    ("B", "(A) false (B) true, (C) false", U),
    ("B", "**B**", R),
    ("B", "B", R),
    ("B", "b", R),
    ("B", "(b)", R),
    ("B", "answer: b", R),
    ("B", "Answer: **B**. Because", R),
    ("B", "The correct option is B because it is", R),
    (TOLD, "blue", R),
    (TOLD, "The answer is blue.", R),
    (TOLD, "The answer is red.", W),
    (TOLD, "I think so", W),
    ("A", "I think A is it", U),
    ("B", "", W),
    ("B", "The correct answer is option B", R),
    ("B", "B) blue", R),
    ("B", "Option B is correct", R),
    ("D", "The answer is D: all of the above", R),
    ("B", "The answer is not B", U),
    ("B", r"$\boxed{B}$", R),
    ("B", "Final answer: $B$", R),
    ("B", r"The answer is \(\text{B}\)", R),
    ("C", "The answer choices are A, B and C. The answer is C.", R),
    ("B", "Option A is wrong, option B is correct", R),
    ("B", "Option B is correct, option A is wrong", R),
    ("B", "Answer B is right; answer A is wrong.", R),
    ("B", "answer A is wrong; the answer is B", R),
    ("B", "The best choice is (B).", R),
    ("A", "A is correct.", R),
    ("B", "(B) is right, (A) is not", R),
    ("B", "The answers are B and C", W),
]


@pytest.mark.parametrize(("key", "answer", "outcome"), CASES)
def test_letter(key: object, answer: str, outcome: Grade) -> None:
    [one] = ChoiceOracle().grade([ToGrade(answer, key)])
    assert one.outcome is outcome, one


@pytest.mark.parametrize(
    "key",
    [
        *(5, None, "", "AB", "1", {"letter": "Z", "options": ["x"]}, {"letter": "A", "option": []}),
        *({"letter": "A", "options": "xy"}, {"letter": "A", "options": [1]}, {"options": ["x"]}),
    ],
)
def test_key_that_is_not_understood_grades_nothing(key: object) -> None:
    [one] = ChoiceOracle().grade([ToGrade("(A)", key)])
    assert one.outcome is U


def test_options_may_be_a_table() -> None:
    key = {"letter": "c", "options": {"a": "1", "c": "3"}}
    answers = ["(C)", "3", "1", "(B)"]
    graded = ChoiceOracle().grade([ToGrade(answer, key) for answer in answers])
    assert [one.outcome for one in graded] == [R, R, W, W]
