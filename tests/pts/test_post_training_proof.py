"""What tools/post_training.py compares, and when it fails; `make prove-post-training` runs it."""

import json
import sys
from pathlib import Path

import pytest

from phi4.cli import demo_post_training
from phi4.cli.demo_post_training import ChainSettings
from phi4.pts.select_checkpoint import Selection, write_selection
from phi4.rundir.names import SELECTED_FILE
from tools import post_training


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands, none of which is run."""
    commands: list[list[str]] = []

    def run_phi4(why: str, *words: object) -> None:
        commands.append(list(map(str, words)))

    monkeypatch.setattr(demo_post_training, "run_phi4", run_phi4)
    monkeypatch.setattr(post_training, "run_phi4", run_phi4)
    return commands


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_whole_answers_are_as_many_pairs_or_as_many_completions(
    tmp_path: Path, ran: list[list[str]]
) -> None:
    data = tmp_path / "data"
    write_lines(data / "pivots.jsonl", [{"pivots": [0] * count} for count in (3, 1, 2)])
    write_lines(tmp_path / "whole/overall.jsonl", [{"pair": i} for i in range(20)])
    write_lines(tmp_path / "search/report.json", [{"completions": 1000, "questions": 40}])
    best = str(tmp_path / "sft/checkpoints/step_0000040")
    selection = Selection(checkpoint=best, questions="", oracle="", n=8, candidates=())
    (tmp_path / "sft").mkdir()
    write_selection(tmp_path / "sft" / SELECTED_FILE, selection)
    counts = post_training.whole_answers(ChainSettings(out=tmp_path))
    assert counts == {"full_pairs_equal_pairs": 6, "full_pairs_equal_completions": 20}
    few = [json.loads(x)["pair"] for x in (data / "full_pairs_equal_pairs.jsonl").open()]
    # Of all questions, not of the first ones.
    assert few == [0, 3, 6, 9, 12, 15]
    drawing = next(words for words in ran if words[:2] == ["answers", "draw"])
    assert drawing[2] == best and "--n=25" in drawing
    assert f"--questions={data / 'search.jsonl'}" in drawing


@pytest.mark.parametrize(
    ("passed", "task", "code"),
    [((True, True), "short", 0), ((True, False), "short", 1), ((True, False), "long", 0)],
)
def test_a_stage_of_the_short_task_that_gains_too_little_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed: tuple[bool, ...], task: str, code: int
) -> None:
    def measure(settings: ChainSettings) -> list[dict]:
        return [{"measured": "chain", "passed": passed[settings.seed]}]

    monkeypatch.setattr(post_training, "measure", measure)
    rows = tmp_path / "rows.jsonl"
    words = ["post_training", "--seeds", "0", "1", "--tasks", task, "--json", str(rows)]
    monkeypatch.setattr(sys, "argv", words)
    assert post_training.main() == code
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [(row["task"], row["seed"]) for row in found] == [(task, 0), (task, 1)]


def test_seeds_follow_from_what_is_frozen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def seeds(content: str) -> list[int]:
        for pattern in post_training.FROZEN:
            path = tmp_path / pattern.replace("*", "x")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return post_training.drawn_seeds(3)

    monkeypatch.chdir(tmp_path)
    assert seeds("a") == seeds("a") != seeds("b")
    assert len(set(seeds("a"))) == 3
