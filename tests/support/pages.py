"""Markdown pages whose commands are run: their blocks, their `phi4` commands, their output."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import typer

from phi4.cli import make_app
from phi4.cli.demo import RECIPE
from phi4.config import check, load_recipe
from tests.architecture.sizes import ROOT
from tests.support.waiting import LONG_SECONDS

TUTORIALS = sorted((ROOT / "docs/tutorials").glob("*.md"))
_BLOCK = re.compile(r"(?:^<!-- (.*?) -->\n)?^```(\w*)\n(.*?)^```$", re.M | re.S)
_NUMBER = re.compile(r"-?\d[\d,.]*(?:e[+-]\d+)?")

SHORT = ("parallel.tensor=1", "parallel.sequence=false", "checkpoint.every=2")
SHORT_DEMO = f"""
set -e
phi4 data demo --out runs/demo/data
phi4 train {RECIPE} run.steps=2 evaluation.every=0 parallel.pipeline=1 {" ".join(SHORT)}
"""
"""The demo's corpus and the beginning of its run, on one process instead of four."""


class Block(NamedTuple):
    """A fenced block: the comment in the line above it, if any, its language and its text."""

    mark: str
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """Its lines, those that end in a backslash joined with the next."""
        return self.text.replace("\\\n", " ").splitlines()


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    return [Block(*found) for found in _BLOCK.findall(page.read_text(encoding="utf-8"))]


def phi4_words(line: str) -> list[str]:
    """What a line of shell gives to `phi4`; nothing where it runs something else."""
    # Other lines may hold a part of a quoted text.
    if not re.search(r"\bphi4 ", line):
        return []
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    simple: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("&|;<>()"):
            simple.append([])
        elif simple[-1] or not re.match(r"\w+=", word):
            simple[-1].append(word)
    return next((words[1:] for words in simple if words and Path(words[0]).name == "phi4"), [])


def parse_command(words: list[str]) -> None:
    """Parse a `phi4` command as it would be, and check its recipe; nothing is run.

    Raises:
        Exception: an option, argument or key is wrong.
    """
    command: Any = typer.main.get_command(make_app((words[0],)))
    context = None
    while hasattr(command, "get_command"):
        context = command.make_context("phi4", words[:1], parent=context, resilient_parsing=True)
        name, *words = words
        found = command.get_command(context, name)
        assert found is not None, f"no command {name}"
        command = found
    parameters = command.make_context(command.name, words, parent=context).params
    recipe = next((str(v) for v in parameters.values() if str(v).endswith(".toml")), None)
    if recipe is not None and "overrides" in parameters:
        check(load_recipe(ROOT / recipe, parameters["overrides"] or []))


def script(parts: Iterable[str]) -> str:
    """Texts of bash as one script, with a line of its own before each; see `outputs`."""
    # A server that is left over would keep the output open.
    lines = ["set -euo pipefail", "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT"]
    lines += [f"echo; echo '=== part {number}'\n{text}" for number, text in enumerate(parts)]
    return "\n".join(lines)


def run(text: str, root: Path) -> list[str]:
    """Run a script in a directory, and end all that it started with it.

    Returns:
        What each part of the script printed, as `script` divides it.
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    started = subprocess.Popen(
        ["bash", "-c", text],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"PATH": path},
    )
    try:
        printed, _ = started.communicate(timeout=LONG_SECONDS)
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode == 0, printed
    return re.split(r"^=== part \d+\n", printed, flags=re.M)[1:]


def missing_lines(shown: str, printed: str) -> list[str]:
    """Lines of a block with which no line of an output begins, in their order and but for numbers.

    A line of dots stands for any lines.
    """
    rest = iter([_plain(line) for line in printed.splitlines()])
    wanted = [line for line in shown.splitlines() if line.strip(". ")]
    return [line for line in wanted if not any(out.startswith(_plain(line)) for out in rest)]


def _plain(line: str) -> str:
    return _NUMBER.sub("N", " ".join(line.split()))


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]
