"""A conversation with a sampler, and its lines from a terminal or a pipe.

The decision: no exception ever interrupts a step of the model, whose ranks would then wait for each
other. Ctrl-C during an answer is noted, and cancels the answer between two steps.
"""

import os
import select
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import typer

from phi4.cli.sampling_options import SamplingOptions
from phi4.data.vocabulary.chat import Message, Role
from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.errors import ConfigError, TokenizerError
from phi4.sampling.chat import chat_prompt, next_prompt
from phi4.sampling.protocol import Completion, FinishReason, NewToken, Sampler
from phi4.sampling.text import TextStream

MARKER = "> "

_NUM_SEEDS = 1 << 63
_KEEP_ALIVE_SECONDS = 60.0
"""Far below the time after which ranks that wait for the leader take it for dead."""


class Dialogue:
    """Turns in id space: every prompt begins with the one before, whose keys are cached.

    Args:
        sampler: without other requests.
        tokenizer: of its ids.
        options: of every answer.
        system: what the conversation begins with.
    """

    def __init__(
        self, sampler: Sampler, tokenizer: Tokenizer, options: SamplingOptions, system: str | None
    ) -> None:
        self.sampler = sampler
        self._tokenizer = tokenizer
        self._options = options
        self._system = () if system is None else (Message(Role.SYSTEM, system),)
        self.reset()

    def reset(self) -> None:
        """Begin a new conversation."""
        self._prompt: tuple[int, ...] = ()
        self._answer: tuple[int, ...] = ()
        self._num_answers = 0

    def say(
        self, text: str, show: Callable[[str], None], is_stopped: Callable[[], bool]
    ) -> FinishReason:
        """Add a user's turn and the answer to it.

        Args:
            text: of the turn.
            show: given the answer, piece by piece.
            is_stopped: asked between steps; True ends the answer, which stays as far as it came.

        Raises:
            ConfigError: the conversation is too long for the model or the cache. It stays as it
                was.
            TokenizerError: the text has no tokens. The conversation stays as it was.
        """
        prompt = self._next_prompt(text)
        num_left = (self.sampler.limits.max_sequence_tokens or len(prompt)) - len(prompt)
        if num_left < 1:
            raise ConfigError(
                f"the conversation and this turn have {len(prompt)} tokens, the model takes "
                f"{self.sampler.limits.max_sequence_tokens} with the answer; shorten the turn, or "
                "start a new conversation with /reset"
            )
        max_tokens = min(self._options.max_tokens, num_left)
        # The same noise in every answer would make them alike.
        options = replace(self._options, seed=(self._options.seed + self._num_answers) % _NUM_SEEDS)
        request = options.request(prompt, self._tokenizer, max_tokens=max_tokens)
        request_id = self.sampler.submit(request)
        stream = TextStream(self._tokenizer, request.stop_ids, request.stop_strings)
        while True:
            for event in self.sampler.step():
                if isinstance(event, NewToken):
                    show(stream.feed(event.token.id))
                elif isinstance(event, Completion):
                    show(stream.finish())
                    self._prompt = prompt
                    self._num_answers += 1
                    self._answer = tuple(token.id for token in event.tokens)
                    return event.finish_reason
            if is_stopped():
                self.sampler.cancel(request_id)

    def _next_prompt(self, text: str) -> tuple[int, ...]:
        message = Message(Role.USER, text)
        if not self._prompt:
            return chat_prompt((*self._system, message), self._tokenizer)
        return next_prompt(self._prompt, self._answer, message, self._tokenizer)


def converse(dialogue: Dialogue, stdin: int) -> None:
    """Answer line after line until the input ends, `/exit`, or Ctrl-C at the prompt.

    Args:
        dialogue: to continue.
        stdin: file descriptor of a terminal, which gets a marker before every line, or of a pipe.
    """
    marker = MARKER if os.isatty(stdin) else ""
    try:
        for line in _lines(stdin, marker, keep_alive=dialogue.sampler.step):
            match line.strip():
                case "":
                    pass
                case "/exit":
                    return
                case "/reset":
                    dialogue.reset()
                case _:
                    _answer(dialogue, line)
    except KeyboardInterrupt:
        pass
    if marker:
        # The shell's prompt begins a line of its own.
        typer.echo()


def _answer(dialogue: Dialogue, line: str) -> None:
    try:
        with _noted_interrupts() as noted:
            reason = dialogue.say(
                line,
                show=lambda piece: typer.echo(piece, nl=False),
                is_stopped=lambda: bool(noted),
            )
    except (ConfigError, TokenizerError) as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        return
    typer.echo()
    if reason is FinishReason.LENGTH:
        typer.echo("(the answer was cut by --max-tokens or the model's length)", err=True)


@contextmanager
def _noted_interrupts() -> Iterator[list[int]]:
    """SIGINT goes into the list and interrupts nothing."""
    noted: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, previous)


def _lines(stdin: int, marker: str, keep_alive: Callable[[], object]) -> Iterator[str]:
    """Lines without their ends; bytes that are not UTF-8 are U+FFFD.

    Read from the descriptor: Python's own buffer would hide lines from `select`.
    """
    held, has_ended = b"", False
    while held or not has_ended:
        typer.echo(marker, nl=False)
        while b"\n" not in held and not has_ended:
            if not select.select([stdin], [], [], _KEEP_ALIVE_SECONDS)[0]:
                keep_alive()
                continue
            read = os.read(stdin, 1 << 16)
            held, has_ended = held + read, not read
        line, _, held = held.partition(b"\n")
        yield line.decode(errors="replace").rstrip("\r")
