"""A conversation through pipes: prompts in ids, stops by Ctrl-C, and what does not fit."""

import os
import signal
from collections.abc import Callable, Sequence

import pytest

from phi4.cli import conversation as module
from phi4.cli.conversation import Dialogue, converse
from phi4.cli.sampling_options import SamplingOptions
from phi4.data.vocabulary.chat import Message, Role
from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.sampling.chat import chat_prompt
from phi4.sampling.protocol import Request
from phi4.sampling.scripted import ScriptedSampler

TOKENIZER = Tokenizer({bytes([value]): value for value in range(256)})
END = TOKENIZER.im_end_id


class Listening(ScriptedSampler):
    """Answers by spelling a text, whatever was said; keeps what it was asked.

    Args:
        answer: of every turn.
        longest: of a sequence.
    """

    def __init__(self, answer: str, longest: int = 1000) -> None:
        super().__init__(self._next, TOKENIZER, longest)
        self.asked: list[Request] = []
        self._spelled = (*answer.encode(), END)
        self.before_token: Callable[[int], None] = lambda position: None

    def submit(self, request: Request) -> int:
        self.asked.append(request)
        return super().submit(request)

    def _next(self, ids: tuple[int, ...]) -> dict[int, float]:
        position = len(ids) - len(self.asked[-1].prompt)
        self.before_token(position)
        return {self._spelled[position]: 1.0}


def talk(
    sampler: ScriptedSampler, said: bytes, system: str | None = None, **options: object
) -> None:
    """All lines come at once, then the input ends."""
    chosen = {"max_tokens": 50, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    made = SamplingOptions(**{**chosen, "seed": 0, "stop": ()} | options)
    ours, theirs = os.pipe()
    os.write(theirs, said)
    os.close(theirs)
    try:
        converse(Dialogue(sampler, TOKENIZER, made, system), ours)
    finally:
        os.close(ours)


def prompt_of(*turns: str, system: str | None = None) -> tuple[int, ...]:
    """User and assistant in turn."""
    messages = [Message((Role.USER, Role.ASSISTANT)[i % 2], text) for i, text in enumerate(turns)]
    first = [Message(Role.SYSTEM, system)] if system else []
    return chat_prompt((*first, *messages), TOKENIZER)


def prompts(sampler: Listening) -> Sequence[tuple[int, ...]]:
    return [request.prompt for request in sampler.asked]


def test_every_prompt_begins_with_the_one_before(capsys) -> None:
    sampler = Listening("Ja 🙂")
    talk(sampler, "hé\n\n a b \nlast".encode(), system="Brief.")
    assert capsys.readouterr().out == "Ja 🙂\n" * 3
    turns = ("hé", "Ja 🙂", " a b ", "Ja 🙂", "last")
    assert prompts(sampler) == [prompt_of(*turns[:k], system="Brief.") for k in (1, 3, 5)]


def test_reset_begins_anew_and_exit_leaves_the_rest_unread(capsys) -> None:
    sampler = Listening("yes")
    talk(sampler, b"one\n/reset\ntwo\r\n /exit \nthree\n")
    assert prompts(sampler) == [prompt_of("one"), prompt_of("two")]
    assert capsys.readouterr().out == "yes\nyes\n"


def test_every_answer_has_a_seed_of_its_own() -> None:
    sampler = Listening("yes")
    talk(sampler, b"a\nb\n/reset\nc\n", seed=2**63 - 1)
    assert [request.seed for request in sampler.asked] == [2**63 - 1, 0, 2**63 - 1]


def test_answer_that_is_cut_or_stopped_stays_as_far_as_it_came(capsys) -> None:
    sampler = Listening("long answer")
    talk(sampler, b"a\nb\n", max_tokens=4)
    assert prompts(sampler)[1] == prompt_of("a", "long", "b")
    printed = capsys.readouterr()
    assert printed.out == "long\nlong\n" and "cut by --max-tokens" in printed.err
    sampler = Listening("long answer")
    talk(sampler, b"a\nb\n", stop=("g a",))
    assert prompts(sampler)[1] == prompt_of("a", "long a", "b")
    assert capsys.readouterr().out == "lon\nlon\n"


def test_turn_that_does_not_fit_is_refused_and_the_conversation_goes_on(capsys) -> None:
    fits = len(prompt_of("a", "yes", "b"))
    sampler = Listening("yes", longest=fits + 2)
    talk(sampler, b"a\n" + b"x" * 50 + b"\nb\nc\n")
    printed = capsys.readouterr()
    # The second answer has room for two tokens.
    assert printed.out == "yes\nye\n"
    assert prompts(sampler) == [prompt_of("a"), prompt_of("a", "yes", "b")]
    too_long, cut, full = printed.err.splitlines()
    assert too_long.startswith("ConfigError: the conversation and this turn have ")
    assert f"the model takes {fits + 2} with the answer" in too_long and "/reset" in full
    assert cut.startswith("(the answer was cut")


def test_ctrl_c_stops_an_answer_and_at_the_prompt_the_program(capsys, monkeypatch) -> None:
    sampler = Listening("long answer")

    def interrupt(position: int) -> None:
        if position == 3 and len(sampler.asked) == 1:
            signal.raise_signal(signal.SIGINT)

    sampler.before_token = interrupt
    talk(sampler, b"a\nb\n")
    assert capsys.readouterr().out == "long\nlong answer\n"
    assert prompts(sampler)[1] == prompt_of("a", "long", "b")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    # A pipe that stays open and silent; the sampler is asked to keep its ranks alive.
    monkeypatch.setattr(module, "_KEEP_ALIVE_SECONDS", 0.0)
    monkeypatch.setattr(sampler, "step", lambda: signal.raise_signal(signal.SIGINT))
    ours, theirs = os.pipe()
    made = SamplingOptions(50, 0.0, 1.0, 0, 0.0, 0, ())
    converse(Dialogue(sampler, TOKENIZER, made, None), ours)
    os.close(ours)
    os.close(theirs)


def test_terminal_gets_a_marker_before_every_line(capsys) -> None:
    ours, theirs = os.openpty()
    os.write(ours, b"a\n\x04")
    made = SamplingOptions(50, 0.0, 1.0, 0, 0.0, 0, ())
    converse(Dialogue(Listening("yes"), TOKENIZER, made, None), theirs)
    os.close(ours)
    os.close(theirs)
    assert capsys.readouterr().out == "> yes\n> \n"


@pytest.mark.parametrize("said", [b"\xff\xfe\n", b"\xf0\x9f\n"])
def test_bytes_that_are_no_text_do_not_end_it(said, capsys) -> None:
    talk(Listening("yes"), said + b"b\n")
    assert capsys.readouterr().out == "yes\nyes\n"
