"""Requests beside others: the same answers in any company, and nothing left of those who leave."""

import json
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from tests.serve.openai_api.known_model import TOKENIZER, A, B, asking, known_server
from tests.support.served import MODEL_NAME, Served, served
from tests.support.unhurried import UnhurriedSampler
from tests.support.waiting import wait_until


def mixed_bodies() -> list[tuple[str, dict]]:
    bodies = []
    for number in range(24):
        body = {
            "max_tokens": 20 + number % 5,
            "n": 1 + number % 3,
            "temperature": (0, 0.7, 1.3)[number % 3],
            "top_p": (1, 0.9)[number % 2],
            "top_k": (0, 3, 2)[number % 3],
            "seed": number % 7,
            "stop": ["ea"] if number % 4 == 1 else None,
            "return_token_ids": True,
        }
        if number % 5 == 4:
            said = [{"role": "user", "content": "abxd"[number % 4]}]
            bodies.append(("chat/completions", body | {"messages": said, "logprobs": True}))
        else:
            prompt = ["ab", "ba"] if number % 4 == 2 else "a" + "abd"[number % 3]
            scored = {"logprobs": 2, "echo": number % 2 == 0}
            bodies.append(("completions", body | {"prompt": prompt} | scored))
    return bodies


def test_answers_do_not_depend_on_neighbours_7() -> None:
    bodies = mixed_bodies()
    with known_server() as server, asking(server) as client:
        alone = [client.choices(path, **body) for path, body in bodies]

        def ask(number: int) -> tuple[int, list[dict]]:
            path, body = bodies[number]
            return number, client.choices(path, **body)

        def leave(number: int) -> None:
            path, body = bodies[number]
            with open_request(server, path, body | {"max_tokens": 200}) as connection:
                connection.recv(1)

        with ThreadPoolExecutor(12) as workers:
            for order in (range(23, -1, -1), [number * 7 % 24 for number in range(24)]):
                assert dict(workers.map(ask, order)) == dict(enumerate(alone))
            leaving = [workers.submit(leave, number) for number in range(0, 24, 3)]
            staying = [number for number in range(24) if number % 3]
            assert dict(workers.map(ask, staying)) == {n: alone[n] for n in staying}
            for one in leaving:
                one.result()
        wait_until(lambda: server.traffic.num_open == 0, "the end of all requests")


def open_request(server: Served, path: str, body: Mapping[str, object]) -> socket.socket:
    """A connection that has sent a request for a stream, unless the body says otherwise."""
    where = urlsplit(server.url)
    content = json.dumps({"model": MODEL_NAME, "stream": True} | body).encode()
    head = (
        f"POST /v1/{path} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    connection = socket.create_connection((where.hostname, where.port))
    connection.sendall(head.encode() + content)
    return connection


@pytest.fixture
def endless() -> Iterator[tuple[UnhurriedSampler, Served]]:
    """A model that goes on for ever, and takes any length."""
    sampler = UnhurriedSampler(lambda ids: {A: 0.5, B: 0.5}, TOKENIZER)
    with served(sampler, TOKENIZER) as server:
        yield sampler, server


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_closed_connection_frees_the_sample_9(endless, path: str, stream: bool) -> None:
    sampler, server = endless
    prompt = {"prompt": "a"} if path == "completions" else {"messages": [user()]}
    body = prompt | {"max_tokens": 10**8, "stream": stream, "n": 2}
    with open_request(server, path, body) as connection:
        if stream:
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
        wait_until(lambda: server.traffic.num_open == 1, "the request")
        wait_until(lambda: server.traffic.counts.new_tokens > 10, "some tokens")
    wait_until(lambda: server.traffic.counts.cancelled == 1, "the cancelled request")
    assert (server.traffic.num_open, sampler._open) == (0, {})
    with asking(server) as client:
        [choice] = client.choices("completions", prompt="a", max_tokens=3)
    assert choice["finish_reason"] == "length"
    assert server.traffic.counts.cancelled == 1


def user() -> dict:
    return {"role": "user", "content": "a"}


def test_stop_string_ends_its_own_sample_in_the_model(endless) -> None:
    sampler, server = endless
    with asking(server) as client:
        choices = client.choices("completions", prompt="a", n=4, stop="ab", max_tokens=10**6)
    assert {choice["finish_reason"] for choice in choices} == {"stop"}
    assert server.traffic.counts.new_tokens < 200 and not sampler._open
