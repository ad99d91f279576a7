"""Determine which launcher started this process, and its rank.

Supports three launch conventions (`phi4`'s own launcher, torchrun, srun). They are read once, into
a frozen value that is passed on; no other code reads these environment variables.
"""

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from phi4.errors import PlatformError
from phi4.rundir.launched_by import LaunchedBy

Starter = Literal["phi4", "torchrun", "slurm"]

# Slurm numbers steps that srun did not start (pending, extern, batch, interactive) from here on.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0

_SLURM_FACTS = {
    "job_id": "SLURM_JOB_ID",
    "job_name": "SLURM_JOB_NAME",
    "partition": "SLURM_JOB_PARTITION",
    "account": "SLURM_JOB_ACCOUNT",
    "cluster": "SLURM_CLUSTER_NAME",
    "nodelist": "SLURM_JOB_NODELIST",
    "num_nodes": "SLURM_JOB_NUM_NODES",
    "array_job_id": "SLURM_ARRAY_JOB_ID",
    "array_task_id": "SLURM_ARRAY_TASK_ID",
    "restart_count": "SLURM_RESTART_COUNT",
}
"""Variables by which users look up a job."""

_NUM_PORTS = 4
"""Number of ports that rank 0 tries, because some may be in use."""

_RANGE = r"\d+(?:-\d+)?"
_HOSTS = rf"(?:[\w.-]|\[{_RANGE}(?:,{_RANGE})*\])+"
_NODE_LIST = rf"{_HOSTS}(?:,{_HOSTS})*"
_COUNT = r"\d+(?:\(x\d+\))?"
_TASKS = rf"{_COUNT}(?:,{_COUNT})*"


@dataclass(frozen=True)
class WorkerEnvironment:
    """A worker's rank, and where the workers rendezvous."""

    rank: int
    local_rank: int
    """Rank among the workers of this machine; selects its device."""
    world_size: int
    rendezvous: Literal["none", "directory", "env", "tcp"]
    """none: a single process. directory: rank 0 listens on a free loopback port and writes it
    there. env: torchrun's own store, by torch's `env://`. tcp: rank 0 listens on address."""
    address: str
    """Empty, a directory, `env://` or `tcp://host:port,port/run`: the run's name separates two runs
    that use the same ports."""
    job: str = ""
    """Slurm job id; empty outside Slurm."""
    attempt: int | None = None
    """The attempt whose lease on the run directory the launcher holds; None if it holds none."""
    hosts: tuple[str, ...] = ()
    """The host that each rank is expected on; empty if the launcher does not provide it."""


def started_by(environ: Mapping[str, str]) -> Starter | None:
    """Return which launcher started this process as one of several workers, or None."""
    if "PHI4_RENDEZVOUS" in environ:
        return "phi4"
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return "torchrun"
    if "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ:
        is_srun = _integer(environ, "SLURM_STEP_ID") < _FIRST_SPECIAL_STEP
        return "slurm" if is_srun and _slurm_tasks(environ) > 1 else None
    return None


def worker_environment(environ: Mapping[str, str]) -> WorkerEnvironment:
    """Return this process's rank and rendezvous under any of the launchers.

    Raises:
        PlatformError: a variable is missing, is not a number, or the rank is outside the world.
    """
    job = _slurm_job(environ)
    match started_by(environ):
        case "phi4":
            attempt = _integer(environ, "PHI4_ATTEMPT") if "PHI4_ATTEMPT" in environ else None
            address = environ["PHI4_RENDEZVOUS"]
            worker = WorkerEnvironment(
                *_torch_ranks(environ), "directory", address, job=job, attempt=attempt
            )
        case "torchrun":
            worker = WorkerEnvironment(*_torch_ranks(environ), "env", "env://", job)
        case "slurm":
            worker = WorkerEnvironment(
                _integer(environ, "SLURM_PROCID"),
                _integer(environ, "SLURM_LOCALID"),
                _slurm_tasks(environ),
                "tcp",
                _slurm_address(environ),
                job,
                hosts=_slurm_hosts(environ),
            )
        case None:
            worker = WorkerEnvironment(0, 0, 1, "none", "", job)
    if not 0 <= worker.rank < worker.world_size:
        raise PlatformError(
            f"rank {worker.rank} is outside the world of {worker.world_size} workers; the launch "
            "variables in the environment contradict each other, start from a clean shell"
        )
    return worker


