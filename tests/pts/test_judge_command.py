"""`phi4 judge pairs` with a judge behind an endpoint that speaks chat, and with a local one."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from phi4.cli import main
from tests.pts.answer_rows import Said, read_rows, write_answers, write_ranks
from tests.pts.judges import opinion, quality
from tests.sampling.endpoint_server import serving
from tests.support.commands import command, write_model
from tests.support.ranks import RankPool
from tests.support.waiting import LONG_SECONDS, wait_until


def reply(path: str, body: dict) -> Iterator[dict]:
    """An honest opinion; of the question `odd`, a truncated one."""
    assert path == "/v1/chat/completions"
    (turn,) = body["messages"]
    turns, first, second = (
        json.loads(x) for x in turn["content"].split("\n") if x[:1] in '["' and x
    )
    said = opinion(quality(first), quality(second))
    text = said[:-1] if turns[0]["content"] == "odd" else said
    yield {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
    yield {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, arguments)))
    assert not stop.value.code


def test_judge_behind_an_endpoint(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = [
        write_answers(
            tmp_path / f"{model}.jsonl", [Said(q, f"{score} x", model) for q in ("even", "odd")]
        )
        for model, score in (("a", 2), ("b", 4))
    ]
    ranks = write_ranks(tmp_path / "ranks")
    with serving(reply) as server:
        argv = [
            *("judge", "pairs", *(f"--answers={path}" for path in files)),
            *("--judge", f"{server.base_url}#judge", "--out", tmp_path / "out"),
            *("--ranks", ranks, "--judge-ranks", ranks, "ask.retries=1", "ask.max_tokens=600"),
        ]
        run(*argv)
        # Two orders, and a further attempt for both of those that were truncated.
        assert len(server.asked) == 2 + 2 * 2
        printed = capsys.readouterr().out
        report = (tmp_path / "out/report.json").read_text()
        run(*argv)
        assert len(server.asked) == 6
    assert capsys.readouterr().out == printed
    assert (tmp_path / "out/report.json").read_text() == report
    (row,) = read_rows(tmp_path / "out/accuracy.jsonl")
    assert (row["question"], row["chosen_from"]["model"]) == ("even", "b")
    assert "1 invalid (in quarantine)" in printed
    assert {row["question"] for row in read_rows(tmp_path / "out/quarantine.jsonl")} == {"odd"}


def test_layout_of_an_oracle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    answers = write_answers(tmp_path / "a.jsonl", [Said("q", "x")])
    with pytest.raises(SystemExit) as stop:
        main(
            [
                *("judge", "pairs", "--answers", str(answers), "--judge", "oracle:exact"),
                *("--out", str(tmp_path / "out"), "parallel.tensor=2"),
            ]
        )
    assert stop.value.code == 2
    assert (
        "parallel.tensor=2 sets the layout of a model, and oracle:exact is an oracle"
        in capsys.readouterr().err
    )


def num_stored(path: Path) -> int:
    """Replies in a store that another process writes."""
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as store:
            return store.execute("SELECT count(*) FROM replies").fetchone()[0]
    except sqlite3.Error:
        return 0


@pytest.mark.slow
def test_killed_command_pays_for_no_reply_twice(tmp_path: Path) -> None:
    num_questions, silent = 12, threading.Event()
    answered: list[str] = []

    def reply_to_some(path: str, body: dict) -> Iterator[dict]:
        """Replies until there are nine; the others wait for the next process."""
        if silent.is_set() and len(answered) >= 9:
            threading.Event().wait(LONG_SECONDS)
        answered.append(body["messages"][0]["content"])
        yield from reply(path, body)

    silent.set()
    files = [
        write_answers(
            tmp_path / f"{model}.jsonl", [Said(f"q{n}", text, model) for n in range(num_questions)]
        )
        for model, text in (("a", "2 x"), ("b", "4 x"))
    ]
    ranks, store = write_ranks(tmp_path / "ranks"), tmp_path / "out/replies.sqlite"
    with serving(reply_to_some) as server:
        argv = [
            *("judge", "pairs", *(f"--answers={path}" for path in files)),
            *("--judge", f"{server.base_url}#judge", "--out", str(tmp_path / "out")),
            *("--ranks", str(ranks), "--judge-ranks", str(ranks)),
        ]
        process = subprocess.Popen([sys.executable, "-m", "phi4", *argv])
        wait_until(lambda: num_stored(store) >= 9, "nine replies in the store")
        os.kill(process.pid, signal.SIGKILL)
        process.wait(LONG_SECONDS)
        assert not (tmp_path / "out/overall.jsonl").exists()
        silent.clear()
        run(*argv)
    assert len(answered) == len(set(answered)) == 2 * num_questions
    assert len(read_rows(tmp_path / "out/overall.jsonl")) == num_questions


@pytest.mark.slow
def test_judge_on_this_machine(tmp_path: Path) -> None:
    """A model that has learned nothing is asked in its own tokenizer, and gives no verdict."""
    files = [
        write_answers(tmp_path / f"{model}.jsonl", [Said("q", f"{model} says", model)])
        for model in "ab"
    ]
    template = tmp_path / "short.j2"
    template.write_text("{{ first | quoted }} or {{ second | quoted }}?")
    argv = [
        *("judge", "pairs", *(f"--answers={path}" for path in files), "--judge", tmp_path / "run"),
        *("--out", tmp_path / "out", "--ranks", write_ranks(tmp_path / "ranks")),
        *("--template", template, "ask.max_tokens=8", "ask.retries=1"),
    ]
    (tmp_path / "run").mkdir()
    with RankPool(1) as pool:
        write_model(pool, tmp_path / "run")
        ended = command(pool, *argv)
    assert ended.code == 0, ended.err
    assert "1 invalid (in quarantine)" in ended.out and "No comparison has a verdict" in ended.out
    rows = read_rows(tmp_path / "out/quarantine.jsonl")
    assert [(row["shown_first"], row["attempt"]) for row in rows] == [
        ("left", 0),
        ("left", 1),
        ("right", 0),
        ("right", 1),
    ]
    assert num_stored(tmp_path / "out/replies.sqlite") == 4
