"""Starts the launcher as a process of its own, over small worker scripts."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.waiting import LONG_SECONDS, wait_until

DRIVER = """
import signal, sys
from dataclasses import replace
from pathlib import Path
from phi4.launch import hold_notices, run_workers, save_and_end
signal.signal(signal.SIGINT, signal.default_int_handler)
if sys.argv[-1]:
    hold_notices()  # as the command line does first
script, num_workers, work_dir, grace, mode, stop = sys.argv[1:]
plan = replace(save_and_end(float(stop)), by_ctrl_c=mode == "ctrl_c") if stop else None
sys.exit(run_workers([script], num_workers=int(num_workers), work_dir=Path(work_dir),
                     grace_seconds=float(grace), interactive=mode == "interactive",
                     stop=plan, command=[sys.executable]))
"""

PROLOGUE = """
import os, signal, sys, time
from pathlib import Path
from phi4.errors import DiskFullError, LayoutError
from phi4.launch import report_errors, take_notices
rank, here = int(os.environ["RANK"]), Path(os.environ["TEST_DIR"])

def note(name):
    (here / name).write_text(str(os.getpid()))

def await_note(name):
    while not (here / name).exists():
        time.sleep(0.01)
"""


@dataclass
class Launch:
    process: subprocess.Popen
    directory: Path

    def pid_in(self, name: str) -> int:
        """The pid that a worker noted, once it did."""
        note = self.directory / name

        def noted() -> str:
            text = note.read_text() if note.is_file() else ""
            assert text or self.process.poll() is None, self.output()
            return text

        return int(wait_until(noted, f"the note {name}"))

    def output(self) -> tuple[str, str]:
        return self.process.communicate(timeout=LONG_SECONDS)

    def log(self, rank: int) -> str:
        return (self.directory / "work" / "logs" / f"rank_{rank}.log").read_text()

    def survivors(self) -> list[int]:
        """Living processes that the launcher started, however deep; it may have been killed."""
        mark = f"TEST_DIR={self.directory}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdecimal() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def leftovers(self) -> list[Path]:
        return list(self.directory.glob("phi4-run-*"))


Launcher = Callable[..., Launch]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launcher]:
    started: list[Launch] = []

    def start(
        script: str,
        num_workers: int,
        grace: float = 2.0,
        mode: str = "",
        stop: float | str = "",
        **streams: int,
    ) -> Launch:
        path = tmp_path / "script.py"
        path.write_text(PROLOGUE + textwrap.dedent(script))
        work = str(tmp_path / "work")
        arguments = [str(path), str(num_workers), work, str(grace), mode, str(stop)]
        command = [sys.executable, "-c", DRIVER, *arguments]
        environment = {**os.environ, "TEST_DIR": str(tmp_path), "TMPDIR": str(tmp_path)}
        environment.pop("OMP_NUM_THREADS", None)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
        process = subprocess.Popen(command, env=environment, text=True, **pipes)
        started.append(Launch(process, tmp_path))
        return started[-1]

    yield start
    for run in started:
        run.process.kill()
        # What the launcher failed to end would hold the pipes open.
        for pid in run.survivors():
            os.kill(pid, signal.SIGKILL)
        run.process.communicate()
