"""Grade answers that must equal the key, except for surrounding white space."""

from collections.abc import Mapping, Sequence

from phi4.oracles.verdict import Grade, Graded, ToGrade


class ExactOracle:
    """Grades whether the answer equals the key, a string or a list of accepted strings.

    `{"last": KEY, "separator": "="}` compares only the text after the last separator, or the entire
    answer without one: for answers that end with their result.
    """

    name = "exact"

    def grade(self, answers: Sequence[ToGrade]) -> list[Graded]:
        """See `Oracle.grade`."""
        return [_graded(one) for one in answers]

    def close(self) -> None:
        """See `Oracle.close`."""


def _graded(one: ToGrade) -> Graded:
    answer, key = one.answer, one.key
    if isinstance(key, Mapping):
        separator = key.get("separator")
        if set(key) != {"last", "separator"} or not isinstance(separator, str) or not separator:
            return _foreign(one.key)
        answer, key = answer.rpartition(separator)[2], key["last"]
    keys = [key] if isinstance(key, str) else key
    if not isinstance(keys, list) or not keys or not all(isinstance(key, str) for key in keys):
        return _foreign(one.key)
    if answer.strip() in (key.strip() for key in keys):
        return Graded(Grade.RIGHT)
    return Graded(Grade.WRONG, "not equal to the key")


def _foreign(key: object) -> Graded:
    return Graded(
        Grade.UNGRADABLE,
        f'key is {key!r}; expected a string, a list of them, or {{"last": ..., "separator": ...}}',
    )
