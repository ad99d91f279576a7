"""Read prompts to continue or answer: texts and conversations, from arguments or a file."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import BinaryIO

from phi4.data.files.jsonl import open_lines, parse_row, read_lines, reading
from phi4.data.rows.messages import read_messages
from phi4.data.vocabulary.chat import Message, Role
from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.errors import DataError
from phi4.sampling.chat import chat_prompt

STDIN = Path("-")


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        place: origin of the prompt, for errors.
        ids: token ids.
        text: text to continue; empty for a conversation.
    """

    place: str
    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class PromptReader:
    """Reads prompts from a user's input.

    Attributes:
        tokenizer: tokenizer of the model.
        chat: whether a text is a user's turn instead of the beginning of a text.
        system: system turn for conversations that have none; None to add nothing.
    """

    tokenizer: Tokenizer
    chat: bool
    system: str | None

    def of_texts(self, texts: Sequence[str]) -> Iterator[Prompt]:
        """Return one prompt per text."""
        for number, text in enumerate(texts):
            yield self._of_text(text, f"prompt {number}")

    def of_file(self, path: Path) -> Iterator[Prompt]:
        """Yield one prompt per line of a JSON Lines file or of stdin; empty lines are skipped.

        Raises:
            DataError: the file cannot be read, or a line is not a prompt.
        """
        opened: AbstractContextManager[BinaryIO | BufferedIOBase]
        opened = nullcontext(sys.stdin.buffer) if path == STDIN else open_lines(path)
        with reading(path), opened as lines:
            for number, (line, num_bytes) in enumerate(read_lines(lines), start=1):
                if line.strip():
                    yield self._of_line(line, num_bytes, f"{path}:{number}")

    def _of_line(self, line: bytes, num_bytes: int, place: str) -> Prompt:
        try:
            row = parse_row(line, num_bytes)
        except DataError as error:
            raise DataError(f"{place}: {error}") from None
        return self.of_row(row, place)

    def of_row(self, row: Mapping[str, object], place: str) -> Prompt:
        """Return the prompt of a row.

        Raises:
            DataError: it has none, or two; the message begins with the place.
        """
        if "messages" in row and "prompt" not in row:
            try:
                return self._of_messages(read_messages(row["messages"], "messages"), place)
            except DataError as error:
                raise DataError(f"{place}: {error}") from None
        text = row.get("prompt")
        if "messages" in row or not isinstance(text, str):
            raise DataError(
                f'{place}: expected {{"prompt": "text"}} or {{"messages": [...]}}, got the keys '
                f"{', '.join(sorted(row)) or 'none'}"
            )
        return self._of_text(text, place)

    def _of_text(self, text: str, place: str) -> Prompt:
        if self.chat:
            return self._of_messages((Message(Role.USER, text),), place)
        return Prompt(place, tuple(self.tokenizer.encode(text)), text)

    def _of_messages(self, messages: tuple[Message, ...], place: str) -> Prompt:
        if self.system is not None and messages[0].role is not Role.SYSTEM:
            messages = (Message(Role.SYSTEM, self.system), *messages)
        return Prompt(place, chat_prompt(messages, self.tokenizer), "")
