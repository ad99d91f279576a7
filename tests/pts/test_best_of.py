"""Rejection sampling: which answers are kept, and what is counted."""

import json
from pathlib import Path

import msgspec
import pytest

from phi4.cli import main
from phi4.data.rows.conversations import read_conversation
from phi4.errors import DataError
from phi4.oracles.exact import ExactOracle
from phi4.pts.answer_groups import AnswerGroups
from phi4.pts.best_of import BestOfRules, Preference, by_oracle, by_scores, write_best
from tests.pts.answer_rows import TOKENIZER, Said, read_rows, write_answers, write_ranks, write_rows

KEEP_ONE = BestOfRules(1, Preference.FIRST, 0)
KEY = ["yes", "yes indeed", "\ufffd"]


def said(question: str, *texts: str, **more: object) -> list[Said]:
    return [
        Said(question, text, "a", sample, **({"key": KEY} | more))
        for sample, text in enumerate(texts)
    ]


def best(tmp_path: Path, answers: list[Said], rules: BestOfRules = KEEP_ONE) -> tuple:
    groups = AnswerGroups([write_answers(tmp_path / "a.jsonl", answers)])
    report = write_best(groups, by_oracle(ExactOracle()), rules, TOKENIZER, tmp_path / "best.jsonl")
    rows = read_rows(tmp_path / "best.jsonl")
    for row in rows:
        read_conversation(row)
    return [(row["question"], row["messages"][-1]["content"]) for row in rows], report.counts


def test_counts_add_up(tmp_path: Path) -> None:
    answers = [
        *said("some", "yes", "no", "yes indeed", " yes"),
        *said("all", "yes", "yes"),
        *said("none", "no", "no"),
        *said("cut", "yes", ended=False),
        *said("unknown", "yes", key=None),
    ]
    kept, counts = best(tmp_path, answers)
    assert kept == [("some", "yes"), ("all", "yes")]
    names = ("questions", "some", "all", "none", "unknown", "answers", "accepted", "ungradable")
    assert [counts[name] for name in names] == [5, 2, 1, 2, 1, 10, 5, 1]
    assert (counts["duplicates"], counts["rows"]) == (2, 2)
    assert json.loads((tmp_path / "best.jsonl.report").read_text())["rows"] == 2


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        (BestOfRules(1, Preference.FIRST, 0), ["yes indeed"]),
        (BestOfRules(1, Preference.SHORTEST, 0), ["yes"]),
        (BestOfRules(0, Preference.SHORTEST, 0), ["yes", "yes indeed"]),
        (BestOfRules(5, Preference.FIRST, 0), ["yes indeed", "yes"]),
    ],
)
def test_which_answers_are_kept(tmp_path: Path, rules: BestOfRules, kept: list[str]) -> None:
    found, _ = best(tmp_path, said("q", "yes indeed", "no", "yes"), rules)
    assert [text for _, text in found] == kept


def test_random_choice_depends_on_the_seed_alone(tmp_path: Path) -> None:
    answers = [one for n in range(20) for one in said(f"q{n}", "yes", "yes indeed")]
    found = [
        best(tmp_path, answers, BestOfRules(1, Preference.RANDOM, seed))[0] for seed in (0, 0, 1)
    ]
    assert found[0] == found[1] != found[2]
    assert {text for _, text in found[0]} == {"yes", "yes indeed"}


def test_answer_whose_ids_are_no_text_is_left_out(tmp_path: Path) -> None:
    row = Said("q", "\ufffd", key=KEY).row()
    row.ids[:] = [0xFF, TOKENIZER.im_end_id]
    (tmp_path / "a.jsonl").write_bytes(msgspec.json.encode(row) + b"\n")
    groups = AnswerGroups([tmp_path / "a.jsonl"])
    out = tmp_path / "best.jsonl"
    report = write_best(groups, by_oracle(ExactOracle()), KEEP_ONE, TOKENIZER, out)
    assert (report.counts["accepted"], report.counts["not_text"], report.counts["rows"]) == (
        1,
        1,
        0,
    )


def test_scores_of_a_judge_accept_too(tmp_path: Path) -> None:
    scores = [
        {"question": "q", "model": "a", "sample": sample, "overall": overall}
        for sample, overall in ((0, 3.9), (2, 4.0))
    ]
    accept = by_scores(write_rows(tmp_path / "scores.jsonl", scores), 4.0)
    rows = [one.row() for one in said("q", "x", "y", "z")]
    assert accept(rows) == [False, None, True]
    with pytest.raises(DataError, match=":1 is not a score"):
        by_scores(write_rows(tmp_path / "bad.jsonl", [{"question": "q", "model": "a"}]), 4.0)


def test_prompt_of_ids_alone_is_refused(tmp_path: Path) -> None:
    row = msgspec.structs.replace(Said("q", "yes", key=KEY, chat=False).row(), prompt="")
    path = tmp_path / "a.jsonl"
    path.write_bytes(msgspec.json.encode(row) + b"\n")
    with pytest.raises(DataError, match="ids that are not a conversation, but fine-tuning reads"):
        write_best(
            AnswerGroups([path]), by_oracle(ExactOracle()), KEEP_ONE, TOKENIZER, tmp_path / "o"
        )
    assert not (tmp_path / "o").exists()


def test_rows_can_be_tokenized(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    answers = write_answers(tmp_path / "a.jsonl", said("q", "no", "yes"))
    out, ranks = tmp_path / "best.jsonl", write_ranks(tmp_path / "ranks")
    commands = (
        ["data", "best-of", "--answers", answers, "--oracle", "exact", "--out", out],
        ["data", "tokenize", out, "--out", tmp_path / "sft", "--workers", 1],
    )
    for argv in commands:
        with pytest.raises(SystemExit) as stop:
            main([*map(str, argv), "--ranks", str(ranks)])
        assert not stop.value.code
    printed = capsys.readouterr().out
    assert "1 questions: 1 with an accepted answer" in printed and "1 documents" in printed


def test_who_accepts_must_be_said_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    argv = ["data", "best-of", "--answers", "a", "--out", str(tmp_path / "o")]
    for more in ([], ["--oracle", "exact", "--judge-scores", "s"]):
        with pytest.raises(SystemExit) as stop:
            main([*argv, *more])
        assert stop.value.code == 2
        assert "give --oracle or --judge-scores, one of them" in capsys.readouterr().err
