"""How runs end, and that a sandbox that cannot start is never the program's fault."""

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from phi4.errors import PlatformError
from phi4.oracles.sandbox import Ended, Limits, Outcome, Task, Tools, find_tools, run
from phi4.oracles.sandbox.hostile import ATTACKS, is_held, run_attack
from phi4.oracles.sandbox.languages import PYTHON
from phi4.oracles.sandbox.process_use import Use, UseMeter, descendants
from tests.support.waiting import wait_until

QUICK = Limits(cpu_seconds=2.0, idle_seconds=5.0)


def python(source: str, stdin: bytes = b"") -> Task:
    return Task((*PYTHON, "/program/main.py"), {"main.py": source.encode()}, stdin)


def shell(line: str, **rest: object) -> Task:
    """Costs less than an interpreter."""
    return Task(("/bin/sh", "-c", line), **rest)


def test_program_reads_its_input_and_ends(tools: Tools) -> None:
    task = python("import sys\nprint(sys.stdin.read()[::-1], end='')\nsys.exit(7)", b"abc")
    ended = run(task, QUICK, tools)
    assert (ended.outcome, ended.exit_status, ended.stdout) == (Outcome.FINISHED, 7, b"cba")
    assert not ended.says_nothing


def test_files_are_there_executable_and_cannot_be_changed(tools: Tools) -> None:
    line = "/program/tool; echo x >/program/tool; rm /program/tool; echo x >>/dev/stdin; cat"
    ended = run(shell(line, files={"tool": b"#!/bin/sh\necho hi\n"}, stdin=b"in"), QUICK, tools)
    assert ended.stdout == b"hi\nin"
    assert ended.stderr.count(b"\n") == 3


@pytest.mark.parametrize("status", [1, 127, 152 - 128])
def test_exit_status_is_the_programs(tools: Tools, status: int) -> None:
    ended = run(shell(f"echo bwrap: no >&2; exit {status}"), QUICK, tools)
    assert (ended.outcome, ended.exit_status) == (Outcome.FINISHED, status)


def test_signal_is_named(tools: Tools) -> None:
    ended = run(shell("kill -SEGV $$"), QUICK, tools)
    assert ended.outcome is Outcome.KILLED
    assert "SIGSEGV" in ended.reason


def test_processor_time_limit_of_the_kernel_is_a_timeout(tools: Tools) -> None:
    # The supervisor may look too late; the kernel is exact.
    ended = run(shell("kill -XCPU $$"), QUICK, tools)
    assert ended.outcome is Outcome.TIMEOUT


def test_output_stays_within_its_limit(tools: Tools) -> None:
    limits = replace(QUICK, output_bytes=1000)
    ended = run(shell("printf '%01000d' 0"), limits, tools)
    assert (ended.outcome, len(ended.stdout)) == (Outcome.FINISHED, 1000)
    ended = run(shell("printf '%0600d' 0; printf '%0401d' 0 >&2"), limits, tools)
    assert ended.outcome is Outcome.KILLED


@pytest.mark.parametrize(
    ("wants_cpu", "outcome"), [(True, Outcome.UNDECIDED), (False, Outcome.TIMEOUT)]
)
def test_waiting_for_a_processor_is_not_idle(
    tools: Tools, monkeypatch: pytest.MonkeyPatch, wants_cpu: bool, outcome: Outcome
) -> None:
    # A machine so busy that the program gets no time at all.
    monkeypatch.setattr(UseMeter, "look", lambda self: Use(2, 0, 0.0, wants_cpu))
    ended = run(shell("sleep 600"), Limits(idle_seconds=0.2, wall_seconds=0.6), tools)
    assert ended.outcome is outcome
    assert ended.says_nothing == (outcome is Outcome.UNDECIDED)


def test_reader_that_is_late_makes_nobody_idle(tools: Tools) -> None:
    # 300 kB do not fit into a pipe: the program waits, for us.
    ended = run(shell("head -c 300000 /dev/zero"), Limits(idle_seconds=5.0), tools)
    assert (ended.outcome, len(ended.stdout)) == (Outcome.FINISHED, 300000)


def fake(folder: Path, name: str, lines: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("echo bwrap: Creating new namespace failed: EAGAIN >&2; exit 1", "EAGAIN"),
        ("exit 0", "status 0"),
        ("echo 0123456789abcdef0123456789abcdef; exit 0", "status 0"),
        ("kill -KILL $$", "status -9"),
        ("echo 'bwrap: prctl(PR_SET_SECCOMP): EINVAL' >&2; exit 1", "SECCOMP"),
    ],
)
def test_sandbox_that_cannot_start_says_so(
    tools: Tools, tmp_path: Path, lines: str, reason: str
) -> None:
    broken = replace(tools, bwrap=fake(tmp_path, "bwrap", lines), setpriv=None)
    ended = run(shell("exit 0"), QUICK, broken)
    assert ended.outcome is Outcome.NOT_STARTED
    assert reason in ended.reason
    assert ended.says_nothing


