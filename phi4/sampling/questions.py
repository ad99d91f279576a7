"""Read questions with answer keys.

A question is identified by the token ids of its prompt, so that two files in another order, or with
another form of the same prompt, have the same questions.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from phi4.data.files.jsonl import parse_row, placed_lines
from phi4.data.rows.messages import column_names, read_messages
from phi4.data.rows.token_ids import read_ids
from phi4.errors import DataError
from phi4.sampling.prompts import PromptReader


@dataclass(frozen=True)
class KeyedQuestion:
    """One question.

    Attributes:
        id: id of the row, or derived from the prompt's ids.
        prompt: token ids.
        text: text of the prompt for human readers; empty for ids.
        key: the row's `answer`, for an oracle; None without one.
        task: the row's `task`, which balances mixtures; empty without one.
    """

    id: str
    prompt: tuple[int, ...]
    text: str
    key: object
    task: str


def read_questions(path: Path, reader: PromptReader) -> Iterator[KeyedQuestion]:
    """Yield the questions of a JSON Lines file.

    Args:
        path: each line has `prompt` (a text), `messages` or `prompt_ids`, and may have `id`,
            `answer` and `task`.
        reader: whether a text is a user's turn, and the tokenizer.

    Raises:
        DataError: the file cannot be read, a line is not a question, or two have the same id.
    """
    places: dict[str, str] = {}
    for place, line, num_bytes in placed_lines(path):
        try:
            question = _question(parse_row(line, num_bytes), reader, place)
        except DataError as error:
            said = str(error)
            raise DataError(said if said.startswith(place) else f"{place}: {said}") from None
        if question.id in places:
            raise DataError(
                f"{place}: question {question.id!r} is also at {places[question.id]}; remove "
                f"one, or give each an `id`"
            )
        places[question.id] = place
        yield question


def _question(row: Mapping[str, object], reader: PromptReader, place: str) -> KeyedQuestion:
    if "prompt_ids" in row:
        if "prompt" in row or "messages" in row:
            raise DataError(f"expected exactly one prompt, but this row has {column_names(row)}")
        ids, text = read_ids(row, "prompt_ids", reader.tokenizer.vocab_size), ""
    else:
        prompt = reader.of_row(row, place)
        ids, text = prompt.ids, _shown_text(row)
    name, task = row.get("id"), row.get("task", "")
    if name is not None and type(name) not in (str, int):
        raise DataError(f"id is {name!r}; expected a string or an integer")
    if not isinstance(task, str):
        raise DataError(f"task is {task!r}; expected a string")
    return KeyedQuestion(
        id=question_id(ids) if name is None else str(name),
        prompt=ids,
        text=text,
        key=row.get("answer"),
        task=task,
    )


def question_id(prompt: tuple[int, ...]) -> str:
    """Return the id of a question whose row has none."""
    return hashlib.sha256(" ".join(map(str, prompt)).encode()).hexdigest()[:16]


def _shown_text(row: Mapping[str, object]) -> str:
    """Return the text, or the last turn of the messages."""
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        return prompt
    return str(read_messages(row["messages"], "messages")[-1].content)
