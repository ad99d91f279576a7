"""Identify a process across machines that share a file system, and check whether it runs.

A pid is not unique: it is reused, and every container counts from 1. A process is therefore
identified by its host, boot id, pid namespace, pid and start time; whether it runs can be
determined only from the same host, boot and namespace.
"""

import os
import socket
from pathlib import Path

import msgspec

_STATE, _START_TIME = 0, 19
"""Fields of /proc/PID/stat, counted after the command's name in parentheses."""


class Process(msgspec.Struct, frozen=True):
    """A process that may run on another machine."""

    host: str
    kernel: str
    """Boot id and pid namespace; empty if the kernel does not report them."""
    pid: int
    started_ticks: int
    """Start time in clock ticks since boot; distinguishes a process from a later one with the same
    pid."""

    def is_local_to(self, other: "Process") -> bool:
        """Return whether both share a pid space, so that each can see whether the other runs."""
        return bool(self.kernel) and (self.host, self.kernel) == (other.host, other.kernel)

    def is_running(self) -> bool:
        """Return whether it runs; only meaningful for a process that is local to this one."""
        try:
            fields = _stat_fields(self.pid)
        except (FileNotFoundError, ProcessLookupError):
            return _is_hidden(self.pid)
        return fields[_STATE] not in "ZX" and int(fields[_START_TIME]) == self.started_ticks


def this_process() -> Process:
    """Return the calling process."""
    pid = os.getpid()
    return Process(socket.gethostname(), _kernel(), pid, int(_stat_fields(pid)[_START_TIME]))


def _stat_fields(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()


def _is_hidden(pid: int) -> bool:
    """Return whether the process exists although /proc, mounted with hidepid, hides it."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except ProcessLookupError:
        return False
    # It may be visible after all, but started after /proc was read: a reused pid.
    return False


def _kernel() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