def test_missing_tools_start_nothing(tools: Tools) -> None:
    for broken in (replace(tools, bwrap="/no/bwrap", setpriv=None),):
        assert run(shell("exit 0"), QUICK, broken).outcome is Outcome.NOT_STARTED
    assert run(shell("exit 0"), QUICK, replace(tools, setpriv="/no/setpriv")).outcome is (
        Outcome.NOT_STARTED
    )


def test_missing_interpreter_is_no_failure_of_the_program(tools: Tools) -> None:
    ended = run(Task(("/usr/bin/no-such-program", "x")), QUICK, tools)
    assert ended.outcome is Outcome.NOT_STARTED
    assert "/usr/bin/no-such-program" in ended.reason


def test_filter_that_the_kernel_refuses_starts_nothing(
    tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "phi4.oracles.sandbox.supervisor.filter_program"
    monkeypatch.setattr(module, lambda machine: b"\xff" * 8)
    assert run(shell("exit 0"), QUICK, tools).outcome is Outcome.NOT_STARTED


def test_refused_namespaces_start_nothing(tools: Tools) -> None:
    # A sandbox inside the sandbox: the outer one refuses what the inner one needs.
    line = "/usr/bin/bwrap --unshare-all --ro-bind / / true || { echo refused; exit 0; }"
    if not tools.bwrap.startswith("/usr/bin/"):
        line = line.replace("/usr/bin/bwrap", tools.bwrap)
    assert run(shell(line), QUICK, tools).stdout == b"refused\n"


def test_absent_programs_are_named_with_their_package(tmp_path: Path) -> None:
    with pytest.raises(PlatformError, match="install bubblewrap"):
        find_tools(str(tmp_path))
    fake(tmp_path, "bwrap", "echo bubblewrap 0.0")
    with pytest.raises(PlatformError, match="install util-linux"):
        find_tools(str(tmp_path))


def test_root_without_setpriv_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    for name in ("bwrap", "prlimit"):
        fake(tmp_path, name, "echo bubblewrap 0.0")
    with pytest.raises(PlatformError, match="setpriv"):
        find_tools(str(tmp_path))


def test_eight_at_once_are_as_alone(tools: Tools) -> None:
    names = ("fork_bomb", "memory_of_many", "fill_disks", "survive")
    chosen = [attack for attack in ATTACKS if attack.name in names]
    gate = threading.Barrier(8)

    def attacked(attack: object) -> bool:
        gate.wait()
        return is_held(attack, run_attack(attack, tools))

    def honest(number: int) -> Sequence[bytes]:
        gate.wait()
        # Twelve processes of the sixteen, while the others use all of theirs.
        line = f"for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 0.2 & done; wait; echo {number}"
        return run(shell(line), QUICK, tools).stdout

    with ThreadPoolExecutor(8) as pool:
        held = [pool.submit(attacked, attack) for attack in chosen]
        told = [pool.submit(honest, number) for number in range(4)]
        assert [one.result() for one in held] == [True] * 4
        assert [one.result() for one in told] == [b"0\n", b"1\n", b"2\n", b"3\n"]


def test_sandbox_that_somebody_else_ends_says_nothing(
    tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(self: UseMeter) -> Use:
        [outer] = [pid for pid in descendants(os.getpid()) if self.first_pid in descendants(pid)]
        os.kill(outer, signal.SIGKILL)
        return Use(2, 0, 0.0, True)

    monkeypatch.setattr(UseMeter, "look", look)
    ended = run(shell("sleep 600"), QUICK, tools)
    assert ended.outcome is Outcome.UNDECIDED
    assert "from outside" in ended.reason


def test_interrupted_run_leaves_nothing(tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def look(self: UseMeter) -> Use:
        seen.append(os.pidfd_open(self.first_pid))
        raise KeyboardInterrupt

    monkeypatch.setattr(UseMeter, "look", look)
    with pytest.raises(KeyboardInterrupt):
        run(shell("sleep 600"), QUICK, tools)
    [first] = seen
    assert wait_until(lambda: select.select([first], [], [], 0)[0], "the end of the sandbox")
    os.close(first)


ADOPTS = """
import ctypes, os
from phi4.oracles.sandbox import Limits, Task, find_tools, run
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
tools = find_tools()
for line in ("exit 0", "sleep 600 & exit 0", "sleep 600"):
    print(run(Task(("/bin/sh", "-c", line)), Limits(idle_seconds=0.2), tools).outcome)
try:
    print(os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT))
except ChildProcessError:
    print("none left")
"""


def test_first_process_of_a_container_gets_no_zombies(tools: Tools) -> None:
    code = f"import sys; sys.path[:] = {sys.path!r}\n{ADOPTS}"
    printed = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert printed.split("\n") == ["finished", "finished", "timeout", "none left", ""]


def test_verdicts_are_plain_values() -> None:
    assert Ended(Outcome.NOT_STARTED).says_nothing
    assert not Ended(Outcome.TIMEOUT).says_nothing
