"""The chat page holds all that it needs, may load nothing, and makes no elements of text."""

import base64
import hashlib
import re
from collections.abc import Iterator
from html.parser import HTMLParser

import httpx
import pytest

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.sampling.scripted import ScriptedSampler
from tests.support.served import Served, served

TOKENIZER = Tokenizer({bytes([value]): value for value in range(256)})


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    """Wants a key, which the page itself does not need."""
    sampler = ScriptedSampler(lambda ids: {65: 1.0}, TOKENIZER)
    with served(sampler, TOKENIZER, api_key="secret") as running:
        yield running


@pytest.fixture(scope="module")
def answer(server: Served) -> httpx.Response:
    return httpx.get(server.url)


class Elements(HTMLParser):
    """What a page is made of.

    Attributes:
        texts: of its scripts and styles, by tag.
        attributes: of all elements, by name.
        controls: ids of what a reader fills in, with their enclosing label if there is one.
        label_targets: ids that labels name.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = {"script": [], "style": []}
        self.attributes: dict[str, list[str | None]] = {}
        self.controls: dict[str | None, bool] = {}
        self.label_targets: set[str | None] = set()
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        for name, value in attrs:
            self.attributes.setdefault(name, []).append(value)
        if tag in ("input", "textarea", "select"):
            self.controls[given.get("id")] = "label" in self._open
        if tag == "label":
            self.label_targets.add(given.get("for"))
        if tag not in ("input", "meta", "link"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in self.texts:
            self.texts[self._open[-1]].append(data)


def policy_of(answer: httpx.Response) -> dict[str, str]:
    parts = answer.headers["Content-Security-Policy"].split("; ")
    return dict(part.split(" ", 1) for part in parts)


def test_page_is_there_without_a_key(server: Served, answer: httpx.Response) -> None:
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    head = httpx.head(server.url)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["Content-Length"] == str(len(answer.content))
    assert httpx.get(f"{server.url}/v1/models").status_code == 401


def test_policy_allows_this_very_script_and_style_and_no_other_host(
    answer: httpx.Response,
) -> None:
    elements, policy = Elements(answer.text), policy_of(answer)
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        [text] = elements.texts[tag]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy.pop(directive) == f"'sha256-{digest}'"
    assert (policy.pop("connect-src"), policy.pop("img-src")) == ("'self'", "data:")
    assert policy.pop("default-src") == "'none'"
    assert set(policy) == {"base-uri", "form-action", "frame-ancestors"}
    assert set(policy.values()) == {"'none'"}


def test_page_names_nothing_to_load(answer: httpx.Response) -> None:
    attributes = Elements(answer.text).attributes
    assert [attributes.get("src"), attributes["href"]] == [None, ["data:,"]]
    assert not re.search(r"https?:|[\"'(]//|url\(|@import", answer.text)
    # The policy would refuse these, and the page would be broken.
    assert not [name for name in attributes if name.startswith("on") or name == "style"]


def test_script_makes_no_elements_of_text(answer: httpx.Response) -> None:
    [script] = Elements(answer.text).texts["script"]
    assert "textContent" in script
    makers = "innerHTML|outerHTML|insertAdjacentHTML|setHTML|document.write|DOMParser"
    assert not re.search(rf"{makers}|eval\(|Function\(|localStorage", script)


def test_every_control_has_a_label(answer: httpx.Response) -> None:
    elements = Elements(answer.text)
    assert {"question", "system", "temperature", "top_p", "max_tokens", "seed", "key"} == set(
        elements.controls
    )
    for name, is_inside in elements.controls.items():
        assert is_inside or name in elements.label_targets, name