def launched_by(environ: Mapping[str, str] = os.environ) -> LaunchedBy:
    """Return the Slurm job and the index of this machine in the run, as reported by the
    environment."""
    # srun numbers the machines of a step, torchrun calls them groups; phi4 starts ranks on one
    # machine.
    node = {"slurm": "SLURM_NODEID", "torchrun": "GROUP_RANK"}.get(started_by(environ) or "", "")
    local_rank = "SLURM_LOCALID" if started_by(environ) == "slurm" else "LOCAL_RANK"
    return LaunchedBy(
        {key: environ[name] for key, name in _SLURM_FACTS.items() if environ.get(name)},
        int(environ.get(node) or 0),
        int(environ.get(local_rank) or 0) if started_by(environ) else 0,
    )


def expand_nodelist(nodelist: str) -> list[str]:
    """Return the host names of a Slurm node list, in order: `n[1-2,05],m` gives n1, n2, n05, m.

    Raises:
        PlatformError: the text is not a node list.
    """
    if not re.fullmatch(_NODE_LIST, nodelist):
        raise PlatformError(
            f"Slurm node list {nodelist!r} is not of the form host[1-3,7],other; "
            "set MASTER_ADDR to the first host"
        )
    return [host for part in re.findall(_HOSTS, nodelist) for host in _expand(part)]


def _expand(part: str) -> list[str]:
    head, bracket, rest = part.partition("[")
    if not bracket:
        return [part]
    ranges, _, tail = rest.partition("]")
    numbers = [number for item in ranges.split(",") for number in _numbers(item)]
    return [head + number + end for number in numbers for end in _expand(tail)]


def _numbers(item: str) -> list[str]:
    first, _, last = item.partition("-")
    return [f"{n:0{len(first)}d}" for n in range(int(first), int(last or first) + 1)]


def _torch_ranks(environ: Mapping[str, str]) -> tuple[int, int, int]:
    rank, world_size = _integer(environ, "RANK"), _integer(environ, "WORLD_SIZE")
    return rank, _integer(environ, "LOCAL_RANK"), world_size


def _slurm_tasks(environ: Mapping[str, str]) -> int:
    # SLURM_NTASKS may still be the allocation's; the step's own count is reliable.
    in_step = "SLURM_STEP_NUM_TASKS" in environ
    return _integer(environ, "SLURM_STEP_NUM_TASKS" if in_step else "SLURM_NTASKS")


def _slurm_host(environ: Mapping[str, str]) -> str:
    if "MASTER_ADDR" in environ:
        return environ["MASTER_ADDR"]
    for key in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"):
        if key in environ:
            return expand_nodelist(environ[key])[0]
    raise PlatformError(
        "neither SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST is set; set MASTER_ADDR to the host of "
        "rank 0"
    )


def _slurm_hosts(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the host of every rank of the step; empty if Slurm does not fill nodes in order."""
    nodelist = environ.get("SLURM_STEP_NODELIST", "")
    counts = environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    is_block = environ.get("SLURM_DISTRIBUTION", "block").partition(":")[0] == "block"
    if not (is_block and re.fullmatch(_NODE_LIST, nodelist) and re.fullmatch(_TASKS, counts)):
        return ()
    tasks = [
        int(count)
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
        for _ in range(int(times or 1))
    ]
    nodes = expand_nodelist(nodelist)
    if len(nodes) != len(tasks) or sum(tasks) != _slurm_tasks(environ):
        return ()
    return tuple(node for node, count in zip(nodes, tasks, strict=True) for _ in range(count))


def _slurm_address(environ: Mapping[str, str]) -> str:
    """Return the address where the ranks of the step meet; all derive the same ports and name."""
    step = f"{_integer(environ, 'SLURM_JOB_ID')}.{_integer(environ, 'SLURM_STEP_ID')}"
    if "MASTER_PORT" in environ:
        ports = [_integer(environ, "MASTER_PORT")]
    else:
        # Below the range of ephemeral ports.
        ports = [
            10_000 + zlib.crc32(f"{step} {choice}".encode()) % 20_000
            for choice in range(_NUM_PORTS)
        ]
    return f"tcp://{_slurm_host(environ)}:{','.join(map(str, ports))}/{step}"


def _slurm_job(environ: Mapping[str, str]) -> str:
    """Return the id of the Slurm job, or of the task of an array; empty outside Slurm."""
    array, task = (environ.get(f"SLURM_ARRAY_{what}_ID") for what in ("JOB", "TASK"))
    # SLURM_JOB_ID of one of the tasks is the id of the entire array.
    return f"{array}_{task}" if array and task else environ.get("SLURM_JOB_ID", "")


def _integer(environ: Mapping[str, str], key: str) -> int:
    text = environ.get(key)
    if text is None or not text.isdecimal():
        got = "is not set" if text is None else f"is {text!r}, not an integer"
        raise PlatformError(
            f"{key} {got}; start the workers through phi4 train, torchrun or srun, which set it"
        )
    return int(text)
