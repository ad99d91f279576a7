"""What goes over the wire: forms of bodies and errors, streams that fail, clients that leave."""

import json
import socket
from contextlib import contextmanager

import httpx
import ollama
import pytest

from phi4.sampling.scripted import ScriptedSampler
from tests.support.served import MODEL_NAME, Served, served
from tests.support.unhurried import UnhurriedSampler
from tests.support.waiting import LONG_SECONDS, wait_until

A = 65
GENERATE = {"model": MODEL_NAME, "prompt": "Why?"}
USER = {"role": "user", "content": "Why?"}


@contextmanager
def web(server: Served):
    with httpx.Client(base_url=server.url, timeout=LONG_SECONDS) as opened:
        yield opened


def test_stream_is_the_default_and_lines_of_json(server: Served) -> None:
    with web(server) as http:
        reply = http.post("/api/generate", json=GENERATE)
        assert reply.headers["content-type"].startswith("application/x-ndjson")
        parts = [json.loads(line) for line in reply.text.splitlines()]
        assert [part["done"] for part in parts] == [False] * (len(parts) - 1) + [True]
        whole = http.post("/api/generate", json={**GENERATE, "stream": False})
        assert whole.headers["content-type"] == "application/json"
        assert whole.json()["response"] == "".join(part["response"] for part in parts)
        assert whole.json().keys() == parts[-1].keys()


def test_body_is_json_whatever_its_content_type(server: Served) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    with web(server) as http:
        reply = http.post("/api/generate", content=json.dumps(GENERATE), headers=headers)
        assert reply.status_code == 200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "the body is not JSON"),
        ("[]", "Input should be an object"),
        ("{}", "model: Field required"),
        ('{"model": 3}', "model: Input should be a valid string, got '3'"),
        ('{"model": "\\ud800"}', "the body is not JSON"),
        (json.dumps({**GENERATE, "options": {"top_k": "x"}}), "options.top_k: "),
        (json.dumps({**GENERATE, "options": {"temperature": float("nan")}}), "temperature=nan"),
        (json.dumps({**GENERATE, "options": {"stop": ["x"] * 65}}), "options.stop: "),
    ],
)
def test_body_that_is_none_is_refused_in_ollamas_form(server, content: str, message: str) -> None:
    with web(server) as http:
        reply = http.post("/api/generate", content=content)
    assert reply.status_code == 400
    assert message in reply.json()["error"]


def test_roles_that_phi4_lacks_are_refused(server: Served) -> None:
    with web(server) as http:
        messages = [{"role": "tool", "content": "4"}]
        reply = http.post("/api/chat", json={"model": MODEL_NAME, "messages": messages})
    assert reply.status_code == 400
    assert (
        "messages.0.role: Input should be 'system', 'user' or 'assistant'" in reply.json()["error"]
    )


def test_clients_of_old_show_a_model_by_its_name(server: Served) -> None:
    with web(server) as http:
        assert http.post("/api/show", json={"name": MODEL_NAME, "verbose": True}).is_success
        assert http.head("/api/tags").status_code == http.head("/api/version").status_code == 200
        missing = http.post("/api/embed", json={"model": MODEL_NAME, "input": "x"})
        assert (missing.status_code, missing.json()) == (
            404,
            {"error": "/api/embed does not exist"},
        )


def test_key_is_that_of_ollamas_client(sampler, tokenizer, monkeypatch) -> None:
    with served(sampler, tokenizer, api_key="secret") as server:
        with ollama.Client(host=server.url) as client:
            with pytest.raises(ollama.ResponseError, match="API key is missing") as caught:
                client.list()
            assert caught.value.status_code == 401
        monkeypatch.setenv("OLLAMA_API_KEY", "secret")
        with ollama.Client(host=server.url) as client:
            assert client.generate(MODEL_NAME, "Why?").response == "Because."


def test_error_within_a_stream_is_its_last_line(tokenizer) -> None:
    def ends_badly(ids: tuple[int, ...]) -> dict[int, float]:
        return {} if ids[-2:] == (A, A) else {A: 1.0}

    sampler = ScriptedSampler(ends_badly, tokenizer)
    with served(sampler, tokenizer) as server, ollama.Client(host=server.url) as client:
        parts = client.generate(MODEL_NAME, "Why?", stream=True)
        assert [next(parts).response, next(parts).response] == ["A", "A"]
        with pytest.raises(ollama.ResponseError, match="no entry"):
            next(parts)
        with pytest.raises(ollama.ResponseError, match="no entry") as caught:
            client.generate(MODEL_NAME, "Why?", stream=False)
        assert caught.value.status_code == 500
        assert (server.traffic.num_open, server.traffic.counts.failed) == (0, 2)


@pytest.fixture
def endless(tokenizer):
    """A server of one request at a time, whose model never ends."""
    sampler = UnhurriedSampler(lambda ids: {A: 1.0}, tokenizer)
    with served(sampler, tokenizer, max_open=1, default_max_tokens=1 << 40) as server:
        yield server


def is_free(server: Served) -> bool:
    return server.traffic.num_open == 0 and server.traffic.counts.cancelled == 1


def test_client_that_leaves_a_stream_frees_the_model(endless: Served) -> None:
    with web(endless) as http, http.stream("POST", "/api/generate", json=GENERATE) as reply:
        # It closes the stream when it is dropped.
        lines = reply.iter_lines()
        assert json.loads(next(lines))["response"] == "A"
        refused = http.post("/api/chat", json={"model": MODEL_NAME, "messages": [USER]})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
        assert "requests are open" in refused.json()["error"]
    wait_until(lambda: is_free(endless), "the request to be cancelled")


def test_client_that_leaves_before_the_whole_reply_frees_the_model(endless: Served) -> None:
    body = json.dumps({**GENERATE, "stream": False})
    host, port = endless.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /api/generate HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall((head + body).encode())
        wait_until(lambda: endless.traffic.counts.new_tokens > 0, "the request to begin")
    wait_until(lambda: is_free(endless), "the request to be cancelled")
