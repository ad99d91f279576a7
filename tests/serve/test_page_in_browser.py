"""The chat page in a browser, over the server's own routes.

The pictures are left in build/screenshots/.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.architecture.sizes import ROOT
from tests.support.browser import open_page
from tests.support.chromium import CHROMIUM
from tests.support.paced_answers import BREAKS, BYTES, PacedAnswers
from tests.support.served import MODEL_NAME, WEIGHTS, Served, served
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on PATH"),
]

PICTURES = ROOT / "build" / "screenshots"
HTML = '<script>document.title = "run"</script><img src="x" onerror="document.title = 1"> &lt;b>'
CODE = """A prime has no divisor but 1 and itself.

```python
def is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n ** 0.5) + 1))
```

It tries every candidate up to the square root, so `is_prime(97)` takes 8 divisions."""
ANSWERS = {
    "Hello": "Hello, what can I do?",
    "How do I test for primes?": CODE,
    "Show me HTML": f"{HTML}\n```html\n{HTML}\n```",
    "Break": f"so far so go{BREAKS}od",
}


@contextmanager
def opened(server: Served, width: int = 1280, height: int = 860) -> Iterator["Page"]:
    """The page; fails where its script did, or where its policy refused something."""
    wrong: list[str] = []
    with open_page(width, height) as page:
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if "Policy" in said.text else None)
        page.goto(server.url)
        yield page
    assert wrong == []


@pytest.fixture
def model() -> Iterator[PacedAnswers]:
    sampler = PacedAnswers(ANSWERS, max_sequence_tokens=2048)
    yield sampler
    sampler.go_on()


@pytest.fixture
def server(model: PacedAnswers) -> Iterator[Served]:
    with served(model, BYTES, default_max_tokens=1024) as running:
        yield running
        # Else a test that failed would wait for its model.
        model.go_on()


@pytest.fixture
def page(server: Served) -> Iterator["Page"]:
    with opened(server) as shown:
        yield shown


def ask(page: "Page", text: str) -> None:
    page.get_by_label("Your message").fill(text)
    page.keyboard.press("Enter")


def turn(page: "Page", number: int = -1) -> "Locator":
    turns = page.get_by_role("article")
    return turns.last if number == -1 else turns.nth(number)


def text_of(page: "Page", number: int = -1) -> str:
    return turn(page, number).locator(".text").inner_text()


def until_ended(page: "Page") -> str:
    """Wait for the end of an answer, and return what it says of itself."""
    page.get_by_role("button", name="Send").wait_for()
    return turn(page).locator(".facts").inner_text()


def until_text(page: "Page", expected: str) -> None:
    wait_until(lambda: text_of(page) == expected, f"the answer {expected!r}")


def test_answer_is_seen_growing_and_is_part_of_the_next_question(
    page: "Page", model: PacedAnswers
) -> None:
    page.get_by_text(WEIGHTS).wait_for()
    assert page.get_by_role("heading", level=1).inner_text() == page.title() == MODEL_NAME
    model.pause()
    ask(page, "Hello")
    for length, grown in ((5, "Hello"), (3, "Hello, w")):
        model.allow(length)
        until_text(page, grown)
    assert turn(page).get_attribute("aria-busy") == "true"
    assert "8 tokens" in turn(page).locator(".facts").inner_text()
    model.go_on()
    facts = until_ended(page)
    assert text_of(page) == "Hello, what can I do?"
    # The end of the turn is a token too.
    assert facts.startswith("22 tokens, ") and "tokens/s, first after" in facts
    assert turn(page).get_attribute("aria-busy") is None
    ask(page, "How do I test for primes?")
    until_ended(page)
    said = [(message.role.value, message.content) for message in model.messages(1)]
    assert said == [
        ("user", "Hello"),
        ("assistant", "Hello, what can I do?"),
        ("user", "How do I test for primes?"),
    ]
    code = turn(page).locator("pre code")
    assert code.inner_text() == CODE.split("```")[1].removeprefix("python\n").rstrip("\n")
    take_pictures(page, "chat")


def take_pictures(page: "Page", name: str) -> None:
    """Light, dark, and as on a phone."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"{name}.png")
    page.emulate_media(color_scheme="dark")
    page.screenshot(path=PICTURES / f"{name}_dark.png")
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": 390, "height": 780})
    # As the page begins on a phone.
    page.get_by_text("Settings").click()
    page.screenshot(path=PICTURES / f"{name}_narrow.png")
    # Nothing is cut off at the side.
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_text("Settings").click()


def test_stopped_answer_stays_in_the_conversation(
    page: "Page", model: PacedAnswers, server: Served
) -> None:
    model.pause()
    ask(page, "Hello")
    model.allow(5)
    until_text(page, "Hello")
    page.get_by_role("button", name="Stop").click()
    assert "stopped" in until_ended(page)
    model.go_on()
    wait_until(lambda: server.traffic.counts.cancelled == 1, "the end of what was stopped")
    ask(page, "Go on")
    until_ended(page)
    assert [message.content for message in model.messages(1)] == ["Hello", "Hello", "Go on"]
    model.pause()
    ask(page, "Hello")
    page.get_by_role("button", name="Stop").wait_for()
    page.keyboard.press("Escape")
    # Nothing came, so nothing is counted and no empty turn is sent.
    assert until_ended(page) == "stopped"
    model.go_on()
    ask(page, "Again")
    until_ended(page)
    contents = [message.content for message in model.messages(-1)]
    assert contents == ["Hello", "Hello", "Go on", "ok", "Hello", "Again"]


