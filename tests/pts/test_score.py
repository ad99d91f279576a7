"""Accuracy over questions, its interval, and the comparison of two files."""

import json
from math import sqrt
from pathlib import Path

import msgspec
import pytest

from phi4.cli import main
from phi4.errors import DataError
from phi4.oracles.exact import ExactOracle
from phi4.pts.answers import AnswerRow
from phi4.pts.score import Score, gain, score_answers
from tests.pts.scripted_questions import answer


def score(*rows: AnswerRow) -> Score:
    return score_answers(rows, ExactOracle())


def answers(name: str, *texts: str) -> list[AnswerRow]:
    return [answer(name, text, sample) for sample, text in enumerate(texts)]


BEFORE = [*answers("a", "8", "7"), *answers("b", "7", "7"), *answers("c", "8", "7")]
AFTER = [*answers("a", "8", "8"), *answers("b", "8", "7"), *answers("c", "8", "7")]


def test_a_question_is_one_observation() -> None:
    found = score(*BEFORE).accuracy
    assert found.mean == pytest.approx(1 / 3)
    # Shares are 1/2, 0, 1/2.
    assert found.standard_error == pytest.approx(sqrt(1 / 12) / sqrt(3))
    assert found.num_questions == 3
    # As many samples again, all equal, say nothing new.
    assert score(*BEFORE, *BEFORE).accuracy == found
    assert str(found) == "0.333 ± 0.167"


def test_gain_is_paired() -> None:
    found = gain(score(*BEFORE), score(*AFTER))
    # 1/2, 1/2, 0.
    assert found.mean == pytest.approx(1 / 3)
    assert found.standard_error == pytest.approx(sqrt(1 / 12) / sqrt(3))
    unpaired = sqrt(score(*BEFORE).accuracy.standard_error ** 2 * 2)
    assert found.standard_error < unpaired


def test_an_answer_that_was_cut_off_is_wrong_even_when_it_is_the_key() -> None:
    found = score(answer("a", "8", ended=False), answer("b", "8"))
    assert (found.accuracy.mean, found.num_truncated, found.num_answers) == (0.5, 1, 2)


def test_what_cannot_be_graded_is_counted_apart() -> None:
    foreign = msgspec.structs.replace(answer("a", "8"), key=None)
    found = score(foreign, *answers("b", "8", "7"), answer("c", "7"))
    assert found.shares == {"b": 0.5, "c": 0.0}
    assert (found.num_ungradable, found.num_ungraded_questions) == (1, 1)
    with pytest.raises(DataError, match="no answer could be graded"):
        _ = score(foreign).accuracy


def test_other_questions_cannot_be_compared() -> None:
    with pytest.raises(DataError, match="different questions: 3 and 1, 1 of them in both"):
        gain(score(*BEFORE), score(answer("a", "8")))
    with pytest.raises(DataError, match="there is no answer to score"):
        score()


def test_one_question_has_no_interval() -> None:
    found = score(answer("a", "8")).accuracy
    assert (found.mean, found.standard_error, str(found)) == (1.0, None, "1.000")


def written(path: Path, rows: list[AnswerRow]) -> str:
    path.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
    return str(path)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    before = written(tmp_path / "before.jsonl", [*BEFORE, answer("a", "8", 2, ended=False)])
    after = written(tmp_path / "after.jsonl", AFTER)

    def said(*words: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(["answers", "score", *words, "--oracle=exact"])
        assert not end.value.code
        return capsys.readouterr().out

    lines = said(before, after).splitlines()
    assert lines[0] == f"{before}: 0.278 ± 0.147 right, 3 questions, 7 answers, 1 cut off and wrong"
    assert lines[1] == f"{after}: 0.667 ± 0.167 right, 3 questions, 6 answers"
    assert lines[2].startswith("gain: 0.389 ± ") and lines[2].endswith(", over 3 questions")
    row = json.loads(said(before, after, "--json"))
    assert row["gain"]["mean"] == pytest.approx(7 / 18)
    assert row["scores"][0]["num_truncated"] == 1
    assert row["scores"][1]["accuracy"] == pytest.approx(2 / 3)
