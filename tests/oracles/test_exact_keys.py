"""Keys of the oracle `exact`: all of an answer, or what follows its last separator."""

import pytest

from phi4.oracles.exact import ExactOracle
from phi4.oracles.verdict import Grade, ToGrade

LAST = {"last": "8", "separator": "="}


@pytest.mark.parametrize(
    ("answer", "key", "grade"),
    [
        ("8", "8", Grade.RIGHT),
        (" 8\n", "8", Grade.RIGHT),
        ("3+5=8", "8", Grade.WRONG),
        ("b", ["a", "b"], Grade.RIGHT),
        ("3+5=8", LAST, Grade.RIGHT),
        ("8", LAST, Grade.RIGHT),
        ("3+5=8 ", LAST, Grade.RIGHT),
        ("8=3+5", LAST, Grade.WRONG),
        ("3+5=18", LAST, Grade.WRONG),
        ("3+5=8=", LAST, Grade.WRONG),
        ("3+5=8", {"last": ["7", "8"], "separator": "="}, Grade.RIGHT),
        ("3 -> 8", {"last": "8", "separator": "->"}, Grade.RIGHT),
        ("3+5=8", {"last": "8"}, Grade.UNGRADABLE),
        ("3+5=8", {"last": "8", "separator": ""}, Grade.UNGRADABLE),
        ("3+5=8", {"last": 8, "separator": "="}, Grade.UNGRADABLE),
        ("3+5=8", {"last": "8", "separator": "=", "more": 1}, Grade.UNGRADABLE),
        ("8", None, Grade.UNGRADABLE),
        ("8", [], Grade.UNGRADABLE),
    ],
)
def test_grade(answer: str, key: object, grade: Grade) -> None:
    (graded,) = ExactOracle().grade([ToGrade(answer, key)])
    assert graded.outcome is grade
    assert (graded.reason == "") == (grade is Grade.RIGHT)
