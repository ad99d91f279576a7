"""`phi4 answers draw` and `phi4 pts select` on a real model, in one process and in several."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from phi4.config import dump_toml, load_recipe
from phi4.pts.answers import read_answers
from phi4.pts.select_checkpoint import read_selection
from phi4.rundir.checkpoints import checkpoint_name, find_checkpoint
from phi4.rundir.names import CONFIG_FILE, RECIPE_FILE, SELECTED_FILE, SELECTION_DIR
from tests.support.commands import command, write_model
from tests.support.ranks import RankPool, pool_fixture
from tests.support.waiting import LONG_SECONDS

PHI4 = (sys.executable, "-m", "phi4")
DRAWN = ("--n=2", "--max-tokens=6", "--seed=3")


pool = pool_fixture(1)


@pytest.fixture(scope="module")
def run(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that started from another one, whose weights it still has."""
    root = tmp_path_factory.mktemp("runs")
    origin, run = root / "origin", root / "run"
    origin.mkdir()
    write_model(pool, origin)
    shutil.copytree(origin, run)
    recipe = load_recipe(find_checkpoint(run) / RECIPE_FILE, [f"run.init_from={origin}"])
    (run / CONFIG_FILE).write_text(dump_toml(recipe))
    return run


@pytest.fixture(scope="module")
def questions(run: Path) -> Path:
    path = run / "questions.jsonl"
    rows = [{"prompt": f"{word} process", "answer": word} for word in ("Every", "No", "A")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_answers_do_not_depend_on_the_layout(
    pool: RankPool, run: Path, questions: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    asked = (f"--questions={questions}", "--chat", *DRAWN)
    ended = command(pool, "answers", "draw", run, f"--out={one}", *asked)
    assert ended.code == 0, ended.err
    words = ["answers", "draw", str(run), "parallel.pipeline=2", f"--out={two}", *asked]
    done = subprocess.run([*PHI4, *words], capture_output=True, timeout=LONG_SECONDS)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert [row.ids for row in read_answers(one)] == [row.ids for row in read_answers(two)]
    assert len(list(read_answers(one))) == 6


@pytest.mark.slow
def test_checkpoints_of_a_run_are_asked_one_after_another(
    pool: RankPool, run: Path, questions: Path
) -> None:
    words = (f"--questions={questions}", "--oracle=exact", *DRAWN)
    ended = command(pool, "pts", "select", run, *words)
    assert ended.code == 0, ended.err
    found = read_selection(run / SELECTED_FILE)
    assert [one.name for one in found.candidates] == ["start", checkpoint_name(0)]
    assert found.checkpoint == str(find_checkpoint(run.parent / "origin"))
    answers = [read_answers(path) for path in sorted((run / SELECTION_DIR).glob("*.jsonl"))]
    assert len({tuple(tuple(row.ids) for row in rows) for rows in answers}) == 1
    assert ended.out.splitlines()[-1] == found.checkpoint
