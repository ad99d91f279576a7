"""The platform of the engine: CUDA over NCCL or CPU over gloo, chosen once, with the reason."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from phi4.engine.rendezvous import RENDEZVOUS_SECONDS, meet
from phi4.errors import PlatformError

COLLECTIVE_SECONDS = 1800
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Platform:
    """This process's device and its rank."""

    kind: Literal["cpu", "cuda"]
    device: torch.device
    rank: int
    world_size: int
    reason: str
    """Why this kind was chosen."""
    ranks_per_host: int = 1
    """Ranks on this rank's host, including itself: they share its memory."""
    store: dist.Store | None = None
    """Rendezvous store; a thread uses a clone of it. None for one process."""

    @property
    def is_writer(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def describe(self) -> str:
        """Return one line for the console."""
        backend = "NCCL" if self.kind == "cuda" else "gloo"
        processes = f"{self.world_size} process{'es' if self.world_size > 1 else ''}"
        return f"platform: {self.kind} over {backend}, {processes} ({self.reason})"


def choose_kind(asked: Literal["auto", "cpu", "cuda"]) -> tuple[Literal["cpu", "cuda"], str]:
    """Return the platform for `run.platform` and the reason.

    Raises:
        PlatformError: cuda was requested and torch finds no CUDA device.
    """
    if asked == "cpu":
        return "cpu", "run.platform=cpu"
    if torch.cuda.is_available():
        return "cuda", "run.platform=cuda" if asked == "cuda" else "a CUDA device is present"
    if asked == "cuda":
        raise PlatformError(
            "run.platform=cuda, but torch finds no CUDA device; "
            "install a CUDA build of torch and check nvidia-smi, or use run.platform=cpu"
        )
    return "cpu", "torch finds no CUDA device"


def connect(
    asked: Literal["auto", "cpu", "cuda"],
    *,
    rank: int = 0,
    local_rank: int = 0,
    world_size: int = 1,
    rendezvous: str = "",
    threads: int = 1,
    rendezvous_seconds: float = RENDEZVOUS_SECONDS,
    expected_hosts: Sequence[str] = (),
) -> Platform:
    """Join the other processes.

    Args:
        asked: `run.platform`.
        rank: index of this process among world_size.
        local_rank: index of this process on its machine; its CUDA device.
        world_size: number of processes.
        rendezvous: address of the rendezvous, see `phi4.engine.rendezvous.meet`; unused for one
            process.
        threads: CPU threads of this process.
        rendezvous_seconds: how long to wait for the others.
        expected_hosts: host of every rank, for messages about missing ones; empty if unknown.

    Raises:
        PlatformError: no such device, or other ranks did not join in time; lists them.

    Collectives: creates the default process group over all ranks.
    """
    kind, reason = choose_kind(asked)
    torch.set_num_threads(threads)
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise PlatformError(
                f"local rank {local_rank} has no CUDA device; this machine has "
                f"{torch.cuda.device_count()}; start at most that many processes on it"
            )
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
        if "://" not in rendezvous or os.environ.get("MASTER_ADDR") in _LOOPBACK:
            # All processes are on this machine; gloo would otherwise resolve the host name.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    meeting = meet(
        rendezvous, rank, world_size, seconds=rendezvous_seconds, expected_hosts=expected_hosts
    )
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        store=meeting.store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
        device_id=device if kind == "cuda" else None,
    )
    return Platform(kind, device, rank, world_size, reason, meeting.ranks_per_host, meeting.store)


def disconnect() -> None:
    """Leave the process groups. Collectives: none that wait for a broken rank."""
    if dist.is_initialized():
        dist.destroy_process_group()
