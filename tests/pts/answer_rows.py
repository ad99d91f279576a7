"""Answers of models that no model drew, and a vocabulary for them."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from phi4.data.vocabulary.chat import Message, Role
from phi4.data.vocabulary.tokenizer import Tokenizer, rank_file_bytes
from phi4.pts.answers import AnswerRow
from phi4.sampling.chat import chat_prompt

RANKS = {bytes([value]): value for value in range(256)}
TOKENIZER = Tokenizer(RANKS)


@dataclass(frozen=True)
class Said:
    """What a model said to a question.

    Attributes:
        question: id and text of the question.
        text: of the answer.
        model: who said it.
        sample: which of its answers.
        key: of the question.
        ended: whether the model came to an end.
        task: of the question.
        chat: whether the prompt is a conversation.
    """

    question: str
    text: str
    model: str = "a"
    sample: int = 0
    key: Any = None
    ended: bool = True
    task: str = ""
    chat: bool = True

    def row(self) -> AnswerRow:
        """As a row."""
        turns = (Message(Role.USER, self.question),)
        prompt = chat_prompt(turns, TOKENIZER) if self.chat else TOKENIZER.encode(self.question)
        end = [TOKENIZER.im_end_id] if self.ended else []
        return AnswerRow(
            question=self.question,
            prompt_ids=list(prompt),
            prompt=self.question,
            key=self.key,
            task=self.task,
            model=self.model,
            sample=self.sample,
            seed=0,
            temperature=1.0,
            ids=[*TOKENIZER.encode(self.text), *end],
            text=self.text,
            finish_reason="stop" if self.ended else "length",
        )


def write_answers(path: Path, said: Iterable[Said]) -> Path:
    """A file of answers."""
    path.write_bytes(b"".join(msgspec.json.encode(one.row()) + b"\n" for one in said))
    return path


def write_rows(path: Path, rows: Iterable[object]) -> Path:
    """A file of any rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_ranks(path: Path) -> Path:
    """The rank file of TOKENIZER."""
    path.write_bytes(rank_file_bytes(RANKS))
    return path
