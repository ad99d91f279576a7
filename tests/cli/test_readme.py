"""README's commands work as they are written there."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from urllib.request import urlopen

import mlflow
import pytest

from phi4.cli import data
from phi4.config import check, load_recipe
from tests.support.waiting import LONG_SECONDS, wait_until

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples/recipes").glob("*.toml"))
PORT = ":5000"


def commands() -> list[str]:
    """The lines of README's blocks of commands."""
    blocks = re.findall(r"^```\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    return [line for block in blocks for line in block.splitlines()]


def mlflow_block() -> tuple[str, str, str]:
    """What builds the corpus, what starts a server and what trains."""
    lines = commands()
    (at,) = (number for number, line in enumerate(lines) if "tracking.uri=" in line)
    return tuple(lines[at - 2 : at + 1])


def recipe_words() -> list[list[str]]:
    """Recipe and overrides of each command that takes a recipe."""
    found = []
    for line in commands():
        if any(f"phi4 {name} " in line for name in ("train", "plan", "launch slurm")):
            words = shlex.split(line)
            at = next(number for number, word in enumerate(words) if word.endswith(".toml"))
            found.append([words[at], *(word for word in words[at + 1 :] if "=" in word)])
    return found


@pytest.mark.parametrize("words", recipe_words(), ids=lambda words: Path(words[0]).stem)
def test_recipe_of_a_command_loads_with_its_overrides(words: list[str]) -> None:
    check(load_recipe(ROOT / words[0], words[1:]))


def test_mlflow_command_needs_what_the_line_before_leaves_and_no_other_run() -> None:
    corpus, server, training = mlflow_block()
    (recipe,) = (
        load_recipe(ROOT / words[0], words[1:]) for words in recipe_words() if words[-1] in training
    )
    assert corpus == ".venv/bin/phi4 data demo"
    made = signature(data.demo).parameters["out"].default
    files = [
        recipe.tokenizer.path,
        *(s.path for s in (*recipe.data.sources, *recipe.data.held_out)),
    ]
    assert {str(Path(file).parent) for file in files} == {made}
    # A directory of its own: another run in it was started with other steps.
    assert recipe.run.dir not in {load_recipe(path).run.dir for path in RECIPES}
    assert recipe.tracking.uri.endswith(PORT) and "--port 5000 &" in server


@contextmanager
def running(command: str, root: Path) -> Iterator[None]:
    """A command and all that it starts, stopped at the end."""
    with (root / "server.log").open("w") as log:
        server = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=root,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(LONG_SECONDS)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def answers(uri: str) -> bool:
    try:
        return urlopen(f"{uri}/health", timeout=LONG_SECONDS).status == 200
    except OSError:
        return False


def bash(command: str, root: Path) -> None:
    result = subprocess.run(
        ["bash", "-c", command], cwd=root, capture_output=True, text=True, timeout=LONG_SECONDS
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_mlflow_commands_train_a_run_that_the_server_has(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name in ("phi4", "mlflow"):
        (tmp_path / ".venv/bin" / name).symlink_to(Path(sys.executable).parent / name)
    # The port may be taken on this machine; the rest is typed as it stands.
    port = free_port()
    uri = f"http://localhost:{port}"
    corpus, server, training = (
        line.replace("--port 5000", f"--port {port}").replace(PORT, f":{port}")
        for line in mlflow_block()
    )
    bash(corpus, tmp_path)
    with running(server.removesuffix("&"), tmp_path):
        wait_until(lambda: answers(uri), f"an answer of {uri}")
        # Two steps of the hundred show it.
        bash(f"{training} run.steps=2", tmp_path)
        client = mlflow.MlflowClient(uri)
        (experiment,) = client.search_experiments(filter_string="name = 'phi4'")
        runs = client.search_runs([experiment.experiment_id])
        (run,) = (found for found in runs if "mlflow.parentRunId" in found.data.tags)
        (model,) = (found for found in runs if found is not run)
        assert run.data.tags["mlflow.parentRunId"] == model.info.run_id
        assert (run.info.run_name, run.info.status) == ("mlflow", "FINISHED")
        assert run.data.params["tracking.uri"] == uri
        losses = client.get_metric_history(run.info.run_id, "loss")
        assert [point.step for point in losses] == [1, 2]
        artifacts = {found.path for found in client.list_artifacts(run.info.run_id)}
        assert artifacts == {"about", "checkpoints.json", "config.toml"}
    # Everything lies where git does not look.
    assert {path.name for path in tmp_path.iterdir()} == {".venv", "examples", "runs", "server.log"}
