"""Error reports of a worker, and its immediate exit.

A failing rank exits at once, without unwinding the interpreter. Destructors of communicators wait
for other ranks, which wait for this one, so a normal exit could hang.
"""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from phi4.errors import HungError, Phi4Error, WorkerError, error_text
from phi4.launch.environment import started_by, worker_environment
from phi4.launch.notices import NOTICES

_STOP_SIGNALS = frozenset({signal.SIGHUP, signal.SIGTERM})


class ErrorReport(msgspec.Struct, frozen=True):
    """The error that one rank raised."""

    rank: int
    time: float
    """Time of the error in seconds since the epoch; the earliest of a run is the root cause."""
    type: str
    message: str
    traceback: str
    user_error: bool
    """A `Phi4Error`: its message alone is enough for the user."""
    exit_code: int
    """The error's exit code, see docs/faults.md; 1 for an error that is not a `Phi4Error`."""

    @property
    def text(self) -> str:
        return error_text(self.type, self.message)


class StoppedError(WorkerError):
    """This rank was told to stop: by the launcher, after another one failed, or by a SIGTERM."""

    def __init__(self, message: str, number: int = signal.SIGHUP) -> None:
        super().__init__(message)
        self.number = number


@contextmanager
def report_errors(
    environ: Mapping[str, str] = os.environ, *, takes_notices: bool = False
) -> Iterator[None]:
    """Report an exception of the block, then exit the process; wraps all of a worker's work.

    A worker of `phi4` writes PHI4_ERROR_FILE, from which the launcher prints the failing rank's
    report; one of torchrun or srun prints to stderr itself. A process that is not a worker raises
    as usual. No code outside the block runs after a failure, and no code in it may close
    connections before the error arrives here, or a peer that notices is blamed. Under `phi4`,
    SIGINT raises KeyboardInterrupt and SIGTERM raises `StoppedError` in the block. Main thread
    only.

    A `HungError` of another thread is also reported and ends the process, because the main thread
    is then blocked.
    """
    starter = started_by(environ)
    threading.excepthook = partial(_thread_failed, environ)
    if starter is None:
        yield
        return
    if starter == "phi4":
        # A launcher in the background may have been started with SIGINT ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in _STOP_SIGNALS - (NOTICES if takes_notices else set()):
            signal.signal(number, _stop)
    try:
        yield
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (None, 0):
            raise
        raised_at = time.time()
        for number in _STOP_SIGNALS | {signal.SIGINT}:
            signal.signal(number, signal.SIG_IGN)
        _leave(_reported(error, raised_at, environ))


def _thread_failed(environ: Mapping[str, str], failure: threading.ExceptHookArgs) -> None:
    if not isinstance(failure.exc_value, HungError):
        threading.__excepthook__(failure)
        return
    if started_by(environ) is None:
        print(error_text("HungError", str(failure.exc_value)), file=sys.stderr)
        _leave(HungError.exit_code)
    _leave(_reported(failure.exc_value, time.time(), environ))


def read_reports(run_dir: Path) -> list[ErrorReport]:
    """Read reports of a run's ranks, earliest first."""
    decoder = msgspec.json.Decoder(ErrorReport)
    reports = [decoder.decode(path.read_bytes()) for path in run_dir.glob("rank_*.json")]
    return sorted(reports, key=lambda report: report.time)


def _reported(error: BaseException, raised_at: float, environ: Mapping[str, str]) -> int:
    """Report the error to the launcher or stderr; return the exit code."""
    match error:
        case SystemExit(code=int(code)):
            return code
        case KeyboardInterrupt():
            return 128 + signal.SIGINT
        case StoppedError(number=number):
            return 128 + number
    assert error.__traceback__ is not None
    below_this_module = error.__traceback__.tb_next
    report = ErrorReport(
        rank=worker_environment(environ).rank,
        time=raised_at,
        type=type(error).__name__,
        message=str(error),
        traceback="".join(traceback.format_exception(type(error), error, below_this_module)),
        user_error=isinstance(error, Phi4Error),
        exit_code=error.exit_code if isinstance(error, Phi4Error) else 1,
    )
    destination = environ.get("PHI4_ERROR_FILE")
    if destination:
        _write(Path(destination), report)
    # Rank 0 shares the launcher's terminal, where the failing rank's report should come last.
    if not destination or report.rank:
        text = report.text if report.user_error else report.traceback
        print(f"rank {report.rank}: {text}", file=sys.stderr)
    return report.exit_code


def _write(path: Path, report: ErrorReport) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(msgspec.json.encode(report))
    partial.replace(path)


def _stop(number: int, frame: Any) -> NoReturn:
    raise StoppedError(
        f"told to stop by {signal.Signals(number).name}, as another rank failed; see the "
        "launcher's output",
        number,
    )


def _leave(exit_code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(exit_code)
