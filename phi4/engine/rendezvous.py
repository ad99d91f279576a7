"""Rendezvous of a run's processes, before there is a process group.

A torch store client only connects to a port that has been verified, because it would wait for ever
on a foreign service that accepts and stays silent. Rank 0 opens its store on a free port and
announces that port: to workers on one machine in a file, to those of srun through a greeting on a
port of a short list that every rank derives from the job. torchrun has its own store. In each case
every rank then signs in, so that missing ones can be listed: `phi4.engine.sign_in`.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from phi4.engine.sign_in import say, sign_in, wait_for
from phi4.errors import PlatformError

RENDEZVOUS_SECONDS = 600.0
_RESOLVE_SECONDS = 10.0
_DIAL_SECONDS = 3.0
_TALKATIVE_RANKS = 8
"""Number of ranks other than rank 0 that report what they wait for; 1,920 such lines would be
useless."""
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Meeting:
    """The store that all ranks reached."""

    store: dist.Store
    ranks_per_host: int
    """Ranks on this rank's host, including itself."""


def meet(
    rendezvous: str,
    rank: int,
    world_size: int,
    *,
    seconds: float = RENDEZVOUS_SECONDS,
    expected_hosts: Sequence[str] = (),
) -> Meeting:
    """Find the other ranks.

    Args:
        rendezvous: a directory that all ranks see, `env://` (torchrun), or
            `tcp://HOST:PORT[,PORT...]/RUN`: rank 0, on HOST, greets callers of RUN on the first
            free PORT.
        rank: rank of this process.
        world_size: number of processes.
        seconds: how long to wait for the others.
        expected_hosts: host of every rank, for messages; empty if unknown.

    Raises:
        PlatformError: rank 0 cannot be reached, or ranks did not join in time; lists them.

    Collectives: every rank signs in at the store and waits for all others.
    """
    if world_size == 1:
        return Meeting(dist.HashStore(), 1)
    deadline = time.monotonic() + seconds

    def report() -> None:
        host = f" (on {expected_hosts[0]})" if expected_hosts else ""
        if rank <= _TALKATIVE_RANKS:
            say(
                f"rank {rank} on {socket.gethostname()} is waiting for rank 0{host} at {rendezvous}"
            )

    try:
        with _opened(rendezvous, rank, world_size, deadline, report) as store:
            return Meeting(store, sign_in(store, rank, world_size, deadline, expected_hosts))
    except dist.DistError as error:
        first_line = str(error).partition("\n")[0]
        raise PlatformError(
            f"rank {rank} on {socket.gethostname()} lost the rendezvous at {rendezvous}: "
            f"{first_line}; see the output of rank 0"
        ) from None


@contextmanager
def _opened(
    rendezvous: str, rank: int, world_size: int, deadline: float, report: Callable[[], None]
) -> Iterator[dist.Store]:
    """Yield the store; during the block rank 0 announces its location."""
    scheme, is_url, address = rendezvous.partition("://")
    if is_url and scheme == "env":
        yield _torchrun_store(rank, world_size, deadline)
    elif rank == 0:
        store = dist.TCPStore(
            _LOOPBACK, 0, world_size, True, _left(deadline), wait_for_workers=False
        )
        announced = _greeting(address, store.port) if is_url else nullcontext()
        if not is_url:
            _write_port(Path(rendezvous), store.port)
        with announced:
            yield store
    else:
        find = _ask if is_url else _read_port
        host, port = find(address if is_url else rendezvous, deadline, report)
        yield dist.TCPStore(host, port, world_size, False, _left(deadline))


def _torchrun_store(rank: int, world_size: int, deadline: float) -> dist.Store:
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=_left(deadline)))
    except ValueError as error:
        raise PlatformError(f"{error}; torchrun sets MASTER_ADDR and MASTER_PORT") from None
    return store


def _write_port(directory: Path, port: int) -> None:
    partial = directory / "port.partial"
    partial.write_text(str(port))
    partial.rename(directory / "port")


def _read_port(directory: str, deadline: float, report: Callable[[], None]) -> tuple[str, int]:
    port_file = Path(directory) / "port"
    if not wait_for(port_file.exists, deadline, report):
        raise PlatformError(f"rank 0 wrote no port to {port_file}; see the output of rank 0")
    return _LOOPBACK, int(port_file.read_text())


@contextmanager
def _greeting(address: str, store_port: int) -> Iterator[None]:
    """Answer every caller with the name of the run and the port of its store."""
    host, ports, run = _parsed(address)
    _require_resolvable(host)
    with closing(_listen(ports)) as listener:
        line = f"phi4 {run} {store_port}\n".encode()
        threading.Thread(target=_greet, args=(listener, line), daemon=True).start()
        try:
            yield
        finally:
            # Wakes the thread from accept.
            listener.shutdown(socket.SHUT_RDWR)


def _require_resolvable(host: str) -> None:
    def is_resolved() -> bool:
        with suppress(socket.gaierror):
            return bool(socket.getaddrinfo(host, None))
        return False

    if not wait_for(is_resolved, time.monotonic() + _RESOLVE_SECONDS):
        raise PlatformError(
            f"{socket.gethostname()} cannot resolve {host!r}, the host of rank 0; set MASTER_ADDR "
            "to its address"
        )


def _listen(ports: list[int]) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    for port in ports:
        with suppress(OSError):
            return socket.create_server(
                ("", port), family=family, backlog=4096, dualstack_ipv6=dual
            )
    raise PlatformError(
        f"{socket.gethostname()} has none of the ports {', '.join(map(str, ports))} free for the "
        "rendezvous; set MASTER_PORT to a free one for all ranks"
    )


def _greet(listener: socket.socket, line: bytes) -> None:
    while True:
        try:
            caller, _ = listener.accept()
        except OSError:
            return  # The meeting is over.
        with suppress(OSError), caller:
            caller.sendall(line)


def _ask(address: str, deadline: float, report: Callable[[], None]) -> tuple[str, int]:
    """Return host and port of the run's store, from the service that greets with the run's name."""
    host, ports, run = _parsed(address)
    _require_resolvable(host)
    found: list[int] = []

    def is_greeted() -> bool:
        found.extend(filter(None, (_greeted(host, port, run) for port in ports)))
        return bool(found)

    if not wait_for(is_greeted, deadline, report):
        raise PlatformError(
            f"{socket.gethostname()} was not greeted by rank 0 at {host}, ports "
            f"{', '.join(map(str, ports))}; see the output of rank 0, or set MASTER_ADDR to an "
            "address of its host"
        )
    return host, found[0]


def _greeted(host: str, port: int, run: str) -> int | None:
    """Return the store's port; None if there is no answer or a foreign one."""
    try:
        with socket.create_connection((host, port), timeout=_DIAL_SECONDS) as connection:
            words = connection.makefile("rb").readline(200).decode(errors="replace").split()
    except OSError:
        return None
    is_ours = len(words) == 3 and words[:2] == ["phi4", run] and words[2].isdecimal()
    return int(words[2]) if is_ours else None


def _parsed(address: str) -> tuple[str, list[int], str]:
    place, _, run = address.partition("/")
    host, _, ports = place.rpartition(":")
    return host, [int(port) for port in ports.split(",")], run


def _left(deadline: float) -> timedelta:
    return timedelta(seconds=max(1.0, deadline - time.monotonic()))