def test_retry_edit_and_new_conversation(page: "Page", model: PacedAnswers) -> None:
    ask(page, "Hello")
    until_ended(page)
    turn(page).get_by_role("button", name="Retry").click()
    until_ended(page)
    assert page.get_by_role("article").count() == 2
    assert model.asked[0].prompt == model.asked[1].prompt
    assert model.asked[0].seed != model.asked[1].seed
    turn(page, 0).get_by_role("button", name="Edit").click()
    assert page.get_by_role("article").count() == 0
    assert page.get_by_label("Your message").input_value() == "Hello"
    model.pause()
    ask(page, "Hello again")
    page.get_by_role("button", name="Stop").wait_for()
    page.get_by_role("button", name="New conversation").click()
    model.go_on()
    ask(page, "Hello")
    until_ended(page)
    assert page.get_by_role("article").count() == 2
    assert [message.content for message in model.messages(-1)] == ["Hello"]


def test_html_stays_text(page: "Page") -> None:
    for question in ("Show me HTML", HTML):
        ask(page, question)
        until_ended(page)
    assert text_of(page, 2) == HTML
    assert text_of(page, 1).count(HTML) == 2
    assert turn(page, 1).locator("pre code").inner_text() == HTML
    assert page.locator("#log script, #log img").count() == 0
    assert page.title() == MODEL_NAME


def test_settings_are_sent(page: "Page", model: PacedAnswers) -> None:
    ask(page, "Hello")
    until_ended(page)
    for label, value in {
        "System turn": "Be brief.",
        "Temperature": "0",
        "Top p": "0.5",
        "Max tokens": "4",
        "Seed": "17",
    }.items():
        page.get_by_label(label).fill(value)
    ask(page, "Hello")
    assert until_ended(page).endswith("cut off at the token limit")
    assert text_of(page) == "Hell"
    first, second = model.asked
    assert (first.temperature, first.top_p, first.max_tokens) == (0.7, 0.95, 1024)
    assert (second.temperature, second.top_p, second.max_tokens, second.seed) == (0, 0.5, 4, 17)
    assert model.messages(1)[0].content == "Be brief."
    page.get_by_label("Temperature").fill("-1")
    ask(page, "Not sent")
    assert page.get_by_label("Temperature").evaluate("input => input.matches(':focus')")
    assert page.get_by_label("Your message").input_value() == "Not sent"
    assert len(model.asked) == 2


def test_wrong_key_is_said_and_the_right_one_goes_on(model: PacedAnswers) -> None:
    with served(model, BYTES, api_key="secret") as server, opened(server) as page:
        key = page.get_by_label("API key")
        key.wait_for()
        ask(page, "Hello")
        page.get_by_text("This server wants a key").wait_for()
        assert page.get_by_label("Your message").input_value() == "Hello"
        key.fill("guess")
        page.keyboard.press("Enter")
        page.get_by_text("did not take this key").wait_for()
        page.screenshot(path=PICTURES / "chat_key.png")
        key.fill("secret")
        page.keyboard.press("Enter")
        page.get_by_text(WEIGHTS).wait_for()
        assert not key.is_visible()
        page.get_by_role("button", name="Send").click()
        until_ended(page)
        assert text_of(page) == "Hello, what can I do?"
        assert page.evaluate("localStorage.length + document.cookie.length") == 0


def test_errors_of_the_server_are_said_where_they_happen(page: "Page", server: Served) -> None:
    ask(page, "Break")
    until_ended(page)
    problem = turn(page).get_by_role("alert")
    assert "The server failed: the script has no entry" in problem.inner_text()
    assert text_of(page) == "so far so go"
    page.get_by_label("Max tokens").fill("5000")
    ask(page, "Hello")
    until_ended(page)
    said = problem.inner_text()
    assert said.startswith("HTTP 400: This model's maximum context length is 2048 tokens")
    take_pictures(page, "chat_error")
    page.get_by_label("Max tokens").fill("5")
    turn(page).get_by_role("button", name="Retry").click()
    until_ended(page)
    assert text_of(page) == "Hello" and not problem.is_visible()


def test_server_that_is_gone_is_said(model: PacedAnswers) -> None:
    with open_page() as page:
        with served(model, BYTES) as server:
            page.goto(server.url)
            page.get_by_text(WEIGHTS).wait_for()
        ask(page, "Hello")
        until_ended(page)
        assert "The server does not answer" in turn(page).get_by_role("alert").inner_text()


def test_connection_that_breaks_is_said(page: "Page", server: Served) -> None:
    """What comes is taken off the wire by a route in the browser, which then ends it."""
    chunk = '{"choices": [{"index": 0, "delta": {"content": "half"}, "finish_reason": null}]}'
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(content_type="text/event-stream", body=f"data: {chunk}\n\n"),
    )
    ask(page, "Hello")
    until_ended(page)
    assert text_of(page) == "half"
    assert "connection was lost" in turn(page).get_by_role("alert").inner_text()


def test_whole_page_is_used_by_keyboard(page: "Page", model: PacedAnswers) -> None:
    focused = page.evaluate("document.activeElement.id")
    assert focused == "question"
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    until_ended(page)
    assert model.messages(0)[0].content == "one\ntwo"
    names = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        names.add(page.evaluate("(document.activeElement.innerText || '').trim()"))
    assert {"New conversation", "Settings", "Retry", "Edit", "Copy", "Send"} <= names
