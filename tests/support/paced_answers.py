"""A model that gives known answers in a conversation, token by token, when it is told to."""

import threading
from collections.abc import Mapping

from phi4.data.vocabulary.chat import Message
from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.sampling.chat import read_chat_prompt
from phi4.sampling.protocol import Request
from phi4.sampling.scripted import ScriptedSampler
from tests.support.waiting import LONG_SECONDS

BYTES = Tokenizer({bytes([value]): value for value in range(256)})
"""Every byte is a token."""

BREAKS = "\0"
"""Where an answer has this, the model fails."""


class PacedAnswers(ScriptedSampler):
    """Answers the last turn of a conversation.

    Attributes:
        asked: requests so far.

    Args:
        answers: by the text of the turn; one that is missing is "ok".
        max_sequence_tokens: as in `ModelLimits`.
    """

    def __init__(self, answers: Mapping[str, str], max_sequence_tokens: int | None = None) -> None:
        super().__init__(self._next, BYTES, max_sequence_tokens)
        self.asked: list[Request] = []
        self._answers = answers
        self._num_allowed, self._is_paced = 0, False
        self._changed = threading.Condition()

    def submit(self, request: Request) -> int:
        """See `Sampler.submit`."""
        self.asked.append(request)
        return super().submit(request)

    def messages(self, number: int) -> tuple[Message, ...]:
        """The turns of a request."""
        return read_chat_prompt(self.asked[number].prompt, BYTES)

    def pause(self) -> None:
        """Say nothing until allowed."""
        with self._changed:
            self._num_allowed, self._is_paced = 0, True

    def allow(self, num_tokens: int) -> None:
        """Say so many more tokens."""
        with self._changed:
            self._num_allowed += num_tokens
            self._changed.notify_all()

    def go_on(self) -> None:
        """Say the rest without waiting."""
        with self._changed:
            self._is_paced = False
            self._changed.notify_all()

    def _next(self, ids: tuple[int, ...]) -> dict[int, float]:
        with self._changed:
            self._changed.wait_for(lambda: self._num_allowed or not self._is_paced, LONG_SECONDS)
            self._num_allowed -= self._is_paced
        begin = len(ids) - ids[::-1].index(BYTES.im_sep_id)
        *_, turn = read_chat_prompt(ids[:begin], BYTES)
        answer = self._answers.get(turn.content, "ok").encode()
        position = len(ids) - begin
        if position == len(answer):
            return {BYTES.im_end_id: 1.0}
        return {} if answer[position] == ord(BREAKS) else {answer[position]: 1.0}
