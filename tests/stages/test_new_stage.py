"""CONTRIBUTING's steps for a stage, followed to the letter in a copy of the tree."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from phi4.rundir.names import METRICS_FILE
from phi4.rundir.step_log import read_metrics
from tests.support.in_process import write_recipe
from tests.support.waiting import LONG_SECONDS

ROOT = Path(__file__).parents[2]
COPIED = ("phi4", "kernels", "csrc", "tests", "examples", "tools", "docs", "benchmarks")


def steps() -> list[str]:
    """The numbered steps under "A stage"."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text[text.index("**A stage**") : text.index("**A hook**")]
    return re.findall(r"^\d\. .*?(?=^\d\. |\Z)", section, flags=re.M | re.S)


def follow(copy: Path) -> None:
    """Steps 1 to 3."""
    first, second, third, _ = steps()
    path = re.search(r"here `(phi4/stages/\w+\.py)`", first).group(1)
    code = textwrap.dedent(re.search(r"```python\n(.*?)   ```", first, flags=re.S).group(1))
    (copy / path).write_text(code)
    line = re.search(r'`("focal": .*?,)`', second).group(1)
    table = copy / "phi4/stages/__init__.py"
    text = table.read_text()
    end = text.index("\n}\n", text.index("STAGES = {"))
    table.write_text(f"{text[:end]}\n    {line}{text[end:]}")
    assert 'stage = "focal"' in third
    recipes = copy / "examples/recipes"
    recipe = (recipes / "tiny_pretrain.toml").read_text()
    (recipes / "tiny_focal.toml").write_text(recipe.replace("[run]", '[run]\nstage = "focal"'))


@pytest.mark.slow
def test_stage_is_added_by_the_steps_alone(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for name in COPIED:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.*"):
        if path.is_file():
            shutil.copy(path, copy)
    follow(copy)

    def run(*command: str, where: Path = copy) -> str:
        environment = os.environ | {"PYTHONPATH": f"{copy}:{copy / 'kernels'}"}
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=where,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LONG_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("ruff", "check", "phi4", "tests", "examples")
    run("ruff", "format", "--check", "phi4", "tests", "examples")
    # These ask git, or read the Makefile; the copy is no repository and has none.
    others = ("tracked_files", "links", "setup", "words_used")
    gates = (
        "tests/stages",
        "tests/architecture",
        *(f"--ignore=tests/architecture/test_{name}.py" for name in others),
    )
    printed = run("pytest", "-p", "no:cacheprovider", "-q", "-m", "not slow", *gates)
    assert "passed" in printed
    write_recipe(copy, "run.stage=focal", "run.steps=2")
    run("phi4", "train", "recipe.toml")
    losses = [step["loss"] for step in read_metrics(copy / "run" / METRICS_FILE)]
    assert len(losses) == 2
    assert losses[1] < losses[0]
