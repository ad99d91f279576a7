"""Measure the resource use of one sandbox's processes, from /proc.

These are the descendants of the first process of its process namespace. A process whose parent ends
is adopted by that first one, so none can leave the tree.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

_TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Use:
    """Resource use of a sandbox at one moment.

    Attributes:
        num_processes: number of processes, including the first one.
        resident_bytes: total resident memory; a page that two share counts twice.
        cpu_seconds: used so far by all, including ended processes as far as they were observed.
        wants_cpu: whether a thread runs, or waits for a processor.
    """

    num_processes: int
    resident_bytes: int
    cpu_seconds: float
    wants_cpu: bool


@dataclass(frozen=True)
class _ProcessStat:
    """Fields of /proc/PID/stat; processor time in ticks."""

    parent: int
    start: int
    state: str
    own_ticks: int
    waited_ticks: int


@dataclass
class UseMeter:
    """Measures one sandbox repeatedly.

    Args:
        first_pid: first process of its process namespace, as numbered in this process's namespace.
        has_children_files: whether /proc lists the children of a thread; otherwise all processes
            are scanned.
    """

    first_pid: int
    has_children_files: bool = field(
        default_factory=lambda: os.path.exists("/proc/thread-self/children")
    )
    _own_ticks: dict[tuple[int, int], int] = field(default_factory=dict)
    _cpu_seconds: float = 0.0

    def look(self) -> Use:
        """Return the current use; processes that end meanwhile may be missing."""
        stats = dict(self._tree())
        resident = sum(_resident_pages(pid) for pid in stats) * _PAGE_BYTES
        for pid, stat in stats.items():
            self._own_ticks[pid, stat.start] = stat.own_ticks
        # The maximum of two lower bounds: what was observed of each process, and what the living
        # have accounted, including their reaped children.
        told = sum(stat.own_ticks + stat.waited_ticks for stat in stats.values())
        before = self._cpu_seconds
        now = max(sum(self._own_ticks.values()), told) * _TICK_SECONDS
        self._cpu_seconds = max(before, now)
        wants_cpu = self._cpu_seconds > before or any(
            stat.state == "R" or _has_running_thread(pid) for pid, stat in stats.items()
        )
        return Use(len(stats), resident, self._cpu_seconds, wants_cpu)

    def _tree(self) -> Iterator[tuple[int, _ProcessStat]]:
        children = None if self.has_children_files else _children_by_scan()
        pending, seen = [self.first_pid], set()
        while pending:
            pid = pending.pop()
            if pid in seen or (stat := _stat(pid)) is None:
                continue
            seen.add(pid)
            yield pid, stat
            pending += _children(pid) if children is None else children.get(pid, ())


def descendants(pid: int) -> list[int]:
    """Return all processes below one, excluding itself."""
    children = _children_by_scan()
    found, pending = [], [pid]
    while pending:
        below = children.get(pending.pop(), [])
        found += below
        pending += below
    return found


def _read(path: str) -> str:
    """Return the text of a file of /proc; empty if its process is gone."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _stat(pid: int) -> _ProcessStat | None:
    # The name may contain spaces and parentheses; the fields after the last one do not.
    _, separator, rest = _read(f"/proc/{pid}/stat").rpartition(")")
    if not separator:
        return None
    values = rest.split()
    own, waited = (sum(map(int, values[at : at + 2])) for at in (11, 13))
    return _ProcessStat(int(values[1]), int(values[19]), values[0], own, waited)


def _threads(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []


def _children(pid: int) -> list[int]:
    listed = (_read(f"/proc/{pid}/task/{thread}/children") for thread in _threads(pid))
    return [int(child) for text in listed for child in text.split()]


def _children_by_scan() -> dict[int, list[int]]:
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (stat := _stat(int(name))) is not None:
            children.setdefault(stat.parent, []).append(int(name))
    return children


def _resident_pages(pid: int) -> int:
    fields = _read(f"/proc/{pid}/statm").split()
    return int(fields[1]) if len(fields) > 1 else 0


def _has_running_thread(pid: int) -> bool:
    threads = _threads(pid)
    return len(threads) > 1 and any(
        _read(f"/proc/{pid}/task/{thread}/stat").rpartition(")")[2][1:2] == "R"
        for thread in threads
    )
