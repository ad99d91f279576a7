"""`phi4 judge pairs` with a judge behind an endpoint that speaks chat only."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from phi4.cli import main
from tests.pts.answer_rows import Said, read_rows, write_answers, write_ranks
from tests.pts.judges import opinion, quality
from tests.sampling.endpoint_server import serving


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
    assert "parallel.tensor=2 lays a model out; oracle:exact is none" in capsys.readouterr().err
