"""Answers that have to be the key, character by character but for space around them."""

from collections.abc import Sequence

from phi4.oracles.verdict import Grade, Graded, ToGrade


class ExactOracle:
    """The answer is the key; a key is a string or a list of strings, any of which is right."""

    name = "exact"

    def grade(self, answers: Sequence[ToGrade]) -> list[Graded]:
        """See `Oracle.grade`."""
        return [_graded(one) for one in answers]

    def close(self) -> None:
        """See `Oracle.close`."""


def _graded(one: ToGrade) -> Graded:
    keys = [one.key] if isinstance(one.key, str) else one.key
    if not isinstance(keys, list) or not keys or not all(isinstance(key, str) for key in keys):
        return Graded(Grade.UNGRADABLE, f"key is {one.key!r}; expected a string or a list of them")
    if one.answer.strip() in (key.strip() for key in keys):
        return Graded(Grade.RIGHT)
    return Graded(Grade.WRONG, "not equal to the key")
