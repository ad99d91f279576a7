"""Every script of examples/ runs and teaches its model something."""

import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from phi4.cli.demo import ALL_STEPS
from phi4.cli.demo_post_training import ChainSettings
from tests.support.planned_demo import planned_commands
from tests.support.ranks import run_ranks
from tests.support.waiting import LONG_SECONDS

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(rank: int, world_size: int, script: str) -> list[float]:
    return runpy.run_path(str(EXAMPLES / script))["main"]()


@pytest.mark.parametrize(
    ("script", "gain"), [("train_loop.py", -2.0), ("custom_objective.py", 0.3)]
)
def test_script_learns(script: str, gain: float) -> None:
    """gain: how the script's figure changes at least, a loss downward and an accuracy upward."""
    [figures] = run_ranks(1, run, script)
    change = figures[-1] - figures[0]
    assert change <= gain if gain < 0 else change >= gain


@pytest.mark.slow
def test_post_training_in_layouts_goes_from_the_corpus_to_an_answer(tmp_path: Path) -> None:
    """One process and two steps per stage; the layouts have tests of their own."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/phi4").symlink_to(Path(sys.executable).parent / "phi4")
    short = ["run.steps=2", "parallel.tensor=1", "parallel.pipeline=1", "parallel.context=1"]
    command = [
        str(tmp_path / "examples/post_training_layouts.sh"),
        *short,
        "parallel.sequence=false",
    ]
    done = subprocess.run(command, capture_output=True, timeout=LONG_SECONDS)
    said = (done.stdout + done.stderr).decode(errors="replace")
    assert done.returncode == 0, said
    origins = {"run": "", "sft": "run", "dpo_pivotal": "sft", "dpo_second": "dpo_pivotal"}
    for name, origin in origins.items():
        assert f"saved runs/demo/{name}/checkpoints/step_0000002" in said
        assert not origin or f"initial weights from runs/demo/{origin}/checkpoints/step_" in said
    assert said.count("start gate: passed") == 2


@pytest.mark.slow
def test_first_model_in_mlflow_is_compared_reported_and_registered(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(EXAMPLES)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = subprocess.run(
        [str(tmp_path / "examples/mlflow/first_model.sh"), "run.steps=6", "evaluation.batches=1"],
        capture_output=True,
        text=True,
        timeout=LONG_SECONDS,
        env={**os.environ, "PORT": str(port)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    runs = re.findall(
        r"^(rate_\S+): (\w+)\n  held-out loss \S+ after (\d+) steps", done.stdout, re.M
    )
    assert sorted(runs) == [("rate_1e-2", "FINISHED", "6"), ("rate_1e-3", "FINISHED", "6")]
    assert "tiny-phi4 version 1 in MLflow" in done.stdout
    assert "Training loss, B minus A" in done.stdout
    assert (tmp_path / "runs/first_model/report.html").stat().st_size > 1_000_000


def test_post_training_in_layouts_takes_the_model_of_a_finished_demo() -> None:
    script = (EXAMPLES / "post_training_layouts.sh").read_text()
    assert f"runs/demo/run/checkpoints/step_{ALL_STEPS:07d} ]" in script


STUB = r"""#!/bin/sh
for word in "$@"; do printf '%s\t' "$word" >> commands; done
echo >> commands
if [ "$1 $2" = "pts select" ]; then
    echo "a table"
    echo "$3/checkpoints/step_0000030"
fi
"""
"""Notes what it is asked, and answers where the script reads what is printed."""


def test_post_training_is_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script's commands are those of `phi4 demo --post-training`, but for the likeliest answers
    and for the model that the table shows besides."""
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples/post_training.sh").write_bytes(
        (EXAMPLES / "post_training.sh").read_bytes()
    )
    (tmp_path / ".venv/bin").mkdir(parents=True)
    stub = tmp_path / ".venv/bin/phi4"
    stub.write_text(STUB)
    stub.chmod(0o755)
    command = ["bash", str(tmp_path / "examples/post_training.sh"), "run.steps=7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONG_SECONDS)
    assert done.returncode == 0, done.stderr
    best = "runs/reasoning/dpo_judge/checkpoints/step_0000030"
    assert f"phi4 chat {best} " in done.stdout.splitlines()[-1]
    lines = (tmp_path / "commands").read_text().splitlines()
    in_script = [sorted(line.split("\t")[:-1]) for line in lines]
    settings = ChainSettings(overrides=("run.steps=7",))
    besides = ("greedy", "dpo_judge_only", "dpo_2_only")
    assert in_script == [
        sorted(words)
        for words in planned_commands(settings, monkeypatch)
        if not any(name in word for name in besides for word in words)
    ]


def test_every_script_is_run_here() -> None:
    run_here = {"train_loop.py", "custom_objective.py", "post_training_layouts.sh"}
    run_here.add("post_training.sh")
    assert {path.name for path in EXAMPLES.glob("*.*")} == run_here
