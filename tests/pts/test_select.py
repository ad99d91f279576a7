"""`phi4 pts select` and `phi4 answers draw` on models that a script answers for."""

from pathlib import Path

import pytest

from phi4.cli import main
from phi4.config import dump_toml
from phi4.errors import DataError
from phi4.pts.answers import read_answers
from phi4.pts.select_checkpoint import read_selection
from phi4.rundir.checkpoints import checkpoint_name, checkpoints_dir
from phi4.rundir.names import CONFIG_FILE, MANIFEST_FILE, SELECTED_FILE
from tests.pts.scripted_questions import QUESTIONS, ScriptedModel, sampler, write_questions
from tests.support.engines import tiny_recipe

RIGHT = {"start": 0.3, "0000010": 0.5, "0000020": 1.0, "0000030": 0.7, "0000040": 1.0}
"""How often a checkpoint is right."""
SELECT = ("pts", "select", "--oracle=exact")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Places of the models that were asked."""
    places: list[str] = []

    def find(place: str, overrides: object, ranks: object) -> ScriptedModel:
        share = next(share for name, share in RIGHT.items() if name in place)

        def make() -> object:
            places.append(Path(place).name)
            return sampler({one.id: {"8": share, "9": 1 - share} for one in QUESTIONS})

        return ScriptedModel(place, make)

    monkeypatch.setattr("phi4.cli.answers.find_asked_model", find)
    return places


def phi4(*words: object) -> int:
    with pytest.raises(SystemExit) as end:
        main(list(map(str, words)))
    return int(end.value.code or 0)


def write_run(run: Path, start: Path | None, *steps: int) -> Path:
    for step in steps:
        directory = checkpoints_dir(run) / checkpoint_name(step)
        directory.mkdir(parents=True)
        (directory / MANIFEST_FILE).write_text("{}")
    origin = () if start is None else (f"run.init_from={start}",)
    (run / CONFIG_FILE).write_text(dump_toml(tiny_recipe(*origin)))
    return run


def test_the_best_checkpoint_is_chosen_and_said_last(
    tmp_path: Path, asked: list[str], capsys: pytest.CaptureFixture
) -> None:
    start = write_run(tmp_path / "start", None, 5)
    run = write_run(tmp_path / "run", start, 10, 20, 30, 40)
    questions = write_questions(tmp_path / "stop.jsonl")
    words = (
        "pts",
        "select",
        run,
        f"--questions={questions}",
        "--oracle=exact",
        "--n=40",
        "--no-chat",
    )
    assert phi4(*words) == 0
    printed = capsys.readouterr().out
    best = checkpoints_dir(run) / checkpoint_name(20)
    assert printed.splitlines()[-1] == str(best)
    found = read_selection(run / SELECTED_FILE)
    # Of the two that are always right, the one that was trained for less.
    assert found.checkpoint == str(best)
    names = ["start", *(checkpoint_name(step) for step in (10, 20, 30, 40))]
    assert [row.name for row in found.candidates] == names
    assert found.candidates[0].checkpoint == str(checkpoints_dir(start) / checkpoint_name(5))
    accuracies = [row.accuracy for row in found.candidates]
    assert accuracies == pytest.approx(list(RIGHT.values()), abs=0.12)
    for row in found.candidates:
        assert row.gain == pytest.approx(row.accuracy - accuracies[0])
    assert [line for line in printed.splitlines() if line.endswith("best")] == [
        line for line in printed.splitlines() if line.startswith(checkpoint_name(20))
    ]
    # A second time nothing is drawn.
    assert len(asked) == 5
    assert phi4(*words) == 0
    assert len(asked) == 5


def test_the_start_is_chosen_where_nothing_is_better(
    tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RIGHT, "start", 1.0)
    run = write_run(tmp_path / "run", write_run(tmp_path / "start", None, 5), 10)
    questions = write_questions(tmp_path / "stop.jsonl")
    assert phi4(*SELECT, run, f"--questions={questions}", "--no-chat") == 0
    assert read_selection(run / SELECTED_FILE).candidates[0].name == "start"
    assert "start/checkpoints" in read_selection(run / SELECTED_FILE).checkpoint


def test_a_run_without_checkpoints_is_an_error(
    tmp_path: Path, asked: list[str], capsys: pytest.CaptureFixture
) -> None:
    questions = write_questions(tmp_path / "stop.jsonl")
    assert phi4(*SELECT, tmp_path, f"--questions={questions}") == 2
    assert "no checkpoint in" in capsys.readouterr().err
    with pytest.raises(DataError, match="run `phi4 pts select` on the run first"):
        read_selection(tmp_path / SELECTED_FILE)


def test_draw_command(tmp_path: Path, asked: list[str], capsys: pytest.CaptureFixture) -> None:
    questions = write_questions(tmp_path / "questions.jsonl")
    out = tmp_path / "answers.jsonl"
    words = ("answers", "draw", "0000020", f"--questions={questions}", f"--out={out}", "--n=3")
    assert phi4(*words) == 0
    rows = list(read_answers(out))
    assert [row.question for row in rows] == [one.id for one in QUESTIONS for _ in range(3)]
    assert {row.text for row in rows} == {"8"}
    assert phi4(*words) == 0
    assert "is finished: 5 questions, 3 answers each" in capsys.readouterr().out
    assert asked == ["0000020"]
    assert phi4(*words, "--seed=1") == 2
    assert "has answers with seed=0, but 1 was requested" in capsys.readouterr().err
    questions.write_text("\n")
    assert phi4(*words) == 2
    assert "has no question" in capsys.readouterr().err
