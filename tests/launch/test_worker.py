"""How a worker leaves when it fails, for each of those who may have started it."""

import os
import subprocess
import sys

import pytest

from phi4.errors import DataError
from phi4.launch import report_errors
from phi4.launch.worker import read_reports

# The exit handler stands for the destructors that would wait for other ranks.
SCRIPT = """
import atexit, sys
from phi4.errors import DataError, DiskFullError, OwnershipError
from phi4.launch import report_errors
atexit.register(print, "unwound")
print("output before", end="")
with report_errors():
    exec(sys.argv[1])
"""


def run(statement: str, **environ: str) -> subprocess.CompletedProcess:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    command = [sys.executable, "-c", SCRIPT, statement]
    return subprocess.run(command, env={**clean, **environ}, capture_output=True, text=True)


TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("statement", "exit_code", "stderr_start"),
    [
        ("raise DataError('a.bin is cut off')", 2, "rank 1: DataError: a.bin is cut off\n"),
        ("raise OwnershipError('taken')", 3, "rank 1: OwnershipError: taken\n"),
        ("raise DiskFullError('full')", 4, "rank 1: DiskFullError: full\n"),
        ("1 / 0", 1, "rank 1: Traceback (most recent call last):\n"),
        ("raise SystemExit(7)", 7, ""),
        ("raise KeyboardInterrupt", 130, ""),
    ],
)
def test_worker_of_torchrun_says_why_and_leaves_at_once(statement, exit_code, stderr_start):
    result = run(statement, **TORCHRUN)
    assert (result.returncode, result.stdout) == (exit_code, "output before")
    assert result.stderr.startswith(stderr_start) and bool(result.stderr) == bool(stderr_start)


@pytest.mark.parametrize("statement", ["pass", "raise SystemExit(0)"])
def test_worker_that_ends_well_unwinds(statement):
    result = run(statement, **TORCHRUN)
    assert (result.returncode, result.stdout) == (0, "output beforeunwound\n")


def test_single_process_raises_as_usual():
    with pytest.raises(DataError), report_errors({}):
        raise DataError("a.bin is cut off")


def test_reports_come_back_the_earliest_first(tmp_path):
    for rank, statement in [("3", "raise DataError('first')"), ("1", "1 / 0")]:
        where = {
            "PHI4_RENDEZVOUS": str(tmp_path),
            "PHI4_ERROR_FILE": f"{tmp_path}/rank_{rank}.json",
        }
        run(statement, **{**TORCHRUN, "WORLD_SIZE": "4", "RANK": rank}, **where)
    first, second = read_reports(tmp_path)
    assert (first.rank, first.text, first.user_error) == (3, "DataError: first", True)
    assert (second.rank, second.text, second.user_error) == (
        1,
        "ZeroDivisionError: division by zero",
        False,
    )
    assert (first.exit_code, second.exit_code) == (2, 1)
    assert second.traceback.endswith("ZeroDivisionError: division by zero\n")
    assert first.time < second.time
