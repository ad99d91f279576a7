"""Start a sandbox, watch it from outside, and leave nothing of it behind.

The outcome of a run is what was observed from outside. That a sandbox was set up is reported by its
own prologue, on standard output, before the program exists; that a program ended is reported by
bubblewrap on a descriptor that the program does not have. The program's output decides nothing
here.
"""

import fcntl
import os
import re
import secrets
import select
import selectors
import signal
import subprocess
import time
from contextlib import ExitStack, suppress

from phi4.oracles.sandbox.command_line import command_line
from phi4.oracles.sandbox.process_use import Use, UseMeter, descendants
from phi4.oracles.sandbox.seccomp import filter_program
from phi4.oracles.sandbox.task import Ended, Limits, Outcome, Task
from phi4.oracles.sandbox.tools import Tools

_LOOK_SECONDS = 0.05
_CHUNK_BYTES = 1 << 16
_DEATH_SECONDS = 120
"""Time for the kernel to end killed processes."""
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


def run(task: Task, limits: Limits, tools: Tools) -> Ended:
    """Run a task to its end; returns when none of its processes is left.

    Any failure of the program or the machine is returned as an `Ended`, never raised. The calling
    thread must stay alive meanwhile: the sandbox dies with it.
    """
    nonce = secrets.token_hex(16)
    with ExitStack() as opened:
        try:
            watch = _start(task, limits, tools, nonce, opened)
        except OSError as error:
            return Ended(Outcome.NOT_STARTED, f"the sandbox cannot be started: {error}")
        return watch.until_end()


def _start(
    task: Task, limits: Limits, tools: Tools, nonce: str, opened: ExitStack
) -> "_SandboxWatch":
    with ExitStack() as given:
        file_fds = {name: _sealed(content, given) for name, content in task.files.items()}
        seccomp_fd = _sealed(filter_program(tools.machine), given)
        status_out, status_in = os.pipe()
        opened.callback(os.close, status_out)
        given.callback(os.close, status_in)
        process = subprocess.Popen(
            command_line(tools, task, limits, nonce, file_fds, status_in, seccomp_fd),
            stdin=_sealed(task.stdin, given),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # bwrap's own environment is visible in /proc/1/environ of the sandbox, whatever it
            # clears.
            env={},
            cwd="/",
            pass_fds=(status_in, seccomp_fd, *file_fds.values()),
            start_new_session=True,
        )
    opened.enter_context(process)
    # Before it is waited for, in any case.
    opened.callback(process.kill)
    return _SandboxWatch(process, status_out, nonce, limits, opened)


