"""What the processes below one use, found by both ways that the kernel offers."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise

import pytest

from phi4.oracles.sandbox.process_use import UseMeter, descendants
from tests.support.waiting import wait_until

# A child that has left its session with its own parent gone, and one that holds memory.
TREE = """
import os, sys, time, ctypes
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # adopts orphans, as the first process of a namespace
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        kept = bytearray(b"x" * (40 << 20))
        print("ready", flush=True)
        time.sleep(600)
    os._exit(0)
os.wait()
time.sleep(600)
"""


@pytest.fixture
def tree() -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-I", "-S", "-c", TREE]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        yield process
        for pid in [*descendants(process.pid), process.pid]:
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("by_files", [True, False])
def test_orphan_in_its_own_session_counts(tree: subprocess.Popen, by_files: bool) -> None:
    if by_files and not os.path.exists("/proc/thread-self/children"):
        by_files = UseMeter(tree.pid).has_children_files
    meter = UseMeter(tree.pid, has_children_files=by_files)
    use = wait_until(lambda: (u := meter.look()).num_processes == 2 and u, "two processes")
    assert use.resident_bytes > 40 << 20
    assert descendants(tree.pid) != []


def test_sleeping_processes_want_no_processor(tree: subprocess.Popen) -> None:
    meter = UseMeter(tree.pid)
    meter.look()
    assert wait_until(lambda: not meter.look().wants_cpu, "sleep")


def test_processor_time_of_ended_processes_stays() -> None:
    source = "import os, time\nif os.fork() == 0:\n    while time.process_time() < 0.1: pass\n"
    source += "    os._exit(0)\nos.wait()\nprint('ended', flush=True)\ntime.sleep(600)"
    command = [sys.executable, "-I", "-S", "-c", source]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ended\n"
        use = UseMeter(process.pid).look()
        process.kill()
    assert use.num_processes == 1
    assert use.cpu_seconds >= 0.08


def test_thread_that_runs_wants_a_processor_between_two_ticks() -> None:
    source = "import threading\ndef spin():\n    while True: pass\n"
    source += "threading.Thread(target=spin).start()\nprint('runs', flush=True)"
    command = [sys.executable, "-I", "-S", "-c", source]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"runs\n"
        meter = UseMeter(process.pid)
        wait_until(lambda: meter.look().wants_cpu, "the thread")
        # Processor time is told in steps of a hundredth of a second; these looks take less.
        looks = [meter.look() for _ in range(50)]
        process.kill()
    told = [use.cpu_seconds for use in looks]
    assert any(one == other for one, other in pairwise(told))
    assert sum(use.wants_cpu for use in looks) > 40


def test_process_that_is_gone_uses_nothing() -> None:
    process = subprocess.Popen(["/bin/true"])
    process.wait()
    use = UseMeter(process.pid).look()
    assert (use.num_processes, use.resident_bytes, use.wants_cpu) == (0, 0, False)
