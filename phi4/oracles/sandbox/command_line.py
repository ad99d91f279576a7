"""The command line of bubblewrap, which defines what a program can access.

It can access /usr read-only, two small file systems in memory, its own process table and nothing
else. The limits are set inside, because a process limit set outside is shared by all sandboxes of
the same user, and has no effect for root.
"""

import math
from collections.abc import Mapping, Sequence

from phi4.oracles.sandbox.task import Limits, Task
from phi4.oracles.sandbox.tools import NOBODY, Tools

_PROLOGUE = (
    '[ -x "$2" ] || { echo "$2 is no program of the sandbox" >&2; exit 127; }; '
    'printf %s "$1"; shift; exec "$@"'
)
"""Runs inside, under the limits and the filter. Its output proves that the sandbox is set up: the
program cannot have printed anything before, nor run without it."""

_ENVIRONMENT = {
    "PATH": "/usr/bin",
    "HOME": "/tmp",
    "LC_ALL": "C.UTF-8",
    # Makes the iteration order of sets reproducible.
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONUTF8": "1",
}


def command_line(
    tools: Tools,
    task: Task,
    limits: Limits,
    nonce: str,
    file_fds: Mapping[str, int],
    status_fd: int,
    seccomp_fd: int,
) -> list[str]:
    """Return the arguments, from setpriv or bwrap on, to run a task.

    Args:
        tools: programs of this machine.
        task: task to run.
        limits: resource limits.
        nonce: printed on standard output once the sandbox is set up, just before the program
            starts.
        file_fds: an open file for each of `task.files`, at its beginning.
        status_fd: where bwrap reports the process id of the sandbox and the exit status.
        seccomp_fd: file with the filter.
    """
    line = []
    if tools.setpriv is not None:
        owner = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs"]
        line += [tools.setpriv, *owner, "--"]
    line += [tools.bwrap, *_walls(), *_files(task, limits, file_fds)]
    line += ["--json-status-fd", str(status_fd), "--seccomp", str(seccomp_fd), "--clearenv"]
    for name, value in _ENVIRONMENT.items():
        line += ["--setenv", name, value]
    line += ["--", "/usr/bin/prlimit", *_limits(limits), "--"]
    return [*line, "/bin/sh", "-c", _PROLOGUE, "sh", nonce, *task.command]


def _walls() -> list[str]:
    owner = ["--uid", str(NOBODY), "--gid", str(NOBODY), "--hostname", "sandbox"]
    spaces = ["--unshare-all", "--unshare-user", "--disable-userns", "--cap-drop", "ALL"]
    return [*spaces, *owner, "--die-with-parent", "--new-session"]


def _files(task: Task, limits: Limits, file_fds: Mapping[str, int]) -> list[str]:
    line = ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib64"):
        line += ["--symlink", f"usr/{name}", f"/{name}"]
    for path in task.read_only:
        line += ["--ro-bind", path, path]
    line += ["--proc", "/proc", "--dev", "/dev"]
    line += ["--size", str(limits.tmp_bytes // 2), "--perms", "1777", "--tmpfs", "/dev/shm"]
    line += ["--remount-ro", "/dev"]
    line += ["--size", str(limits.tmp_bytes), "--perms", "1777", "--tmpfs", "/tmp"]
    for name in task.files:
        line += ["--perms", "0555", "--ro-bind-data", str(file_fds[name]), f"/program/{name}"]
    return [*line, "--remount-ro", "/", "--chdir", "/tmp"]


def _limits(limits: Limits) -> Sequence[str]:
    # The supervisor counts all processes; the kernel's own limit is per process, in case it is
    # late.
    cpu = math.ceil(limits.cpu_seconds)
    space = "unlimited" if limits.address_space_bytes is None else str(limits.address_space_bytes)
    return (
        f"--cpu={cpu}:{cpu + 2}",
        f"--as={space}",
        f"--nproc={limits.num_tasks}",
        f"--fsize={limits.file_bytes}",
        f"--nofile={limits.num_open_files}",
        f"--stack={8 << 20}:{64 << 20}",
        "--core=0",
        "--memlock=0",
        "--msgqueue=0",
    )
