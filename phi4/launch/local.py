"""Run the workers of a run on this machine.

Manages their start, their output, and their end. The launcher never takes part in a collective and
never imports torch; it only watches processes, so it cannot hang in a collective. It chooses no
port: the workers meet in a fresh directory (PHI4_RENDEZVOUS), over loopback.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

from phi4.errors import REQUEUE_EXIT_CODE
from phi4.launch import reaper
from phi4.launch.notices import NOTICES, PassedOnNotice, StopPlan
from phi4.launch.worker import ErrorReport, read_reports

_POLL_SECONDS = 0.05

# The kernel closes a dying process's connections before its death is visible here, so a peer may
# report the broken connection first. A death without a report is dated back by this much; on a busy
# machine more may pass, but SIGKILL is never a consequence of a peer's failure.
_NOTICE_SECONDS = 0.25

_ENDED_BY_CTRL_C = (128 + signal.SIGINT, -signal.SIGINT)

_LOG_LINES = 20
_LOG_BYTES = 16_384


@dataclass
class _Worker:
    rank: int
    process: subprocess.Popen
    log: Path | None
    """None for rank 0, which inherits the launcher's output."""
    log_start: int
    died_at: float | None = None
    """Time of its failure; None while it runs, and for a rank that ended successfully."""

    @property
    def exit_code(self) -> int:
        code = self.process.returncode
        return code if code >= 0 else 128 - code

    @property
    def was_told(self) -> bool:
        """Whether it ended because of a notice."""
        return self.process.returncode == REQUEUE_EXIT_CODE


def run_workers(
    argv: Sequence[str],
    *,
    num_workers: int,
    work_dir: Path,
    env: Mapping[str, str] = MappingProxyType({}),
    grace_seconds: float = 5.0,
    stop: StopPlan | None = None,
    interactive: bool = False,
    command: Sequence[str] = (sys.executable, "-m", "phi4"),
) -> int:
    """Run `command argv` once per rank on this machine, until all end or the first one fails.

    Rank 0 writes to this process's stdout and stderr, rank N to `work_dir/logs/rank_N.log`
    (appended). When a rank fails, or SIGINT, SIGTERM or SIGHUP arrives, the others are told to stop
    (SIGHUP, or SIGINT after a signal), and after `grace_seconds` every process of the run is
    killed, grandchildren included; also if this process itself is killed. Main thread only.

    Workers that handle notices (`stop`) are started with SIGTERM and SIGUSR1 blocked, receive
    SIGTERM for either signal, and end with code 5, or with 0 if they were already finished.

    Args:
        argv: arguments of every worker.
        num_workers: world size, at least 1.
        work_dir: the run's directory.
        env: added to the workers' environment; the rank variables override it.
        grace_seconds: time for the others to record how the run ended.
        stop: what the workers do at a notice. None ends them at SIGTERM as at SIGINT.
        interactive: rank 0 reads this process's stdin and handles SIGINT itself: it is forwarded to
            rank 0, and ends the run only if rank 0 ends because of it.
        command: the program to run; a parameter for programs other than phi4.

    Returns:
        0; 5 if the ranks ended because of a notice; the exit code of the failing rank's
        `Phi4Error`, printed one line per broken rule; 1 for any other error, its traceback printed
        last; the exit code of a rank that gave no report; 128+S for a rank killed by signal S, and
        for a signal to the launcher (130 for Ctrl-C).
    """
    run_dir = Path(tempfile.mkdtemp(prefix="phi4-run-"))
    workers: list[_Worker] = []
    notice = None if stop is None else PassedOnNotice(stop)
    # Covers the shutdown too: another Ctrl-C must not leave processes alive.
    with _received_signals(workers if interactive else None, notice) as received:
        guard = _start_reaper(run_dir)
        try:
            for rank in range(num_workers):
                stdin = None if interactive and rank == 0 else subprocess.DEVNULL
                ranks = _rank_environment(rank, num_workers, run_dir)
                workers.append(_start([*command, *argv], rank, work_dir, {**env, **ranks}, stdin))
            if notice is not None:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, NOTICES)
            _watch(workers, received, notice)
            # SIGTERM may end a rank that had not yet reached `report_errors`.
            if interactive and workers[0].process.returncode in _ENDED_BY_CTRL_C:
                received.append(signal.SIGINT)
            _stop(workers, received, grace_seconds)
            reports = read_reports(run_dir)
        finally:
            reaper.sweep(str(run_dir))
            for worker in workers:
                worker.process.wait()
            guard.kill()
            guard.communicate()
            shutil.rmtree(run_dir, ignore_errors=True)
        return _conclude(workers, reports, received, takes_notices=notice is not None)


def _start_reaper(run_dir: Path) -> subprocess.Popen:
    command = [sys.executable, "-I", "-S", reaper.__file__, str(run_dir)]
    null = subprocess.DEVNULL
    # A session of its own: Ctrl-C in the terminal must not reach it.
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=null, stderr=null, start_new_session=True
    )


def _rank_environment(rank: int, num_workers: int, run_dir: Path) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_workers),
        "LOCAL_WORLD_SIZE": str(num_workers),
        "GLOO_SOCKET_IFNAME": "lo",
        "PHI4_ERROR_FILE": str(run_dir / f"rank_{rank}.json"),
        reaper.MARK: str(run_dir),
    }


