"""Read external texts: refusals, bogus questions, harmful prompts."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phi4.errors import DataError
from phi4.pts.json_rows import optional_text_of, question_of, read_json_rows, text_of


@dataclass(frozen=True)
class Refusal:
    """A refusal of one question, optionally with better texts than the model's.

    Attributes:
        text: text of the refusal.
        prompt: the question as a user would ask it; None for the model's own prompt.
        answer: a right answer for fine-tuning; None for the model's own.
    """

    text: str
    prompt: str | None = None
    answer: str | None = None


@dataclass(frozen=True)
class Bogus:
    """An unanswerable question that resembles a real one.

    Attributes:
        text: text of the question.
        refusal: its own refusal; None to use a general one.
    """

    text: str
    refusal: str | None


@dataclass(frozen=True)
class SafetyPrompt:
    """A prompt that must be refused.

    Attributes:
        prompt: prompt of the user.
        refusal: refusal of the assistant.
        unsafe: an unsafe answer; None without one.
    """

    prompt: str
    refusal: str
    unsafe: str | None


class Refusals:
    """The refusals of a file.

    Args:
        path: rows of `question` and `refusal`, optionally with better `prompt` and `answer` than
            the model's; or of `refusal` alone, which applies to any question.
        seed: determines which general refusal a question gets.

    Raises:
        DataError: the file holds no refusal, a row is malformed, or a question has two.
    """

    def __init__(self, path: Path, seed: int) -> None:
        self._of_question: dict[str, Refusal] = {}
        self._of_any: list[str] = []
        self._seed = seed
        for place, row in read_json_rows(path):
            text = text_of(row, "refusal", place)
            if row.get("question") is None:
                self._of_any.append(text)
                continue
            question = question_of(row, place)
            if question in self._of_question:
                raise DataError(f"{place}: question {question!r} has a refusal already; keep one")
            prompt, answer = (optional_text_of(row, name, place) for name in ("prompt", "answer"))
            self._of_question[question] = Refusal(text, prompt, answer)
        if not self._of_question and not self._of_any:
            raise DataError(f'{path} holds no refusal; write {{"refusal": "text"}} lines')

    def of(self, question: str) -> Refusal | None:
        """Return the refusal of a question; None if there is neither its own nor a general one."""
        own = self._of_question.get(question)
        if own is not None or not self._of_any:
            return own
        return Refusal(_draw(self._of_any, self._seed, question))


def read_bogus(path: Path) -> dict[str, list[Bogus]]:
    """Read the bogus questions of a file by their original question.

    Args:
        path: rows of `question`, `bogus` and optionally `refusal`.

    Raises:
        DataError: a row is malformed.
    """
    found: dict[str, list[Bogus]] = {}
    for place, row in read_json_rows(path):
        bogus = Bogus(text_of(row, "bogus", place), optional_text_of(row, "refusal", place))
        found.setdefault(question_of(row, place), []).append(bogus)
    return found


def read_safety(path: Path) -> list[SafetyPrompt]:
    """Read the safety prompts of a file: rows of `prompt`, `refusal` and optionally `unsafe`.

    Raises:
        DataError: a row is malformed.
    """
    return [
        SafetyPrompt(
            text_of(row, "prompt", place),
            text_of(row, "refusal", place),
            optional_text_of(row, "unsafe", place),
        )
        for place, row in read_json_rows(path)
    ]


def _draw(texts: Sequence[str], seed: int, question: str) -> str:
    digest = hashlib.sha256(repr((seed, question)).encode()).digest()
    return texts[int.from_bytes(digest[:8], "big") % len(texts)]
