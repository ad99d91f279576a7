"""Run a sweep on this machine: child processes of `phi4 train`, a limited number at a time.

Each run is a process, started with the same command that a user would type, so a run that fails,
hangs or is killed does not affect the others. A watcher (`phi4.launch.reaper`) ends the children
when this process is killed, so the same command can be repeated at once.
"""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from phi4.config import dump_toml
from phi4.errors import REQUEUE_EXIT_CODE, DivergedError
from phi4.launch import reaper
from phi4.launch.sweep.progress import note
from phi4.launch.sweep.runs import SweepRun

MARK = "PHI4_SWEEP"
"""Environment variable of all processes of a sweep."""
_POLL_SECONDS = 0.1
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_GRACE_SECONDS = 10.0
"""Time to stop after a Ctrl-C, and in addition to reliability.stop_seconds after a SIGTERM."""

_REST_SECONDS = 30.0
"""Grace time at the end of a sweep for processes that outlive their run."""

Say = Callable[[str], None]


@dataclass
class _Child:
    run: SweepRun
    process: subprocess.Popen
    log: Path
    since: float


def run_here(
    runs: Sequence[SweepRun],
    directory: Path,
    *,
    jobs: int,
    say: Say,
    command: Sequence[str] = (sys.executable, "-m", "phi4"),
) -> int:
    """Run all of them, `jobs` at a time; a failing run does not stop the others. Main thread only.

    SIGINT ends all children; SIGTERM and SIGHUP let them save their step first; a second signal
    kills them. No process of the sweep is left behind, even if this one is killed.

    Args:
        runs: runs in the order of execution.
        directory: directory of the sweep.
        jobs: number of concurrent children.
        say: prints a line for the user.
        command: what `train RECIPE` is appended to; a parameter for tests.

    Returns:
        0; 1 when a run failed, not counting those that diverged; after a signal 128 + S, or 5 after
        SIGTERM: the same command continues the sweep.
    """
    mark = uuid.uuid4().hex
    waiting = deque(runs)
    children: list[_Child] = []
    num_ended, num_failed = 0, 0
    with _received() as received, _watched(mark):
        while (waiting and not received) or children:
            while waiting and not received and len(children) < jobs:
                children.append(_started(waiting.popleft(), directory, command, mark))
            if received:
                _stop(children, received)
            for child in [child for child in children if child.process.poll() is not None]:
                children.remove(child)
                code = _exit_code(child)
                note(directory, child.run.name, child.process.pid, code)
                num_ended += 1
                num_failed += code not in (0, DivergedError.exit_code)
                say(f"[{num_ended}/{len(runs)}] {_told(child, code)}")
            time.sleep(_POLL_SECONDS)
        if not received:
            _await_rest(mark)
    if not received:
        return 1 if num_failed else 0
    say(f"{signal.Signals(received[0]).name}: all runs are stopped; repeat the command to continue")
    return REQUEUE_EXIT_CODE if received[0] == signal.SIGTERM else 128 + received[0]


def _started(run: SweepRun, directory: Path, command: Sequence[str], mark: str) -> _Child:
    recipe = directory / "recipes" / f"{run.name}.toml"
    log = directory / "logs" / f"{run.name}.log"
    for path in (recipe, log):
        path.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(dump_toml(run.recipe), encoding="utf-8")
    # Unbuffered, so that a killed run's last lines are not lost.
    defaults = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*command, "train", str(recipe)],
            env={**defaults, **os.environ, MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Ctrl-C in the terminal reaches this process alone, which forwards it.
            start_new_session=True,
        )
    note(directory, run.name, process.pid)
    return _Child(run, process, log, time.monotonic())


def _exit_code(child: _Child) -> int:
    code = child.process.returncode
    return code if code >= 0 else 128 - code


def _told(child: _Child, code: int) -> str:
    seconds = f"{time.monotonic() - child.since:.0f} s"
    name = child.run.name
    if code == 0:
        return f"{name} finished in {seconds}"
    if code == DivergedError.exit_code:
        return f"{name} diverged after {seconds}; it ranks last"
    if code == REQUEUE_EXIT_CODE:
        return f"{name} saved its step and stopped after {seconds}"
    return f"{name} failed with code {code} after {seconds}: {_last_line(child.log)}"


def _last_line(log: Path) -> str:
    """Return the last line of the run's output, and the path of the rest."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        lines = file.read().decode(errors="replace").split("\n")
    said = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    return f"{said[:200]} (see {log})"


def _stop(children: Sequence[_Child], received: list[int]) -> None:
    """Signal the children once, wait for them, and kill those that remain."""
    first = received[0]
    seconds = _GRACE_SECONDS
    if first != signal.SIGINT:
        seconds += max((c.run.recipe.reliability.stop_seconds for c in children), default=0.0)
    for child in children:
        child.process.send_signal(signal.SIGINT if first == signal.SIGINT else signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while len(received) < 2 and time.monotonic() < deadline:
        if all(child.process.poll() is not None for child in children):
            break
        time.sleep(_POLL_SECONDS)
    for child in children:
        child.process.kill()
        child.process.wait()


def _await_rest(mark: str) -> None:
    """Wait for processes that ended runs left behind, such as a tracker that is still sending."""
    deadline = time.monotonic() + _REST_SECONDS
    while reaper.processes_of(mark, MARK) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


@contextmanager
def _received() -> Iterator[list[int]]:
    """Yield termination signals as they arrive; ignored ones (nohup) stay ignored.

    The parent of this process may have blocked them, as `phi4 train` does; they are unblocked here
    and in the children.
    """
    received: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in _STOPS
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
    try:
        yield received
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _watched(mark: str) -> Iterator[None]:
    """Run a watcher next to this process, which leaves no process of the sweep behind."""
    null = subprocess.DEVNULL
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", reaper.__file__, mark, MARK],
        stdin=subprocess.PIPE,
        stdout=null,
        stderr=null,
        start_new_session=True,
    )
    try:
        yield
    finally:
        reaper.sweep(mark, name=MARK)
        guard.kill()
        guard.communicate()
