"""A server from its first answer to its last, over a model that may fail."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import pytest

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.errors import PlatformError
from phi4.serve.served_model import ServedModel
from phi4.serve.server import ServerOptions, answer_until, base_url
from phi4.serve.web_server import listen
from tests.support.server_process import address_in
from tests.support.unhurried import UnhurriedSampler
from tests.support.waiting import LONG_SECONDS, wait_until

TOKENIZER = Tokenizer({bytes([value]): value for value in range(256)})
HOST = "127.0.0.1"


class BrokenSampler(UnhurriedSampler):
    """Repeats one letter, until it is broken."""

    def __init__(self) -> None:
        super().__init__(lambda ids: {65: 1.0}, TOKENIZER)
        self.breaks = threading.Event()

    def step(self):
        if self.breaks.is_set():
            raise RuntimeError("a rank is gone")
        return super().step()


@dataclass
class Running:
    sampler: BrokenSampler
    told: threading.Event
    thread: threading.Thread
    errors: list[BaseException]


@contextmanager
def running(port: int = 0) -> Iterator[Running]:
    sampler, told, errors = BrokenSampler(), threading.Event(), []
    model = ServedModel("tiny", TOKENIZER, sampler.limits, 0)
    options = ServerOptions(HOST, port, "secret", 8, drain_seconds=0.0)

    def answer() -> None:
        try:
            answer_until(told, sampler, model, "step_0000100", options)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield Running(sampler, told, thread, errors)
    finally:
        told.set()
        thread.join()


def url_of(capfd: pytest.CaptureFixture) -> str:
    said = []

    def url() -> str:
        said.append(capfd.readouterr().err)
        return address_in("".join(said))

    return wait_until(url, "the line that says where the server is")


def test_server_that_is_told_before_it_answers_ends_at_once(capfd) -> None:
    with running() as server:
        server.told.set()
        server.thread.join()
    said = capfd.readouterr().err
    assert server.errors == [] and said.endswith("ended: 0 requests answered, 0 cancelled\n")
    assert "serving tiny (step_0000100)" in said and "(the key is PHI4_API_KEY)" in said
    assert "secret" not in said


def test_failure_of_the_model_ends_the_server_and_its_connections(capfd) -> None:
    with running() as server:
        url = url_of(capfd)
        body = {"model": "tiny", "prompt": "a", "max_tokens": 10_000_000, "stream": True}
        headers = {"Authorization": "Bearer secret"}
        asked = httpx.stream(
            "POST", f"{url}/v1/completions", json=body, headers=headers, timeout=LONG_SECONDS
        )
        with asked as answer:
            lines = answer.iter_lines()
            assert next(lines)
            server.sampler.breaks.set()
            *_, last = filter(None, lines)
            assert "the model failed; the server ends" in last
        server.thread.join()
        [error] = server.errors
        assert isinstance(error, RuntimeError)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


def test_port_that_was_taken_meanwhile_is_an_error() -> None:
    with listen(HOST, 0) as taken, running(taken.getsockname()[1]) as server:
        server.thread.join()
    [error] = server.errors
    assert isinstance(error, PlatformError) and "Address already in use" in str(error)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", "http://127.0.0.1:80"), ("::1", "http://[::1]:80"), ("gpu1", "http://gpu1:80")],
)
def test_address_is_one_that_clients_can_use(host, expected) -> None:
    assert base_url(host, 80) == expected
    assert "0.0.0.0" not in base_url("0.0.0.0", 80) and base_url("::", 80)
