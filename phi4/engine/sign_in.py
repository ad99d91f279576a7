"""Sign-in of the ranks at the rendezvous, with reports about missing ones.

Every rank signs in at the store. Rank 0 decides whether all have joined and the others wait for its
verdict, so none continues alone. Missing ranks are listed every half minute, with the hosts on
which the launcher expects them, if known.
"""

import socket
import sys
import time
from collections.abc import Callable, Sequence

import torch.distributed as dist

from phi4.errors import PlatformError

REPORT_SECONDS = 30.0
_VERDICT_SECONDS = 10.0
_LONGEST_POLL_SECONDS = 0.5
_NAMED_RANKS = 20
_MEETING = "meeting"


def sign_in(
    store: dist.Store, rank: int, world_size: int, deadline: float, expected_hosts: Sequence[str]
) -> int:
    """Wait for all ranks; return the number of those on this host.

    Args:
        store: store that all ranks reach.
        rank: rank of this process.
        world_size: number of processes.
        deadline: time of the monotonic clock.
        expected_hosts: host of every rank; empty if unknown.

    Raises:
        PlatformError: ranks did not join in time; raised on all ranks that did.
    """
    store = dist.PrefixStore(_MEETING, store)
    host = socket.gethostname()
    store.set(f"host_of/{rank}", host)
    store.add(f"ranks_on/{host}", 1)
    store.add("arrived", 1)
    if rank == 0:

        def report() -> None:
            missing = _missing(store, world_size)
            say(
                f"rank 0 on {host} is waiting for {len(missing)} of {world_size} ranks: "
                f"{_named(missing, expected_hosts)}"
            )

        wait_for(lambda: store.add("arrived", 0) == world_size, deadline, report)
        store.set("verdict", _verdict(store, world_size, expected_hosts))
    elif not wait_for(lambda: store.check(["verdict"]), deadline + _VERDICT_SECONDS):
        raise PlatformError(
            f"rank {rank} on {host} reached the rendezvous, but rank 0 did not confirm in time "
            f"that all ranks joined; see the output of rank 0"
        )
    verdict = store.get("verdict").decode()
    ranks_per_host = store.add(f"ranks_on/{host}", 0)
    heard = store.add("heard", 1)
    if rank == 0 and heard < (come := store.add("arrived", 0)):
        # The store ends with this process, which may end at once: let the others read first.
        wait_for(lambda: store.add("heard", 0) >= come, time.monotonic() + _VERDICT_SECONDS)
    if verdict:
        raise PlatformError(verdict)
    return ranks_per_host


def hosts_of(store: dist.Store, ranks: Sequence[int]) -> dict[int, str]:
    """Return the host names of ranks that signed in.

    Args:
        store: store of a `Meeting`, or a clone of it.
        ranks: ranks, all of which have joined.
    """
    hosts = dist.PrefixStore(_MEETING, store).multi_get([f"host_of/{rank}" for rank in ranks])
    return {rank: host.decode() for rank, host in zip(ranks, hosts, strict=True)}


def wait_for(
    is_there: Callable[[], bool], deadline: float, report: Callable[[], None] | None = None
) -> bool:
    """Return whether a condition became true before the deadline; polls, so that signals are
    handled.

    Args:
        is_there: checks the condition once.
        deadline: time of the monotonic clock.
        report: called every half minute.
    """
    pause_seconds, reported_at = 0.01, time.monotonic()
    while not is_there():
        now = time.monotonic()
        if now > deadline:
            return False
        if report and now - reported_at >= REPORT_SECONDS:
            report()
            reported_at = now
        time.sleep(pause_seconds)
        pause_seconds = min(2 * pause_seconds, _LONGEST_POLL_SECONDS)
    return True


def say(text: str) -> None:
    """Print a line on stderr, because there is no run with a console yet."""
    print(f"rendezvous: {text}", file=sys.stderr, flush=True)


def _missing(store: dist.Store, world_size: int) -> list[int]:
    return [rank for rank in range(world_size) if not store.check([f"host_of/{rank}"])]


def _named(ranks: Sequence[int], expected_hosts: Sequence[str]) -> str:
    """Format the first few, by host if known."""
    shown = ranks[:_NAMED_RANKS]
    more = f" and {len(ranks) - len(shown)} more" if ranks[_NAMED_RANKS:] else ""
    if not expected_hosts:
        return ", ".join(map(str, shown)) + more
    return ", ".join(f"{rank} (on {expected_hosts[rank]})" for rank in shown) + more


def _verdict(store: dist.Store, world_size: int, expected_hosts: Sequence[str]) -> str:
    """Return an empty string if all ranks joined, else which did not."""
    missing = _missing(store, world_size)
    if not missing:
        return ""
    present = set(range(world_size)) - set(missing)
    hosts = dict.fromkeys(store.get(f"host_of/{rank}").decode() for rank in sorted(present))
    return (
        f"{len(missing)} of {world_size} ranks did not join in time: "
        f"{_named(missing, expected_hosts)}; those present are on {', '.join(hosts)}: check why "
        f"the missing ones ended or are blocked"
    )
