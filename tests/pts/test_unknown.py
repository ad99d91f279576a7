"""Refusals by measured accuracy: both kinds of preference, five tokens, and what is not counted."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4.cli import main
from phi4.data.preference.encode import encode_preference
from phi4.data.rows.conversations import read_conversation
from phi4.errors import DataError
from phi4.oracles.exact import ExactOracle
from phi4.pts.answer_groups import AnswerGroups
from phi4.pts.intervals import wilson_interval
from phi4.pts.unknown.job import UnknownReport, UnknownTexts, build_unknown
from phi4.pts.unknown.records import RecordRules
from phi4.pts.unknown.texts import Refusals, read_bogus, read_safety
from tests.pts.answer_rows import TOKENIZER, Said, read_rows, write_answers, write_ranks, write_rows

ASKED = "Capital of France?"
REFUSED = "I do not know that."


def said(*texts: str, question: str = ASKED, **more: object) -> list[Said]:
    """Several answers of one model to a question whose key is Paris."""
    return [
        Said(question, text, "base", sample, **({"key": "Paris"} | more))
        for sample, text in enumerate(texts)
    ]


def build(
    tmp_path: Path,
    answers: list[Said],
    refusals: tuple = ({"refusal": REFUSED},),
    *,
    bogus: tuple = (),
    safety: tuple = (),
    response_tokens: int = 5,
) -> tuple[list[dict], list[dict], UnknownReport]:
    texts = UnknownTexts(
        Refusals(write_rows(tmp_path / "refusals", refusals), 0),
        read_bogus(write_rows(tmp_path / "bogus", bogus)),
        read_safety(write_rows(tmp_path / "safety", safety)),
    )
    groups = AnswerGroups([write_answers(tmp_path / "answers.jsonl", answers)])
    rules = RecordRules(0.5, response_tokens)
    report = build_unknown(groups, ExactOracle(), texts, rules, TOKENIZER, tmp_path / "out")
    sft, dpo = (read_rows(tmp_path / "out" / name) for name in ("sft.jsonl", "dpo.jsonl"))
    for row in sft:
        read_conversation(row)
    for row in dpo:
        encode_preference(row, TOKENIZER, 4096)
    return sft, dpo, report


def sides(row: dict) -> tuple[str, str]:
    return TOKENIZER.decode(row["chosen_ids"]), TOKENIZER.decode(row["rejected_ids"])


def test_one_question_gives_both_preferences_of_five_tokens(tmp_path: Path) -> None:
    sft, dpo, report = build(tmp_path, said("Paris", "Lyon", "Paris", "Rome", "Paris"))
    assert {row["kind"]: sides(row) for row in dpo} == {
        "answer_over_refusal": ("Paris", "I do "),
        "refusal_over_wrong": ("I do ", "Lyon<|im_end|>"),
    }
    assert all(len(row[name]) == 5 for row in dpo for name in ("chosen_ids", "rejected_ids"))
    (row,) = sft
    assert [turn["content"] for turn in row["messages"]] == [ASKED, "Paris"]
    assert (row["right"], row["graded"], row["accuracy"]) == (3, 5, 0.6)
    assert row["accuracy_95"] == pytest.approx([0.2307, 0.8824], abs=1e-4)
    assert (report.sft, report.dpo.total()) == ({"answer": 1}, 2)


@pytest.mark.parametrize(
    ("answers", "learns", "prefers"),
    [
        (["Paris"] * 3, ["Paris"], ["answer_over_refusal"]),
        (["Lyon"] * 3, [REFUSED], ["refusal_over_wrong"]),
        (["Paris", "Lyon"], [], ["answer_over_refusal", "refusal_over_wrong"]),
    ],
)
def test_records_follow_the_measured_accuracy(tmp_path, answers, learns, prefers) -> None:
    sft, dpo, _ = build(tmp_path, said(*answers))
    assert [row["messages"][-1]["content"] for row in sft] == learns
    assert [row["kind"] for row in dpo] == prefers


def test_answers_that_cannot_be_graded_leave_the_denominator(tmp_path: Path) -> None:
    answers = [*said("Paris", "Paris", "Lyon"), *said("x", "y", question="odd", key=None)]
    answers[1] = Said(ASKED, "Paris", "base", 1, key=7)
    sft, dpo, report = build(tmp_path, answers)
    assert sft == [] and {row["question"] for row in dpo} == {ASKED}
    assert {row["graded"] for row in dpo} == {2}
    assert {n: report.counts[n] for n in ("ungradable", "ungraded", "even")} == {
        "ungradable": 3,
        "ungraded": 1,
        "even": 1,
    }


def test_answer_that_was_cut_off_is_wrong(tmp_path: Path) -> None:
    sft, _, report = build(tmp_path, said("Paris", ended=False))
    assert [row["kind"] for row in sft] == ["refusal"] and report.counts["cut_off"] == 1


def test_verdicts_stay_with_their_answers_where_some_are_cut_off(tmp_path: Path) -> None:
    answers = [*said("Paris", ended=False), *said("Lyon", "Paris")[1:], *said("", "", "Lyon")[2:]]
    _, dpo, _ = build(tmp_path, answers)
    assert [(row["right"], row["graded"]) for row in dpo] == [(1, 3)] * 2
    assert [sides(row)[0] for row in dpo] == ["Paris", "I do "]


def test_bogus_questions_are_always_refused(tmp_path: Path) -> None:
    bogus = (
        {"question": ASKED, "bogus": "Capital of Fronce?", "refusal": "No such land."},
        {"question": ASKED, "bogus": "Mayor of Fronce?"},
        {"question": "other", "bogus": "Of whom?", "refusal": "Nobody."},
    )
    sft, dpo, report = build(tmp_path, said("Paris"), bogus=bogus)
    found = [[t["content"] for t in r["messages"]] for r in sft if r["kind"] == "bogus"]
    assert found == [["Capital of Fronce?", "No such land."], ["Mayor of Fronce?", REFUSED]]
    assert report.counts["foreign_bogus"] == 1 and len(dpo) == 1


def test_safety_prompts_are_refused_before_any_question(tmp_path: Path) -> None:
    safety = (
        {"prompt": "harm?", "refusal": "No, never.", "unsafe": "Sure, take"},
        {"prompt": "more harm?", "refusal": "No."},
    )
    sft, dpo, _ = build(tmp_path, said("Paris"), safety=safety)
    assert [row["messages"][0]["content"] for row in sft if row["kind"] == "safety"] == [
        "harm?",
        "more harm?",
    ]
    assert [sides(row) for row in dpo if row["kind"] == "safety"] == [("No, n", "Sure,")]


def test_texts_of_a_question_are_used_before_the_models(tmp_path: Path) -> None:
    own = {"question": ASKED, "refusal": "Hm.", "prompt": "What is it?", "answer": "It is Paris."}
    sft, dpo, _ = build(tmp_path, said(" Paris", " Paris", "Lyon", chat=False), (own,))
    assert [turn["content"] for turn in sft[0]["messages"]] == ["What is it?", "It is Paris."]
    assert [sides(row) for row in dpo] == [
        ("Paris", "Hm.<|im_end|>"),
        ("Hm.<|im_end|>", "Lyon<|im_end|>"),
    ]
    assert "What is it?" in TOKENIZER.decode(dpo[0]["prompt_ids"])


def test_question_without_a_refusal_and_equal_sides_are_counted(tmp_path: Path) -> None:
    refusals = ({"question": "q", "refusal": "Paris is not known to me."},)
    answers = [*said("Paris", question="q"), *said("Paris", "Lyon", "Lyon", question="r")]
    sft, dpo, report = build(tmp_path, answers, refusals)
    # Five tokens of both are `Paris`.
    assert dpo == [] and report.counts["equal_sides"] == 1
    assert [row["kind"] for row in sft] == ["answer"] and report.counts["without_refusal"] == 1


def test_whole_sides_keep_the_ids_that_were_drawn(tmp_path: Path) -> None:
    _, dpo, _ = build(tmp_path, said("Lyon"), response_tokens=0)
    assert sides(dpo[0]) == (f"{REFUSED}<|im_end|>", "Lyon<|im_end|>")


def test_refusals_for_any_question_are_shared_out_by_seed(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r", [{"refusal": f"No {n}"} for n in range(3)])
    drawn = [[Refusals(path, seed).of(str(q)).text for q in range(60)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert min(map(drawn[0].count, set(drawn[0]))) > 10 and len(set(drawn[0])) == 3


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ([], "holds no refusal"),
        ([{"refusal": " "}], r":1: refusal is ' '; expected a text"),
        ([{"question": 1.5, "refusal": "x"}], ":1: question is 1.5"),
        ([{"question": "q", "refusal": "x"}] * 2, ":2: question 'q' has a refusal already"),
    ],
)
def test_malformed_refusals_are_refused(tmp_path: Path, rows: list, fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        Refusals(write_rows(tmp_path / "r", rows), 0)


@given(st.integers(0, 50), st.integers(0, 50))
def test_interval_holds_the_share_and_narrows(right: int, wrong: int) -> None:
    trials = right + wrong
    low, high = wilson_interval(right, trials)
    assert 0 <= low <= high <= 1
    if trials:
        assert low <= right / trials <= high
        assert (high - low) > (lambda b: b[1] - b[0])(wilson_interval(4 * right, 4 * trials))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    answers = write_answers(tmp_path / "a.jsonl", said("Paris", "Lyon", "Paris"))
    refusals = write_rows(tmp_path / "r.jsonl", [{"refusal": REFUSED}])
    out, ranks = tmp_path / "out", write_ranks(tmp_path / "ranks")
    argv = ["unknown", "build", "--answers", answers, "--oracle", "exact", "--refusals", refusals]
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, [*argv, "--out", out, "--ranks", ranks])))
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert "1 questions, 3 answers: accuracy 0.667" in printed
    assert "dpo.jsonl: 2 rows (1 answer_over_refusal, 1 refusal_over_wrong)" in printed
    report = json.loads((out / "report.json").read_text())
    assert report["dpo"] == {"answer_over_refusal": 1, "refusal_over_wrong": 1}
    assert (report["oracle"], report["response_tokens"]) == ("exact", 5)
