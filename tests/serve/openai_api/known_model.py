"""A model of known probabilities that says something else behind each prompt, and its server."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import httpx

from phi4.data.vocabulary.chat import Message, Role
from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.sampling.chat import chat_prompt
from phi4.sampling.scripted import AnswerTable, ScriptedSampler
from tests.support.served import MODEL_NAME, Served, served
from tests.support.waiting import LONG_SECONDS

LONGER_TOKENS = (b"ST", b"OP", b" cat sat", b"\xf0\x9f", b"the", b" end", b"Answer")
TOKENIZER = Tokenizer(
    {token: i for i, token in enumerate([*(bytes([v]) for v in range(256)), *LONGER_TOKENS])}
)
EMOJI = "🙂".encode()
A, B, C, D, E = b"abcde"
CHAIN = {
    A: {B: 0.5, C: 0.3, D: 0.15, E: 0.05},
    B: {A: 0.9, E: 0.1},
    C: {C: 0.6, A: 0.4},
    D: {A: 1.0},
    E: {E: 0.7, B: 0.3},
}
MAX_SEQUENCE_TOKENS = 256
SPLIT = (b" cat sat", EMOJI[:2], EMOJI[2:3], EMOJI[3:], b"ST", b"OP", b"the")
"""What follows the prompt `x` and the conversation in which a user says `x`."""

BREAKS = ord("!")
"""Two tokens behind this prompt, the model fails."""


def ids_of(*tokens: bytes) -> tuple[int, ...]:
    return tuple(TOKENIZER.mergeable_ranks[token] for token in tokens)


def asked_in_chat(text: str) -> tuple[int, ...]:
    return chat_prompt((Message(Role.USER, text),), TOKENIZER)


_TURN = AnswerTable(
    {ids_of(b"x"): {ids_of(*SPLIT): 1.0}, asked_in_chat("x"): {ids_of(*SPLIT): 1.0}},
    TOKENIZER.im_end_id,
)
_DOCUMENT = AnswerTable({ids_of(b"y"): {ids_of(b"the"): 1.0}}, TOKENIZER.eod_id)


def script(ids: tuple[int, ...]) -> Mapping[int, float]:
    """The answers of the tables, then a chain of letters that goes on for ever."""
    if ids[0] == BREAKS and len(ids) == 3:
        return {}
    return _TURN(ids) or _DOCUMENT(ids) or CHAIN.get(ids[-1], {A: 1.0})


def sampler() -> ScriptedSampler:
    return ScriptedSampler(script, TOKENIZER, MAX_SEQUENCE_TOKENS)


class Client:
    """Asks a server in plain HTTP.

    Attributes:
        http: of the server's root.
    """

    def __init__(self, server: Served) -> None:
        self.http = httpx.Client(base_url=server.url, timeout=LONG_SECONDS)

    def post(self, path: str, **body: object) -> httpx.Response:
        return self.post_text(path, json.dumps({"model": MODEL_NAME} | body))

    def post_text(self, path: str, text: str | bytes) -> httpx.Response:
        headers = {"Content-Type": "application/json"}
        return self.http.post(f"/v1/{path}", content=text, headers=headers)

    def choices(self, path: str, **body: object) -> list[dict]:
        response = self.post(path, **body)
        assert response.status_code == 200, response.text
        return response.json()["choices"]

    def chunks(self, path: str, **body: object) -> list[dict]:
        """The events of a stream that ends as it has to."""
        response = self.post(path, stream=True, **body)
        assert response.headers["content-type"].startswith("text/event-stream")
        *events, done, rest = response.text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]


@contextmanager
def asking(server: Served) -> Iterator[Client]:
    client = Client(server)
    with client.http:
        yield client


@contextmanager
def known_server(**fields: object) -> Iterator[Served]:
    with served(sampler(), TOKENIZER, **fields) as server:
        yield server
