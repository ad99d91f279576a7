"""`phi4 serve`: what it refuses, what it says, how it ends, in one process and in several."""

import io
import json
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest

from phi4.cli import main
from phi4.launch import hold_notices
from phi4.rundir.names import LATEST_FILE, MANIFEST_FILE
from phi4.serve.web_server import listen
from tests.support.commands import Ended, command, write_model
from tests.support.ranks import pool_fixture, run_ranks
from tests.support.server_process import address_in, server_process
from tests.support.waiting import LONG_SECONDS, wait_until

LAYOUT = ("parallel.tensor=2", "parallel.pipeline=2")
KEY = "PHI4_API_KEY"
PROMPT = "Every process"
LONG_TOKENS = 150
"""Of an answer that is still under way when a signal arrives."""

SHUTTING_DOWN = "the server is shutting down; use another one"


pool = pool_fixture(1)


@pytest.fixture(scope="module")
def run(pool, tmp_path_factory) -> Path:
    """A run directory with a tiny model of long sequences."""
    directory = tmp_path_factory.mktemp("serve") / "tiny-run"
    directory.mkdir()
    write_model(pool, directory, "model.max_position_embeddings=512")
    return directory


def refusal(*words: object) -> str:
    """The one line of `phi4 serve`, in this process; only for what is refused before torch."""
    err = io.StringIO()
    with (
        mock.patch("phi4.cli.hold_notices"),
        redirect_stderr(err),
        pytest.raises(SystemExit, match="2"),
    ):
        main(["serve", *map(str, words)])
    assert err.getvalue().count("\n") == 1
    return err.getvalue()


def test_other_machines_need_a_key_or_the_word_that_they_need_none(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv(KEY, raising=False)
    for host in ("0.0.0.0", "::", "10.1.2.3", "some-host"):
        line = refusal(tmp_path, f"--host={host}")
        assert line.startswith(f"ConfigError: --host={host} accepts requests of other machines")
        assert KEY in line and "--no-key" in line
    # What is refused next: there is no model.
    for host in ("127.0.0.1", "127.3.2.1", "::1", "localhost"):
        assert "no checkpoint in" in refusal(tmp_path, f"--host={host}")
    assert "no checkpoint in" in refusal(tmp_path, "--host=0.0.0.0", "--no-key")
    monkeypatch.setenv(KEY, "secret")
    assert "no checkpoint in" in refusal(tmp_path, "--host=0.0.0.0")
    assert "--no-key, and PHI4_API_KEY is set" in refusal(tmp_path, "--no-key")


@pytest.mark.parametrize("key", ["", "two words", "secret\n", "schlüssel"])
def test_key_that_no_header_can_hold_is_refused_and_not_printed(monkeypatch, tmp_path, key) -> None:
    monkeypatch.setenv(KEY, key)
    line = refusal(tmp_path)
    assert line.startswith("ConfigError: PHI4_API_KEY is empty, or has") and "words" not in line


def test_missing_package_is_named_with_its_remedy(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("phi4.cli.serve.find_spec", lambda name: None if name == "uvicorn" else 1)
    line = refusal(tmp_path)
    assert line.startswith("PlatformError: uvicorn not installed; pip install 'phi4[serve]'")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("parallel.data=2",), "parallel.data=2, but generation uses one replica; expected 1"),
        (("parallel.tensor=3",), "parallel.tensor=3 does not divide"),
        (("hello",), "override 'hello': expected section.key=value"),
        (("tokenizer.path=absent",), "tokenizer ranks absent cannot be read"),
        (("--name= ",), "--name=' ' is empty"),
        (("--host=203.0.113.1", "--no-key"), "cannot listen on 203.0.113.1:8000"),
        (("--port=70000",), "--port: expected at most 65535"),
        (("--max-requests=0",), "--max-requests: expected at least 1"),
        (("--cache-tokens=1000000000000",), "lower --cache-tokens"),
    ],
)
def test_wrong_input_is_one_line(pool, run, words, message) -> None:
    code, out, err = command(pool, "serve", run, *words)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1] and "Traceback" not in err


def test_taken_port_is_said_before_the_model_is_read(pool, run) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        code, out, err = command(pool, "serve", run, f"--port={port}")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith(f"PlatformError: cannot listen on 127.0.0.1:{port}: Address already in")


def test_checkpoint_outside_of_a_run_cannot_be_followed(pool, run, tmp_path) -> None:
    alone = tmp_path / "step_0000000"
    shutil.copytree(run / "checkpoints" / alone.name, alone)
    code, out, err = command(pool, "serve", alone, "--follow")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith(f"ConfigError: --follow waits for checkpoints of a run, and {alone} is")


def test_server_says_where_it_is_answers_and_ends_as_it_is_told(run) -> None:
    [(ended, answers)] = run_ranks(1, serve_until_asked, [str(run)])
    assert ended.code == 0, ended.err
    line = next(line for line in ended.err.splitlines() if line.startswith("serving "))
    url = address_in(ended.err)
    assert line == (
        f"serving tiny-run (step_0000000): chat page {url}/, OpenAI's API {url}/v1, "
        f"Ollama's API {url} (no key)"
    )
    assert answers["/health"]["weights"] == "step_0000000"
    [card] = answers["/v1/models"]["data"]
    assert (card["id"], card["max_model_len"]) == ("tiny-run", 512)
    assert "no more requests are accepted; the 0 open ones have 20 s to end" in ended.err
    assert ended.err.endswith("ended: 0 requests answered, 0 cancelled\n")


