"""A page of another site cannot use the server, whatever name it gives to this machine."""

from collections.abc import Iterator

import httpx
import pytest

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.sampling.scripted import ScriptedSampler
from phi4.serve.app import make_app
from phi4.serve.served_model import ServedModel
from phi4.serve.traffic import Traffic
from phi4.serve.web_pages import hosts_of
from phi4.serve.web_server import listen, serving

TOKENIZER = Tokenizer({bytes([value]): value for value in range(256)})
EVERYWHERE = ("0.0.0.0", "::")
BOUND = ("127.0.0.1", "gpu7.example", *EVERYWHERE)
"""What the server is told to listen on; here it listens on the loopback address for all."""


@pytest.fixture(scope="module", params=BOUND)
def bound(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def client(bound: str) -> Iterator[httpx.Client]:
    limits = ScriptedSampler(lambda ids: {65: 1.0}, TOKENIZER).limits
    model = ServedModel("phi-4-tiny", TOKENIZER, limits, 0)
    listener = listen("127.0.0.1", 0)
    with serving(make_app(Traffic("weights"), model, hosts=hosts_of(bound)), listener):
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with httpx.Client(base_url=url) as client:
            yield client


def code_of(answer: httpx.Response) -> str | None:
    return answer.json()["error"]["code"] if answer.status_code == 403 else None


def post(client: httpx.Client, **headers: str) -> str | None:
    """The code with which a request that could change something is refused; None: it is not."""
    return code_of(client.post("/v1/models", headers=headers))


@pytest.mark.parametrize(
    ("name", "answered"),
    [
        ("localhost", set(BOUND)),
        ("LOCALHOST.", set(BOUND)),
        ("127.0.0.1", set(BOUND)),
        ("10.1.2.3", set(BOUND)),
        ("[::1]", set(BOUND)),
        ("gpu7.example", {"gpu7.example", *EVERYWHERE}),
        ("evil.example", set(EVERYWHERE)),
        ("localhost.evil.example", set(EVERYWHERE)),
        ("127.0.0.1.evil.example", set(EVERYWHERE)),
    ],
)
def test_names_that_the_server_answers_to(
    client: httpx.Client, bound: str, name: str, answered: set[str]
) -> None:
    for host in (name, f"{name}:8000"):
        for path in ("/", "/health", "/v1/models"):
            answer = client.get(path, headers={"Host": host})
            expected = None if bound in answered else "unknown_host"
            assert (code_of(answer), answer.is_success) == (expected, expected is None), host


def test_refused_name_is_told_what_to_do() -> None:
    limits = ScriptedSampler(lambda ids: {65: 1.0}, TOKENIZER).limits
    app = make_app(Traffic("weights"), ServedModel("phi-4-tiny", TOKENIZER, limits, 0))
    listener = listen("127.0.0.1", 0)
    with serving(app, listener):
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        answer = httpx.get(f"{url}/api/version", headers={"Host": "gpu7:8000"})
    assert answer.status_code == 403
    assert "has the host name 'gpu7'" in answer.json()["error"]
    assert "start the server with --host gpu7" in answer.json()["error"]


def test_only_the_own_page_computes_anything(client: httpx.Client) -> None:
    url = str(client.base_url).rstrip("/")
    assert post(client) is None
    assert post(client, Origin=url) is None
    # As behind a proxy that changed Host.
    assert post(client, **{"Sec-Fetch-Site": "same-origin"}, Origin="https://chat.example") is None
    for origin in ("https://evil.example", "null", "http://localhost:3000", f"{url}1"):
        assert post(client, Origin=origin) == "foreign_origin", origin
    # A page on another port of this machine is of the same site, and not this server's.
    for site in ("cross-site", "same-site"):
        assert post(client, **{"Sec-Fetch-Site": site}, Origin=url) == "foreign_origin", site


def test_no_other_page_may_read_an_answer(client: httpx.Client) -> None:
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    for method in ("OPTIONS", "GET"):
        for path in ("/", "/health", "/v1/models", "/v1/chat/completions"):
            answer = client.request(method, path, headers=asked)
            assert not [name for name in answer.headers if name.startswith("access-control")]
            assert method == "GET" or not answer.is_success