def _sealed(content: bytes, opened: ExitStack) -> int:
    """Return a descriptor of a sealed file in memory, at its beginning, that cannot be written or
    enlarged."""
    fd = os.memfd_create("phi4", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    opened.callback(os.close, fd)
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(fd, 0, os.SEEK_SET)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return fd


class _SandboxWatch:
    """One running sandbox.

    Args:
        process: bwrap, started through setpriv.
        status_fd: descriptor of bwrap's reports.
        nonce: output of the prologue.
        limits: limits of the task.
        opened: closes descriptors after the run.
    """

    def __init__(
        self,
        process: subprocess.Popen,
        status_fd: int,
        nonce: str,
        limits: Limits,
        opened: ExitStack,
    ) -> None:
        self._process = process
        self._nonce = nonce.encode()
        self._limits = limits
        self._opened = opened
        assert process.stdout is not None and process.stderr is not None
        self._read = {process.stdout.fileno(): b"", process.stderr.fileno(): b"", status_fd: b""}
        self._out, self._err, self._status = self._read
        self._selector = opened.enter_context(selectors.DefaultSelector())
        for fd in self._read:
            os.set_blocking(fd, False)
            self._selector.register(fd, selectors.EVENT_READ)
        self._process_fd = os.pidfd_open(process.pid)
        opened.callback(os.close, self._process_fd)
        self._selector.register(self._process_fd, selectors.EVENT_READ)
        self._first_fd: int | None = None
        self._meter: UseMeter | None = None
        self._last_use = Use(0, 0, 0.0, False)
        self._peak_bytes = 0
        self._idle_seconds = 0.0

    def until_end(self) -> Ended:
        """Watch until the program ends or must be ended, then end all of its processes."""
        cut = self._follow()
        if not self._end_all():
            cut = (Outcome.UNDECIDED, "the kernel does not end its processes")
        for fd in tuple(self._read):
            while self._receive(fd):
                pass
        return self._ended(cut or self._too_long())

    def _follow(self) -> tuple[Outcome, str] | None:
        """Return why the run must be cut; None if the program ended by itself."""
        begun = last = time.monotonic()
        heard = False
        while True:
            ready = [key.fd for key, _ in self._selector.select(_LOOK_SECONDS)]
            # A program that waited for us to read was not idle.
            heard |= any([self._receive(fd) for fd in ready if fd != self._process_fd])
            self._find_first_process()
            if self._process_fd in ready:
                return None
            if cut := self._too_long():
                return cut
            now = time.monotonic()
            if now - last >= _LOOK_SECONDS:
                # After a late measurement, the program may have waited only for us.
                if cut := self._look(min(now - last, 2 * _LOOK_SECONDS), heard):
                    return cut
                last, heard = now, False
            if now - begun >= self._limits.wall_seconds:
                return Outcome.UNDECIDED, (
                    f"{self._last_use.cpu_seconds:.1f} s of processor time in {now - begun:.0f} s: "
                    "too little to decide; reduce the machine's load, or the number of workers"
                )

    def _receive(self, fd: int) -> bool:
        """Read available data; return False at its end, and if there is none."""
        try:
            data = os.read(fd, _CHUNK_BYTES)
        except BlockingIOError:
            return False
        if not data:
            with suppress(KeyError):
                self._selector.unregister(fd)
            return False
        if self._num_output_bytes() <= self._limits.output_bytes:
            self._read[fd] += data
        return True

    def _num_output_bytes(self) -> int:
        return len(self._read[self._out]) + len(self._read[self._err]) - len(self._nonce)

    def _too_long(self) -> tuple[Outcome, str] | None:
        limit = self._limits.output_bytes
        if self._num_output_bytes() > limit:
            return Outcome.KILLED, f"wrote more than {limit} bytes of output"
        return None

    def _told(self, name: str) -> int | None:
        """Return a number that bwrap reported."""
        found = re.search(rf'"{name}": *(\d+)'.encode(), self._read[self._status])
        return int(found[1]) if found else None

    def _find_first_process(self) -> None:
        pid = self._told("child-pid")
        if self._first_fd is None and pid is not None:
            with suppress(ProcessLookupError):
                self._first_fd = os.pidfd_open(pid)
                self._opened.callback(os.close, self._first_fd)
                self._meter = UseMeter(pid)

    def _look(self, passed_seconds: float, heard: bool) -> tuple[Outcome, str] | None:
        if self._meter is None or not self._stands():
            return None
        use = self._last_use = self._meter.look()
        self._peak_bytes = max(self._peak_bytes, use.resident_bytes)
        if not (use.wants_cpu or heard):
            self._idle_seconds += passed_seconds
        limits = self._limits
        if use.resident_bytes > limits.memory_bytes:
            return Outcome.KILLED, f"used more than {limits.memory_bytes >> 20} MiB of memory"
        if use.cpu_seconds >= limits.cpu_seconds:
            return Outcome.TIMEOUT, f"used {limits.cpu_seconds:g} s of processor time"
        if self._idle_seconds >= limits.idle_seconds:
            return Outcome.TIMEOUT, f"waited {limits.idle_seconds:g} s without computing"
        return None

    def _stands(self) -> bool:
        return self._read[self._out].startswith(self._nonce)

    def _end_all(self) -> bool:
        """Kill all processes; return whether they are gone."""
        gone = True
        if self._first_fd is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._first_fd, signal.SIGKILL)
            # The first process of a namespace ends when all others have ended.
            gone = _has_ended(self._first_fd)
        else:
            for pid in descendants(self._process.pid):
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        if self._first_fd is not None:
            # If this process adopts orphans, as the first one of a container does, it must reap
            # that one.
            with suppress(ChildProcessError):
                os.waitid(os.P_PIDFD, self._first_fd, os.WEXITED | os.WNOHANG)
        return gone

    def _ended(self, cut: tuple[Outcome, str] | None) -> Ended:
        outcome, reason = cut or self._own_end()
        finished = outcome is Outcome.FINISHED
        limit = self._limits.output_bytes
        return Ended(
            outcome,
            reason,
            exit_status=self._told("exit-code") if finished else None,
            stdout=self._read[self._out].removeprefix(self._nonce)[:limit],
            stderr=self._read[self._err][:limit],
            cpu_seconds=self._last_use.cpu_seconds,
            peak_bytes=self._peak_bytes,
        )

    def _own_end(self) -> tuple[Outcome, str]:
        """Return how it ended by itself."""
        status = self._told("exit-code")
        if not self._stands():
            lines = self._read[self._err].decode(errors="replace").split("\n")
            said = next((line.strip() for line in reversed(lines) if line.strip()), "")
            code = self._process.returncode if status is None else status
            return Outcome.NOT_STARTED, said[:300] or f"bwrap ended with status {code}"
        if status is None:
            return Outcome.UNDECIDED, f"bwrap was ended from outside ({self._process.returncode})"
        if status == 128 + signal.SIGXCPU:
            return Outcome.TIMEOUT, f"used {self._limits.cpu_seconds:g} s of processor time"
        if status - 128 in set(signal.Signals):
            name = signal.Signals(status - 128).name
            return Outcome.KILLED, f"ended by {name} (exit status {status})"
        return Outcome.FINISHED, ""


def _has_ended(process_fd: int) -> bool:
    poll = select.poll()
    poll.register(process_fd, select.POLLIN)
    return bool(poll.poll(_DEATH_SECONDS * 1000))
