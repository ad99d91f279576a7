"""CPU time of processes and of everything they started."""

from collections.abc import Iterable

import psutil


def child_seconds(process: psutil.Process) -> float:
    """CPU seconds of all descendants of a process, ended or alive.

    The time of one that has ended is in the account of the parent that waited for it. It is lost
    when that parent was gone, so the sum may fall.
    """
    own = process.cpu_times()
    return own.children_user + own.children_system + _total(process.children(recursive=True))


def tree_seconds(pids: Iterable[int]) -> float:
    """CPU seconds of the processes that are alive among `pids`, their descendants included."""
    total = 0.0
    for pid in pids:
        try:
            process = psutil.Process(pid)
            total += _total([process, *process.children(recursive=True)])
        except psutil.NoSuchProcess:
            continue
    return total


def _total(processes: Iterable[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total
