"""The oracles in a process of an ordinary user, where the tests run as root.

What the user may not read, the working tree or the interpreter, it gets elsewhere: a copy of the
few files of the oracles below a directory that everybody may enter, and the system's Python.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.architecture.sizes import ROOT
from tests.support.waiting import LONG_SECONDS

USER = 12345
_PYTHONS = (sys.executable, "/usr/bin/python3")


def run_as_user(script: str) -> str:
    """Standard output of a Python script that imports `phi4.oracles`.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    with tempfile.TemporaryDirectory(prefix="phi4-oracles-", dir="/tmp") as name:
        folder = Path(name)
        for part in ("__init__.py", "errors.py", "oracles"):
            source, target = ROOT / "phi4" / part, folder / "phi4" / part
            target.parent.mkdir(exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        subprocess.run(["chmod", "-R", "a+rX", name], check=True)
        command = [*_become_user(), _python(name), "-s", "-B", "-c", script]
        return subprocess.run(
            command,
            cwd=name,
            env={"PYTHONPATH": name, "PATH": "/usr/bin:/bin", "PHI4_SECRET": "s3cret"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=LONG_SECONDS,
        ).stdout


def _become_user() -> list[str]:
    if os.geteuid() != 0:
        return []
    return ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--"]


def _python(folder: str) -> str:
    """An interpreter that the user can start and that the oracles run on."""
    check = "import sys; sys.exit(sys.version_info < (3, 11))"
    for python in _PYTHONS:
        command = [*_become_user(), python, "-I", "-c", check]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True)
        except OSError:
            continue
        if done.returncode == 0:
            return python
    pytest.skip("no Python from 3.11 on that an ordinary user may start")
