"""The commands of a demo: printed, then run; in another directory, with their recipes moved."""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import typer

from phi4.config import SourceConfig, load_recipe


def run_phi4(why: str, *words: object) -> None:
    """Print a `phi4` command and run it.

    Args:
        why: heading, a line.
        words: of the command.

    Raises:
        typer.Exit: with its exit code, where it failed.
    """
    command = [str(word) for word in words]
    typer.secho(f"\n{why}\n$ phi4 {shlex.join(command)}", bold=True)
    code = subprocess.run([sys.executable, "-m", "phi4", *command], check=False).returncode
    if code:
        raise typer.Exit(code)


RunCommand = Callable[..., None]
"""Prints and runs a command, as `run_phi4` does."""


class NumberedCommands:
    """Runs the commands of a demo, each with its number in the heading: `3/7 TITLE`.

    Args:
        run: runs one of them.
        total: how many there are.
    """

    def __init__(self, run: RunCommand, total: int) -> None:
        self._run, self._total = run, total
        self._number = 0

    def __call__(self, why: str, *words: object) -> None:
        """See `run_phi4`."""
        self._number += 1
        self._run(f"{self._number}/{self._total} {why}", *words)


def moved_recipe(path: str, out: Path, usual: Path) -> Sequence[str]:
    """Overrides that move all files of a recipe to another directory; none for the usual one.

    Args:
        path: of the recipe.
        out: where the demo runs.
        usual: the directory in the recipe.
    """
    if out == usual:
        return []
    recipe = load_recipe(path)
    ranks = recipe.tokenizer.path
    assert ranks is not None, "the demo's recipes name the rank file they train"

    def moved(name: str) -> Path:
        return out / Path(name).relative_to(usual)

    def sources(entries: Sequence[SourceConfig]) -> str:
        rows = [
            one.model_dump(exclude_unset=True) | {"path": str(moved(one.path))} for one in entries
        ]
        keys = [", ".join(f"{key} = {json.dumps(row[key])}" for key in row) for row in rows]
        return "[" + ", ".join(f"{{ {entry} }}" for entry in keys) + "]"

    optional = {
        "run.init_from": recipe.run.init_from,
        "data.continue_from": recipe.data.continue_from,
        "data.reference_cache": recipe.data.reference_cache,
    }
    return [
        f"run.dir={moved(recipe.run.dir)}",
        f"tokenizer.path={moved(ranks)}",
        f"data.sources={sources(recipe.data.sources)}",
        *([f"data.held_out={sources(recipe.data.held_out)}"] if recipe.data.held_out else []),
        *(f"{key}={moved(name)}" for key, name in optional.items() if name),
    ]
