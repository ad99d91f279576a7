"""Run cases of different sizes one after the other on the same processes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch

from phi4.engine.platform import Platform, connect, disconnect
from phi4.verify.layouts import LayoutCase


def run_in_turn(
    cases: Sequence[LayoutCase],
    rank: int,
    run: Callable[[LayoutCase, Platform], None],
    *,
    kind: Literal["cpu", "cuda"],
    work_dir: Path,
) -> None:
    """Run the cases as this rank; ranks beyond a case's size skip it.

    Args:
        cases: the same on every rank.
        rank: rank of this process; on CUDA also its device.
        run: runs one case on this rank.
        kind: cpu or cuda.
        work_dir: rendezvous directory.

    Collectives: those of `run`, in a process group of each case's own.
    """
    for index, case in enumerate(cases):
        if rank >= case.world_size:
            continue
        meeting = work_dir / f"meeting_{index}"
        meeting.mkdir(parents=True, exist_ok=True)
        platform = connect(
            kind,
            rank=rank,
            local_rank=rank,
            world_size=case.world_size,
            rendezvous=str(meeting),
        )
        run(case, platform)
        disconnect()


def within_devices(
    cases: Sequence[LayoutCase], kind: Literal["cpu", "cuda"]
) -> tuple[list[LayoutCase], dict[str, str]]:
    """Return cases that this machine has enough devices for, and for the others what they need."""
    available = torch.cuda.device_count() if kind == "cuda" else max(c.world_size for c in cases)
    missing = {
        case.name: f"{case.world_size} processes need as many CUDA devices, found {available}"
        for case in cases
        if case.world_size > available
    }
    return [case for case in cases if case.name not in missing], missing
