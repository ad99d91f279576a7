"""A server whose model knows a few answers by heart, and the client that Ollama's users have."""

from collections.abc import Iterator
from itertools import product

import ollama
import pytest

from phi4.data.vocabulary.chat import Message, Role
from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.sampling.chat import chat_prompt
from phi4.sampling.protocol import Request
from phi4.sampling.scripted import AnswerTable, ScriptedSampler
from tests.support.served import Served, served

EMOJI = "🙂".encode()
SPELLED = (b" cat sat", EMOJI[:2], EMOJI[2:3], EMOJI[3:], b"ST", b"OP", b"the")
MAX_SEQUENCE_TOKENS = 200
STEP_BY_STEP = "Human: Question: What is LangChain?\n\nAnswer: Let's think step by step."
"""What LangChain makes of the question of its own example of a chain over Ollama."""


class Asked(ScriptedSampler):
    """A sampler that keeps what it was asked.

    Attributes:
        requests: in the order in which they came.
    """

    def __init__(self, *args: object, **fields: object) -> None:
        super().__init__(*args, **fields)
        self.requests: list[Request] = []

    def submit(self, request: Request) -> int:
        """See `Sampler.submit`."""
        self.requests.append(request)
        return super().submit(request)


def turns(tokenizer: Tokenizer, *said: tuple[Role, str]) -> tuple[int, ...]:
    """The prompt of a conversation."""
    return chat_prompt([Message(role, content) for role, content in said], tokenizer)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Every byte under its own id, then the tokens of SPELLED."""
    tokens = dict.fromkeys([bytes([value]) for value in range(256)] + list(SPELLED))
    return Tokenizer({token: token_id for token_id, token in enumerate(tokens)})


@pytest.fixture(scope="module")
def sampler(tokenizer: Tokenizer) -> Asked:
    """Answers to exact prompts; it fails on any other, so a wrong template is a red test."""

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text))

    user, system, assistant = Role.USER, Role.SYSTEM, Role.ASSISTANT
    spelled = tuple(tokenizer.mergeable_ranks[token] for token in SPELLED)
    table = {
        turns(tokenizer, (user, "Why?")): {ids("Because."): 1.0},
        turns(tokenizer, (system, "Be brief."), (user, "Why?")): {ids("So."): 1.0},
        turns(tokenizer, (user, "Spell")): {spelled: 1.0},
        turns(tokenizer, (user, "Toss")): {ids("".join(s)): 1.0 for s in product("HT", repeat=8)},
        turns(tokenizer, (user, "Toss one")): {ids("H"): 3.0, ids("T"): 1.0},
        turns(tokenizer, (user, "a<|im_end|>b")): {ids("Text."): 1.0},
        turns(tokenizer, (user, "What?"), (assistant, "B."), (user, "And?")): {ids("Still."): 1.0},
        (*turns(tokenizer, (user, "Count")), *ids("one ")): {ids("two"): 1.0},
        ids("1+1="): {ids("2"): 1.0},
        turns(tokenizer, (user, STEP_BY_STEP)): {ids("It is a library."): 1.0},
    }
    return Asked(AnswerTable(table, tokenizer.im_end_id), tokenizer, MAX_SEQUENCE_TOKENS)


@pytest.fixture(scope="module")
def server(sampler: Asked, tokenizer: Tokenizer) -> Iterator[Served]:
    """One for the tests of a file; what they ask is apart from each other."""
    with served(sampler, tokenizer) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[ollama.Client]:
    """Ollama's own."""
    with ollama.Client(host=server.url) as opened:
        yield opened
