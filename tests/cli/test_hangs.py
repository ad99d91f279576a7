"""A rank that is stopped while `phi4 train` runs: named, with stacks, code 7, nothing left over."""

import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.support.runs import command
from tests.support.waiting import LONG_SECONDS, wait_until

LONG = ("run.steps=5000", "run.dir=long", "checkpoint.every=0", "reliability.silence_seconds=15")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "victim", "witness"),
    [("parallel.data=2", "0", "long/logs/rank_1.log"), ("parallel.pipeline=2", "1", "err")],
)
def test_stopped_rank_of_a_run_is_named(copy: Path, layout: str, victim: str, witness: str) -> None:
    with (copy / "out").open("w") as out, (copy / "err").open("w") as err:
        launcher = subprocess.Popen(command(*LONG, layout), cwd=copy, stdout=out, stderr=err)
        try:
            wait_until(lambda: _has_stepped(launcher, copy / "out"), "the first steps")
            ranks = [
                process
                for process in psutil.Process(launcher.pid).children(recursive=True)
                if "RANK" in process.environ()
            ]
            (stopped,) = [process for process in ranks if process.environ()["RANK"] == victim]
            os.kill(stopped.pid, signal.SIGSTOP)
            code = launcher.wait(LONG_SECONDS)
        finally:
            launcher.kill()
            launcher.wait()
    assert code == 7
    line = (copy / "err").read_text().splitlines()[-1]
    named = f"HungError: rank {victim} on {socket.gethostname()} (pid {stopped.pid}), last heard "
    assert line.startswith(named) and "no sign of life for 15 s" in line
    seen = (copy / witness).read_text()
    assert "in train_step" in seen and "in _beat" in seen
    assert not [p for p in ranks if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def _has_stepped(launcher: subprocess.Popen, out: Path) -> bool:
    assert launcher.poll() is None
    return re.search(r"step \d\d+/", out.read_text()) is not None
