"""Oracles by name, and guests that misbehave without ending a run."""

from collections.abc import Sequence
from importlib import metadata

import pytest

from phi4.errors import ConfigError, PlatformError
from phi4.oracles.choice import ChoiceOracle
from phi4.oracles.exact import ExactOracle
from phi4.oracles.math import MathOracle
from phi4.oracles.registry import ENTRY_POINTS, open_oracle
from phi4.oracles.verdict import Grade, Graded, ToGrade

ANSWERS = [ToGrade("a", "a"), ToGrade("boom", "a"), ToGrade("b", "a")]


class Guest(ExactOracle):
    """Fails on one answer, alone or among others."""

    def grade(self, answers: Sequence[ToGrade]) -> list[Graded]:
        if any(one.answer == "boom" for one in answers):
            raise RuntimeError("first line\nsecond line")
        return super().grade(answers)

    def close(self) -> None:
        raise RuntimeError("close")


class Short(ExactOracle):
    def grade(self, answers: Sequence[ToGrade]) -> list[Graded]:
        return super().grade(answers)[1:]


class Nonsense(ExactOracle):
    def grade(self, answers: Sequence[ToGrade]) -> list[Graded]:
        return [True] * len(answers)


class NoVerdict(ExactOracle):
    def grade(self, answers: Sequence[ToGrade]) -> list[Graded]:
        return [Graded("right")] * len(answers)


class Nothing(ExactOracle):
    def grade(self, answers: Sequence[ToGrade]) -> list[Graded]:
        return None


def broken() -> None:
    raise OSError("no licence")


def lacking() -> None:
    raise PlatformError("needs a GPU; use another")


def number() -> int:
    return 5


@pytest.fixture(autouse=True)
def guests(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"guest": "Guest", "short": "Short", "nonsense": "Nonsense", "nothing": "Nothing"}
    here |= {"no-verdict": "NoVerdict", "broken": "broken", "lacking": "lacking"}
    here |= {"number": "number", "absent": "no_such_name"}
    values = [(name, f"{__name__}:{value}") for name, value in here.items()]
    values += [("unimportable", "no_such_package.x:y"), ("twice", "a:b"), ("twice", "c:d")]
    entries = metadata.EntryPoints(metadata.EntryPoint(*one, ENTRY_POINTS) for one in values)
    monkeypatch.setattr(metadata, "entry_points", lambda group: entries.select(group=group))


def test_own_oracles_open_by_name() -> None:
    for name, kind in {"exact": ExactOracle, "choice": ChoiceOracle, "math": MathOracle}.items():
        oracle = open_oracle(name)
        assert isinstance(oracle, kind)
        assert oracle.name == name
        oracle.close()


def test_code_opens_or_says_what_is_missing() -> None:
    try:
        assert open_oracle("code").name == "code"
    except PlatformError as error:
        assert "install" in str(error)


def test_guest_fails_only_where_it_fails() -> None:
    oracle = open_oracle("guest")
    graded = oracle.grade(ANSWERS)
    assert [one.outcome for one in graded] == [Grade.RIGHT, Grade.UNGRADABLE, Grade.WRONG]
    assert graded[1].reason == "oracle guest failed: RuntimeError: first line second line"
    assert oracle.name == "guest"
    oracle.close()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("short", "returned 0 verdicts for 1 answers"),
        ("nonsense", "returned a bool"),
        ("no-verdict", "not a verdict"),
        ("nothing", "failed: TypeError"),
    ],
)
def test_nonsense_of_a_guest_is_ungradable(name: str, reason: str) -> None:
    graded = open_oracle(name).grade(ANSWERS)
    assert [one.outcome for one in graded] == [Grade.UNGRADABLE] * 3
    assert all(reason in one.reason for one in graded)
    assert open_oracle(name).grade([]) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no-such", "expected one of exact, choice, math, code, absent, broken"),
        ("broken", "OSError: no licence"),
        ("absent", "AttributeError"),
        ("unimportable", "No module named 'no_such_package'"),
        ("number", "is a int without grade and close"),
        ("twice", "a:b and c:d"),
    ],
)
def test_guest_that_does_not_open_is_an_error_before_grading(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"--oracle={name}") as caught:
        open_oracle(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_error_of_a_guest_for_the_user_passes() -> None:
    with pytest.raises(PlatformError, match="needs a GPU"):
        open_oracle("lacking")
