"""The key, and nothing else."""

import pytest

from phi4.oracles.exact import ExactOracle
from phi4.oracles.verdict import Grade, ToGrade


@pytest.mark.parametrize(
    ("answer", "key", "outcome"),
    [
        (" a b\n", "a b", Grade.RIGHT),
        ("a b", ["x", " a b"], Grade.RIGHT),
        ("a  b", "a b", Grade.WRONG),
        ("A b", "a b", Grade.WRONG),
        ("", "", Grade.RIGHT),
        ("5", 5, Grade.UNGRADABLE),
        ("5", [], Grade.UNGRADABLE),
        ("5", ["5", 5], Grade.UNGRADABLE),
    ],
)
def test_verdict(answer: str, key: object, outcome: Grade) -> None:
    [one] = ExactOracle().grade([ToGrade(answer, key)])
    assert one.outcome is outcome
