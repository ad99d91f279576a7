"""`phi4 train` in a directory with a recipe.toml, as a user starts it or without the start."""

import contextlib
import io
import os
import subprocess
import sys
import traceback
from pathlib import Path
from unittest import mock

from tests.support.ranks import run_ranks
from tests.support.waiting import LONG_SECONDS


def train(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run it to its end."""
    return subprocess.run(
        command(*arguments),
        cwd=root,
        capture_output=True,
        text=True,
        timeout=LONG_SECONDS,
        check=False,
    )


def train_forked(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Like `train`, in a fresh process that has its imports: 6 CPU seconds less.

    Only for what one process does, as the recipe of tests/cli: more would be started as usual.
    """
    words = command(*arguments)[3:]
    [(code, out, err)] = run_ranks(1, _main, root, words)
    return subprocess.CompletedProcess(words, code, out, err)


def command(*arguments: str) -> list[str]:
    """The command line for `recipe.toml`."""
    return [sys.executable, "-m", "phi4", "train", "recipe.toml", *arguments]


def _main(rank: int, world_size: int, root: Path, words: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `phi4 WORDS`."""
    from phi4.cli import main

    os.chdir(root)
    out, err = io.StringIO(), io.StringIO()
    code = 0
    argv = mock.patch.object(sys, "argv", ["phi4", *words])
    with argv, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        except Exception:
            traceback.print_exc()
            code = 1
    return code, out.getvalue(), err.getvalue()
