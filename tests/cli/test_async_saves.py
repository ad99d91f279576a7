"""`phi4 train` with asynchronous saves: a rank that is killed while its shard is being written."""

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from phi4.rundir.checkpoints import complete_checkpoints, latest_checkpoint, step_of
from phi4.rundir.save_log import read_saves
from tests.support.in_process import write_recipe
from tests.support.runs import command, train
from tests.support.waiting import LONG_SECONDS, wait_until


def _writers(run: subprocess.Popen) -> list[psutil.Process]:
    """The writer processes of a run, that of rank 0 first."""
    found = [
        process
        for process in psutil.Process(run.pid).children(recursive=True)
        if any("phi4.writer.process" in word for word in process.cmdline())
    ]
    return sorted(found, key=lambda process: process.pid)


def _newest_durable(root: Path) -> int:
    if not (root / "run/checkpoints.jsonl").exists():
        return 0
    durable = [event.step for event in read_saves(root / "run") if event.state == "durable"]
    return max(durable, default=0)


@pytest.mark.slow
def test_rank_killed_in_the_middle_of_a_write_costs_that_save_only(tmp_path: Path) -> None:
    write_recipe(tmp_path, "checkpoint.every=5", "checkpoint.asynchronous=true", "parallel.data=2")
    checkpoints, out = tmp_path / "run/checkpoints", tmp_path / "out"
    with out.open("w") as stream:
        run = subprocess.Popen(
            command("run.steps=1000000"), cwd=tmp_path, stdout=stream, stderr=stream
        )
        try:
            wait_until(lambda: _newest_durable(tmp_path), "a durable checkpoint")
            writers = _writers(run)
            assert len(writers) == 2, out.read_text()
            victim = writers[1].parent()
            # Its part of the next save is never done.
            writers[1].suspend()
            wait_until(lambda: list(checkpoints.glob(".step_*.partial")), "a save under way")
            os.kill(victim.pid, signal.SIGKILL)
            assert run.wait(timeout=LONG_SECONDS) != 0
        finally:
            run.kill()
            run.wait()
    wait_until(lambda: not any(w.is_running() for w in writers), "the writers to end")
    newest = latest_checkpoint(checkpoints)
    assert step_of(newest) >= _newest_durable(tmp_path) > 0
    assert "scheduled" in out.read_text() and "durable after" in out.read_text()
    # In another layout, from what was written asynchronously.
    steps = step_of(newest) + 2
    second = train(tmp_path, "--change", f"run.steps={steps}", "parallel.data=1")
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"resumed from run/checkpoints/{newest.name}" in second.stdout
    assert step_of(complete_checkpoints(checkpoints)[-1]) == steps
    assert not list(checkpoints.glob(".step_*"))
