"""A rank that dies, a signal, another launcher: real processes of `phi4 train`."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from phi4.cli.demo import demo
from phi4.errors import OwnershipError, Phi4Error
from phi4.rundir.lease import take_lease
from tests.support.runs import command, train, train_forked
from tests.support.waiting import LONG_SECONDS, wait_until

ERRORS = "phi4.errors"

LONG = ("run.steps=5000", "parallel.pipeline=2", "run.dir=long", "checkpoint.every=0")


@contextmanager
def _training(root: Path) -> Iterator[tuple[subprocess.Popen, list[psutil.Process]]]:
    """A run of two ranks that has done its first steps, and its ranks."""
    out = (root / "out").open("w")
    launcher = subprocess.Popen(command(*LONG), cwd=root, stdout=out, stderr=subprocess.PIPE)
    try:
        wait_until(lambda: _has_stepped(launcher, root / "out"), "the first step")
        children = psutil.Process(launcher.pid).children(recursive=True)
        yield launcher, [p for p in children if "RANK" in p.environ()]
    finally:
        launcher.kill()
        launcher.wait()
        out.close()


def _has_stepped(launcher: subprocess.Popen, out: Path) -> bool:
    assert launcher.poll() is None
    return re.search(r"step \d+/", out.read_text()) is not None


def _rank(ranks: list[psutil.Process], rank: str) -> psutil.Process:
    return next(process for process in ranks if process.environ()["RANK"] == rank)


def _ends(launcher: subprocess.Popen, ranks: list[psutil.Process]) -> tuple[int, str]:
    _, errors = launcher.communicate(timeout=LONG_SECONDS)
    assert not [p for p in ranks if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    return launcher.returncode, errors.decode()


@pytest.mark.slow
def test_killed_rank_ends_the_run_and_is_named(copy: Path) -> None:
    with _training(copy) as (launcher, ranks):
        _rank(ranks, "1").kill()
        code, errors = _ends(launcher, ranks)
    assert code == 128 + signal.SIGKILL
    assert errors.strip().splitlines()[-1].startswith("rank 1 of 2 was killed by signal 9")


@pytest.mark.slow
def test_interrupt_ends_the_run_and_the_record_stays_readable(copy: Path) -> None:
    from phi4.rundir.step_log import read_metrics

    with _training(copy) as (launcher, ranks):
        launcher.send_signal(signal.SIGINT)
        code, errors = _ends(launcher, ranks)
    assert code == 130 and "interrupted" in errors
    assert read_metrics(copy / "long/metrics.jsonl")[0]["step"] == 1


@pytest.mark.slow
def test_torchrun_runs_the_same_command(copy: Path) -> None:
    torchrun = Path(sys.executable).with_name("torchrun")
    arguments = command("run.dir=torchrun", "parallel.tensor=2")[1:]
    result = subprocess.run(
        [torchrun, "--standalone", "--nproc-per-node=2", *arguments],
        cwd=copy,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LONG_SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "2 processes" in result.stdout and re.search(r"layout: +tensor 2", result.stdout)


@pytest.mark.slow
def test_torchrun_with_the_wrong_number_is_refused(copy: Path) -> None:
    torchrun = Path(sys.executable).with_name("torchrun")
    result = subprocess.run(
        [torchrun, "--standalone", "--nproc-per-node=2", *command("run.dir=x")[1:]],
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=LONG_SECONDS,
        check=False,
    )
    assert result.returncode != 0
    assert "2 processes were started" in result.stderr


def test_finished_run_has_nothing_to_do(copy: Path) -> None:
    before = (copy / "run/metrics.jsonl").read_bytes()
    result = train_forked(copy)
    assert result.returncode == 0, result.stderr
    assert "already finished: run has all 2 steps" in result.stdout
    assert (copy / "run/metrics.jsonl").read_bytes() == before


def _exit_codes_in_docs() -> dict[str, set[str]]:
    """Errors by exit code, from the table in docs/faults.md."""
    text = (Path(__file__).parents[2] / "docs/faults.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| [^|]+ \|([^|]*)\|", text, re.MULTILINE)
    return {code: set(re.findall(r"`(\w+)`", errors)) for code, errors in rows}


def test_documented_exit_codes_are_those_of_the_errors() -> None:
    def family(error: type[Phi4Error]) -> Iterator[type[Phi4Error]]:
        yield error
        for child in error.__subclasses__():
            yield from family(child)

    codes = {error: error.exit_code for error in family(Phi4Error) if error.__module__ == ERRORS}
    documented = _exit_codes_in_docs()
    for code in {"0", "1", *map(str, codes.values())}:
        named = {error.__name__ for error in codes if str(codes[error]) == code}
        assert documented[code] == named, f"exit code {code}"
    signals = (signal.SIGHUP, signal.SIGINT, signal.SIGKILL, signal.SIGTERM)
    assert {str(128 + number) for number in signals} <= documented.keys()


def _files(root: Path) -> dict[str, tuple[bytes, int]]:
    found = [path for path in root.rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


@pytest.mark.parametrize("layout", ["parallel.pipeline=1", "parallel.pipeline=2"])
def test_second_start_in_a_run_dir_is_one_line_and_touches_nothing(copy: Path, layout: str) -> None:
    lease = take_lease(copy / "run", job="47", say=print)
    before = _files(copy)
    result = train_forked(copy, "run.steps=4", "--change", layout)
    assert result.returncode == 3 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert f"OwnershipError: run.dir=run is owned by pid {os.getpid()} on " in line
    assert "Slurm job 47" in line and _files(copy) == before
    lease.check()


def test_demo_does_not_remove_a_run_that_is_going_on(tmp_path: Path) -> None:
    lease = take_lease(tmp_path / "midtrain", job="", say=print)
    (tmp_path / "run").mkdir()
    with pytest.raises(OwnershipError):
        demo(tmp_path, None)
    lease.check()
    assert (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["launcher", "0"])
def test_start_after_a_kill_takes_over(copy: Path, victim: str) -> None:
    with _training(copy) as (launcher, ranks):
        killed = launcher if victim == "launcher" else _rank(ranks, victim)
        killed.kill()
        launcher.wait(LONG_SECONDS)
        psutil.wait_procs(ranks, timeout=LONG_SECONDS)
    result = train(copy, "run.steps=3", "run.dir=long", "parallel.pipeline=2")
    assert result.returncode == 0, result.stderr
    attempts = sorted(path.name for path in (copy / "long/attempts").iterdir())
    assert attempts == ["0000001.json", "0000002.json"]


BLIND = """
import os, pathlib
exists = pathlib.Path.exists
if os.environ.get("RANK") == "1":
    pathlib.Path.exists = lambda path, **_: "attempts" not in str(path) and exists(path)
"""


@pytest.mark.slow
def test_rank_that_cannot_see_the_directory_ends_the_run_in_time(copy: Path) -> None:
    (copy / "sitecustomize.py").write_text(BLIND)
    environment = {**os.environ, "PYTHONPATH": f"{copy}:{os.environ.get('PYTHONPATH', '')}"}
    arguments = command("run.dir=blind", "parallel.pipeline=2")
    result = subprocess.run(
        arguments, cwd=copy, env=environment, capture_output=True, text=True, timeout=LONG_SECONDS
    )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("PlatformError: rank 1 on ") and "does not see blind/attempts" in line
