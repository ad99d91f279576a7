"""Answers are drawn once, come in the order of the questions, and never under other settings."""

from pathlib import Path

import pytest

from phi4.errors import ConfigError, DataError
from phi4.pts.answers import read_answers
from phi4.pts.draw_answers import AnswerFile, draw_answers, question_seed
from tests.pts.scripted_questions import (
    QUESTIONS,
    TOKENIZER,
    Watched,
    even_sampler,
    question,
    sampler,
    settings,
)


def drawn(path: Path, watched: Watched | None = None) -> bytes:
    file = AnswerFile(path, settings())
    assert file.begin()
    draw_answers(watched or even_sampler(), QUESTIONS, TOKENIZER, file)
    return path.read_bytes()


def test_rows_are_whole_and_in_the_order_of_the_questions(tmp_path: Path) -> None:
    drawn(tmp_path / "a.jsonl")
    rows = list(read_answers(tmp_path / "a.jsonl"))
    assert [(row.question, row.sample) for row in rows] == [
        (one.id, sample) for one in QUESTIONS for sample in range(4)
    ]
    assert {row.text for row in rows} == {"8", "17", "nothi"}
    for row in rows:
        assert row.is_finished == (row.text != "nothi")
        assert (row.key, row.task, row.prompt) == ("8", "sums", f"{row.question}=")
        end = [TOKENIZER.eod_id] if row.is_finished else []
        assert row.ids == TOKENIZER.encode(row.text) + end
        assert row.seed == question_seed(3, row.question)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "a.jsonl",
        "a.jsonl.settings.json",
    ]


def test_a_stopped_job_goes_on_and_draws_nothing_twice(tmp_path: Path) -> None:
    whole = drawn(tmp_path / "whole.jsonl")
    path = tmp_path / "stopped.jsonl"
    num_asked = []
    # Samples have two to five tokens, so questions end in different steps.
    for steps in (2, 3, 4):
        with pytest.raises(KeyboardInterrupt):
            drawn(path, Watched(even_sampler(), steps))
        assert not path.exists()
        num_asked.append(len(AnswerFile(path, settings()).done()))
    assert num_asked == sorted(num_asked)
    assert 0 < num_asked[-1] < len(QUESTIONS)
    # What a kill leaves of a line.
    with AnswerFile(path, settings()).journal.open("ab") as journal:
        journal.write(b'[{"question": "5+')
    watched = Watched(even_sampler())
    assert drawn(path, watched) == whole
    assert len(watched.asked) == len(QUESTIONS) - num_asked[-1]
    assert not AnswerFile(path, settings()).journal.exists()
    assert not AnswerFile(path, settings()).begin()


def test_other_questions_have_no_influence(tmp_path: Path) -> None:
    drawn(tmp_path / "all.jsonl")
    few = QUESTIONS[2:3]
    file = AnswerFile(tmp_path / "few.jsonl", settings(few))
    file.begin()
    draw_answers(even_sampler(), few, TOKENIZER, file)
    rows = [row for row in read_answers(tmp_path / "all.jsonl") if row.question == few[0].id]
    assert list(read_answers(file.path)) == rows


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"n": 5},
            r"with n=4, but 5 was requested; give another --out, or remove it and a\.jsonl\.set",
        ),
        ({"seed": 4}, "with seed=3, but 4 was requested"),
        ({"model": "other"}, "with model=script, but other was requested"),
        ({"temperature": 0.5}, r"with temperature=1\.0, but 0\.5 was requested"),
    ],
)
@pytest.mark.parametrize("is_finished", [True, False])
def test_a_file_of_other_settings_is_refused(
    tmp_path: Path, changed: dict, said: str, is_finished: bool
) -> None:
    path = tmp_path / "a.jsonl"
    if is_finished:
        drawn(path)
    else:
        with pytest.raises(KeyboardInterrupt):
            drawn(path, Watched(even_sampler(), 3))
    with pytest.raises(ConfigError, match=said):
        AnswerFile(path, settings(**changed)).begin()


def test_a_question_with_another_key_is_another_question(tmp_path: Path) -> None:
    drawn(tmp_path / "a.jsonl")
    other = (*QUESTIONS[:-1], question("5+3", "9"))
    with pytest.raises(ConfigError, match="with questions="):
        AnswerFile(tmp_path / "a.jsonl", settings(other)).begin()


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="was not written by `phi4 answers draw`; remove it"):
        AnswerFile(tmp_path / "a.jsonl", settings()).begin()


def test_a_damaged_journal_is_an_error(tmp_path: Path) -> None:
    file = AnswerFile(tmp_path / "a.jsonl", settings())
    file.journal.write_bytes(b'{"a": 1}\n[]\n')
    with pytest.raises(DataError, match=r"a\.jsonl\.journal:1 is damaged: .*; remove the file"):
        file.done()


def test_answers_end_where_the_model_has_no_more_room(tmp_path: Path) -> None:
    one = question("4+4")
    model = sampler({one.id: {"8" * 100: 1.0}})
    file = AnswerFile(tmp_path / "a.jsonl", settings((one,), max_tokens=500))
    file.begin()
    draw_answers(model, (one,), TOKENIZER, file)
    assert {len(row.ids) for row in read_answers(file.path)} == {64 - len(one.prompt)}