def _start(
    command: Sequence[str], rank: int, work_dir: Path, env: Mapping[str, str], stdin: int | None
) -> _Worker:
    # Unbuffered, so that a killed rank's last lines are not lost; a crash prints its stack.
    defaults = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    environment = {**defaults, **os.environ, **env}
    start = partial(subprocess.Popen, command, env=environment, stdin=stdin, start_new_session=True)
    if rank == 0:
        return _Worker(rank, start(), None, 0)
    log = work_dir / "logs" / f"rank_{rank}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = start(stdout=output, stderr=subprocess.STDOUT)
        return _Worker(rank, process, log, output.tell())


@contextmanager
def _received_signals(
    workers: Sequence[_Worker] | None, notice: PassedOnNotice | None
) -> Iterator[list[int]]:
    """Yield termination signals as they arrive; ignored ones (nohup) stay ignored.

    Args:
        workers: SIGINT is forwarded to the first of these, once it exists, and is not recorded.
        notice: takes SIGTERM and SIGUSR1, which are blocked at first and as they were at the end,
            and SIGINT where its plan says so.
    """
    received: list[int] = []
    previous = {}

    def note(number: int, _: object) -> None:
        if number == signal.SIGINT and workers:
            workers[0].process.send_signal(number)
        elif notice is None or not notice.takes(number) or notice.arrived(number):
            received.append(number)

    notices = NOTICES if notice else frozenset()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, notices)
    for number in {signal.SIGINT, signal.SIGTERM, signal.SIGHUP} | notices:
        if signal.getsignal(number) is not signal.SIG_IGN:
            previous[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _watch(workers: Sequence[_Worker], received: list[int], notice: PassedOnNotice | None) -> None:
    """Wait until all ended as expected, one failed, or a signal came that ends the run."""
    while not received and (running := _running(workers)):
        ended = [worker for worker in workers if worker.died_at]
        if any(notice is None or not worker.was_told for worker in ended):
            return
        if notice is not None:
            if ended:
                notice.begin()
            if line := notice.pass_on([worker.process for worker in running]):
                _say(line)
            if (overdue := notice.overdue()) is not None:
                received.append(overdue)
        time.sleep(_POLL_SECONDS)


def _stop(workers: Sequence[_Worker], received: Sequence[int], grace_seconds: float) -> None:
    """Stop the running workers and wait for them; a second signal ends the wait."""
    # At SIGTERM a worker that handles notices would save.
    asked = signal.SIGINT if received else signal.SIGHUP
    told = _running(workers)
    for worker in told:
        worker.process.send_signal(asked)
    deadline = time.monotonic() + grace_seconds
    while _running(workers) and time.monotonic() < deadline and len(received) < 2:
        time.sleep(_POLL_SECONDS)
    for worker in told:
        if worker.process.returncode in (-asked, 128 + asked):
            worker.died_at = None


def _running(workers: Sequence[_Worker]) -> list[_Worker]:
    """Return the workers that still run; record the time of failures."""
    running = []
    for worker in workers:
        code = worker.process.poll()
        if code is None:
            running.append(worker)
        elif code and worker.died_at is None:
            worker.died_at = time.time()
    return running


def _conclude(
    workers: Sequence[_Worker],
    reports: Sequence[ErrorReport],
    received: Sequence[int],
    *,
    takes_notices: bool = False,
) -> int:
    """Print why the run ended, with the failing rank's message last, and return the exit code."""
    if received:
        name = signal.Signals(received[0]).name
        _say(f"interrupted by {name}; all {len(workers)} workers are stopped")
        return 128 + received[0]
    told = [worker for worker in workers if takes_notices and worker.was_told]
    explained = {report.rank for report in reports} | {worker.rank for worker in told}
    silent = [w for w in workers if w.died_at and w.rank not in explained]
    first = min(silent, key=lambda worker: worker.died_at or 0.0, default=None)
    killed = [w for w in silent if w.process.returncode == -signal.SIGKILL]
    is_first = first and (not reports or (first.died_at or 0.0) - _NOTICE_SECONDS < reports[0].time)
    guilty_worker = killed[0] if killed else first if is_first else None
    if guilty_worker is not None:
        _say(_last_lines(guilty_worker, len(workers)))
        return guilty_worker.exit_code
    if not reports:
        return REQUEUE_EXIT_CODE if told else 0
    guilty = reports[0]
    if guilty.user_error:
        _say(guilty.text)
    else:
        _say(f"rank {guilty.rank} of {len(workers)} failed:\n{guilty.traceback.rstrip()}")
    return guilty.exit_code


def _last_lines(worker: _Worker, num_workers: int) -> str:
    """Return the last lines of a rank that died without a report, and how it died."""
    code = worker.process.returncode
    if code > 0:
        cause = f"exited with code {code} and left no report"
    else:
        cause = f"was killed by signal {-code} ({signal.Signals(-code).name})"
        if -code == signal.SIGKILL:
            cause += "; often the kernel, out of memory: see dmesg"
    line = f"rank {worker.rank} of {num_workers} {cause}"
    if worker.log is None:
        return line
    with worker.log.open("rb") as log:
        log.seek(max(worker.log_start, log.seek(0, os.SEEK_END) - _LOG_BYTES))
        tail = log.read().decode(errors="replace").splitlines()[-_LOG_LINES:]
    return "\n".join([*tail, f"{line} (its output: {worker.log})"])


def _say(text: str) -> None:
    # A killed progress bar leaves the cursor hidden.
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
    print(f"{show_cursor}{text}", file=sys.stderr, flush=True)
