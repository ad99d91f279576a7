"""`make gpu`: a part that fails or is out of time costs neither its rows nor the later parts."""

import os
import subprocess
from pathlib import Path

from tests.architecture.sizes import ROOT

PARTS = [
    "numbers",
    "qualify",
    "steps",
    "engine",
    "attention",
    "loss_head",
    "memory",
    "hopper",
    "libraries",
    "csrc",
    "triton",
]
STAND_IN = """#!/bin/sh
# Stands for python: notes each command, fails the engine's, and is a long time at one bench.
echo "$*" >>"$CALLS"
case "$*" in
    *gpu_engine*) exit 3 ;;
    *"bench --op cross_entropy"*) sleep 30 ;;
esac
"""


def gpu_check(directory: Path, *parts: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    python, calls = directory / "python", directory / "calls"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    calls.touch()
    environment = os.environ | {"PYTHON": str(python), "CALLS": str(calls), "PART_SECONDS": "3"}
    environment["OMP_NUM_THREADS"] = "1"
    command = ["bash", str(ROOT / "tools" / "gpu_check.sh"), *parts]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done, calls.read_text().splitlines()


def test_parts_go_on_after_one_that_fails(tmp_path):
    done, calls = gpu_check(tmp_path, "numbers", "engine", "csrc")
    assert done.returncode == 3
    assert "part engine: exit status 3" in done.stdout
    assert any("testing numbers --jobs" in call for call in calls)
    assert any("tests/csrc/test_gpu_ops.py" in call for call in calls)
    assert calls[-1] == "-m tools.benchmark_page", "rewritten from what rows there are"


def test_checks_are_shared_by_a_process_per_core_and_steps_leave_their_rows(tmp_path):
    _, calls = gpu_check(tmp_path, "numbers", "steps", "hopper")
    numbers = [call for call in calls if "testing numbers" in call]
    assert len(numbers) == 2
    # OMP_NUM_THREADS is 1 here, which is not the number of cores.
    assert all(f"--jobs {os.cpu_count()} --record" in call for call in numbers)
    assert "tools/gpu_step_time.py --out benchmarks/gpu_step_time.jsonl --seconds 3" in calls


def test_a_part_ends_when_its_time_is_up(tmp_path):
    done, calls = gpu_check(tmp_path, "loss_head", "csrc")
    assert done.returncode == 124
    assert "part loss_head: exit status 124" in done.stdout
    assert any("tests/csrc/test_gpu_ops.py" in call for call in calls)


def test_parts_are_listed_and_a_foreign_one_is_refused_before_anything_runs(tmp_path):
    done, calls = gpu_check(tmp_path, "--list")
    assert [line.split()[0] for line in done.stdout.splitlines()] == PARTS
    assert not calls
    done, calls = gpu_check(tmp_path, "numbers", "nonsense")
    assert done.returncode == 2 and "no part nonsense" in done.stderr
    assert not calls
