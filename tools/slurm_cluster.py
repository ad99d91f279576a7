"""A private Slurm of two nodes on this machine, and what can happen to its nodes.

Everything is found by process id: daemons by the log that they hold open, for slurmstepd writes its
title over its environment; the ranks of a job by the names of cluster and node in theirs.
"""

import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TOOLS = Path(__file__).parent
_START_SECONDS = 300
_CALL_SECONDS = 120


class SlurmCluster:
    """A running cluster; `SLURM_CONF` of this process names it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        text = (directory / "slurm.conf").read_text()
        self.name = text.partition("ClusterName=")[2].partition("\n")[0]

    def call(self, *words: str) -> str:
        """Output of a Slurm command; every one has a time limit, for some wait for ever."""
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=_CALL_SECONDS, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def ranks_on(self, node: str) -> list[int]:
        """Processes of jobs on a node: the batch script, what it started, and the ranks."""
        wanted = {f"SLURM_CLUSTER_NAME={self.name}", f"SLURMD_NODENAME={node}"}
        return [pid for pid in _pids() if wanted <= _environment(pid)]

    def daemons_of(self, node: str) -> list[int]:
        """Return the node's slurmd and the slurmstepd of its jobs."""
        log = str(self.directory / "log" / f"slurmd.{node}.")
        return [pid for pid in _pids() if any(name.startswith(log) for name in _open_files(pid))]

    def send(self, node: str, number: signal.Signals) -> None:
        """A signal to everything on a node: SIGKILL, and it is lost; SIGSTOP, and it is silent."""
        for pid in (*self.daemons_of(node), *self.ranks_on(node)):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def members(self) -> list[int]:
        """Return every process of the cluster."""
        logs, name = str(self.directory / "log"), f"SLURM_CLUSTER_NAME={self.name}"
        return [
            pid
            for pid in _pids()
            if name in _environment(pid) or any(f.startswith(logs) for f in _open_files(pid))
        ]

    @contextmanager
    def kill_wait(self, seconds: int) -> Iterator[None]:
        """Another KillWait for the time of the block."""
        path = self.directory / "slurm.conf"
        before = path.read_text()
        try:
            path.write_text(re.sub(r"(?m)^KillWait=.*$", f"KillWait={seconds}", before))
            self.call("scontrol", "reconfigure")
            yield
        finally:
            path.write_text(before)
            self.call("scontrol", "reconfigure")

    def restart(self, node: str) -> None:
        """Start a lost node's slurmd again."""
        log = (self.directory / "log" / f"slurmd.{node}.out").open("ab")
        with log:
            process = subprocess.Popen(
                ["slurmd", "-D", "-N", node, "-f", str(self.directory / "slurm.conf")],
                env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        (self.directory / "pids" / node).write_text(f"{process.pid}\n")


@contextmanager
def slurm_cluster(
    directory: Path,
    *,
    grace_seconds: int = 20,
    kill_wait_seconds: int = 10,
    slurmd_timeout: int = 10,
) -> Iterator[SlurmCluster]:
    """A cluster for the time of the block; nothing of it is left afterwards.

    Args:
        directory: takes its files, not yet there; its path must be short, for sockets are in it.
        grace_seconds: between the notice of a preemption and the kill.
        kill_wait_seconds: between SIGTERM and SIGKILL otherwise; slurmd waits 5 at least.
        slurmd_timeout: after which a node that does not answer is lost; the default of Slurm is
            300.

    Raises:
        RuntimeError: it did not come up; says why.
    """
    before = os.environ.get("SLURM_CONF")
    options = {
        "GRACE": str(grace_seconds),
        "KILL_WAIT": str(kill_wait_seconds),
        "SLURMD_TIMEOUT": str(slurmd_timeout),
        "BASE_PORT": str(_free_ports(3)),
        "OWNER": str(os.getpid()),
    }
    try:
        up = subprocess.run(
            [TOOLS / "slurm_up.sh", directory, "2"],
            env={**os.environ, **options},
            capture_output=True,
            text=True,
            timeout=_START_SECONDS,
            check=False,
        )
        if up.returncode:
            raise RuntimeError(f"no Slurm: {up.stdout}{up.stderr}")
        os.environ["SLURM_CONF"] = str(directory / "slurm.conf")
        yield SlurmCluster(directory)
    finally:
        subprocess.run([TOOLS / "slurm_down.sh", directory], timeout=_START_SECONDS, check=False)
        os.environ.pop("SLURM_CONF", None)
        if before is not None:
            os.environ["SLURM_CONF"] = before


def _free_ports(count: int) -> int:
    """First of several neighbouring ports that are free now."""
    for base in range(17_000, 30_000, 100):
        with suppress(OSError):
            for port in range(base, base + count):
                with socket.create_server(("127.0.0.1", port)):
                    pass
            return base
    raise RuntimeError("no free ports from 17000 to 30000")


def _pids() -> list[int]:
    return [int(process.name) for process in Path("/proc").iterdir() if process.name.isdecimal()]


def _environment(pid: int) -> set[str]:
    with suppress(OSError):
        return set(Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0"))
    return set()


def _open_files(pid: int) -> list[str]:
    names = []
    with suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                names.append(os.readlink(descriptor))
    return names