def test_followed_run_gives_a_server_its_new_weights(run, tmp_path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    [(ended, answers)] = run_ranks(1, serve_until_asked, [str(copy), "--follow"], copy)
    assert ended.code == 0, ended.err
    assert f"serving {copy}/checkpoints/step_0000001 from now on" in ended.err, ended.err
    assert answers["/health"] == {"status": "ok", "model": "run", "weights": "step_0000001"}
    assert f"serving {copy}/checkpoints/step_0000001 from now on" in ended.err


def completion(url: str, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny-run", "prompt": PROMPT, "logprobs": 0, "seed": 3} | fields
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=LONG_SECONDS)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


@pytest.mark.slow
def test_four_processes_answer_as_one_and_end_after_what_is_open(pool, run) -> None:
    words = (PROMPT, "--max-tokens=12", "--temperature=1", "--seed=3", "--json", "--log-probs")
    expected = json.loads(command(pool, "generate", run, *words).out)
    with server_process(run, *LAYOUT, f"--drain-seconds={LONG_SECONDS}") as server:
        found = completion(server.url, max_tokens=12)
        assert found["text"] == expected["text"]
        log_probs = found["logprobs"]["token_logprobs"]
        assert log_probs == pytest.approx(expected["log_probs"], abs=1e-4)
        # To a follower alone it says nothing.
        server.rank(3).send_signal(signal.SIGTERM)
        with opened_stream(server.url) as lines:
            first = next(lines)
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 503, "the drain")
            refused = httpx.post(
                f"{server.url}/v1/completions", json={"model": "tiny-run", "prompt": "a"}
            )
            assert refused.status_code == 503
            chunks = [first, *lines]
        code, err = server.ended()
    assert code == 0, err
    assert chunks[-1] == "[DONE]"
    assert json.loads(chunks[-2])["choices"][0]["finish_reason"] == "length"
    assert "SIGTERM: the server ends once open requests are answered, within 600 s" in err
    assert "no more requests are accepted; the 1 open ones have 600 s to end" in err


@pytest.mark.slow
def test_answer_that_takes_longer_than_the_drain_ends_in_an_error(run) -> None:
    with server_process(run, "--drain-seconds=0") as server:
        with opened_stream(server.url) as lines:
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            *_, last = lines
        code, err = server.ended()
    assert code == 0, err
    assert json.loads(last)["error"]["message"] == SHUTTING_DOWN


@contextmanager
def opened_stream(url: str, num_prompts: int = 1) -> Iterator[Iterator[str]]:
    """The data of the events of long answers, which no end token ends."""
    body = {
        "model": "tiny-run",
        "prompt": [PROMPT] * num_prompts,
        "max_tokens": LONG_TOKENS,
        "stream": True,
        "ignore_eos": True,
    }
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=LONG_SECONDS) as answer:
        assert answer.status_code == 200
        yield (line.removeprefix("data: ") for line in answer.iter_lines() if line)


@pytest.mark.slow
def test_second_ctrl_c_cuts_open_requests_off(run) -> None:
    # The cache holds one of them at a time, so that they take minutes.
    one_by_one = f"--cache-tokens={LONG_TOKENS + 50}"
    with server_process(run, one_by_one) as server, opened_stream(server.url, 1000) as lines:
        next(lines)

        def has_ended() -> bool:
            server.process.send_signal(signal.SIGINT)
            return server.process.poll() is not None

        wait_until(has_ended, "the end of the server")
        code, err = server.ended()
        with pytest.raises(httpx.TransportError):
            list(lines)
    assert code == 128 + signal.SIGTERM
    assert err.endswith("a second SIGTERM: ended at once; open requests are cut off\n")


@pytest.mark.slow
def test_killed_rank_ends_the_server_and_is_named(run) -> None:
    with server_process(run, *LAYOUT) as server:
        completion(server.url, max_tokens=2)
        with opened_stream(server.url) as lines:
            next(lines)
            server.rank(3).kill()
            # Cut off, or told that the model failed.
            with suppress(httpx.TransportError):
                assert "[DONE]" not in list(lines)
        code, err = server.ended()
    assert code == 128 + signal.SIGKILL
    assert err.splitlines()[-1].startswith("rank 3 of 4 was killed by signal 9 (SIGKILL)")


# What follows runs in the ranks.


def serve_until_asked(
    rank: int, world_size: int, words: list[str], goes_on: Path | None = None
) -> tuple[Ended, dict[str, Any]]:
    """`phi4 serve WORDS`, told to end once it has answered.

    Args:
        rank: of the pool.
        world_size: likewise.
        words: model and options.
        goes_on: a run that writes its next checkpoint once the server answers.
    """
    hold_notices()
    err, answers = io.StringIO(), {}

    def ask() -> None:
        url = wait_until(lambda: address_in(err.getvalue()), "the address")
        try:
            if goes_on:
                write_next(goes_on)
                wait_until(lambda: str(goes_on) in err.getvalue(), "word of the next checkpoint")
            for path in ("/health", "/v1/models"):
                answers[path] = httpx.get(url + path).json()
        finally:
            # One to the process would reach a thread of the pool that does not hold notices.
            [notices] = [one for one in threading.enumerate() if one.name == "notices"]
            signal.pthread_kill(notices.ident, signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()
    code = 0
    with redirect_stderr(err):
        try:
            main(["serve", "--port=0", *words])
        except SystemExit as end:
            code = int(end.code or 0)
    return Ended(code, "", err.getvalue()), answers


def write_next(run: Path) -> None:
    """The same weights a step later."""
    root = run / "checkpoints"
    path = root / "step_0000001"
    shutil.copytree(root / "step_0000000", path)
    manifest = json.loads((path / MANIFEST_FILE).read_text())
    (path / MANIFEST_FILE).write_text(json.dumps(manifest | {"step": 1}))
    (root / LATEST_FILE).write_text(f"{path.name}\n")
