"""How ranks find each other: a port that is taken, a rank that never comes, a name without a host.

Ranks are threads here: to the stores they are as separate as processes.
"""

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from unittest.mock import patch

import pytest
import torch.distributed as dist

from phi4.engine import rendezvous, sign_in
from phi4.engine.rendezvous import Meeting, meet
from phi4.errors import PlatformError
from tests.support.waiting import wait_until


def met(place: str, world_size: int, ranks: list[int], seconds: float = 60) -> list[Meeting | str]:
    """What each of the ranks got, an error as its text."""

    def one(rank: int) -> Meeting | str:
        try:
            return meet(place, rank, world_size, seconds=seconds)
        except PlatformError as error:
            return str(error)

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, ranks))


@contextmanager
def taken_port(answer: bytes = b"") -> Iterator[int]:
    """A port of a foreign service, which accepts and says something else, or nothing at all."""
    with closing(socket.create_server(("", 0))) as server:

        def serve() -> None:
            callers = []
            while True:
                try:
                    callers.append(server.accept()[0])
                except OSError:
                    break
                callers[-1].sendall(answer)

        serving = threading.Thread(target=serve)
        serving.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        serving.join()


def free_port() -> int:
    with closing(socket.create_server(("", 0))) as server:
        return server.getsockname()[1]


def share_a_value(meetings: list[Meeting]) -> bytes:
    meetings[0].store.set("key", "value")
    return meetings[-1].store.get("key")


def test_ranks_of_one_machine_meet_in_a_directory(tmp_path) -> None:
    meetings = met(str(tmp_path), 3, [2, 0, 1])
    assert share_a_value(meetings) == b"value"
    assert [meeting.ranks_per_host for meeting in meetings] == [3, 3, 3]


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n", b"phi4 other.0 1234\n"])
def test_ranks_of_srun_pass_over_a_port_that_is_taken(answer: bytes, monkeypatch) -> None:
    monkeypatch.setattr(rendezvous, "_DIAL_SECONDS", 0.2)
    with taken_port(answer) as taken:
        meetings = met(f"tcp://127.0.0.1:{taken},{free_port()}/47.0", 2, [1, 0])
    assert share_a_value(meetings) == b"value"


def test_no_free_port_is_one_line() -> None:
    with taken_port() as taken:
        (refusal,) = met(f"tcp://127.0.0.1:{taken}/47.0", 2, [0])
    assert f"none of the ports {taken} free" in refusal and "MASTER_PORT" in refusal


@pytest.mark.parametrize("kind", ["directory", "tcp", "env"])
def test_ranks_that_do_not_come_are_named_to_those_who_did(kind, tmp_path, monkeypatch) -> None:
    place = {
        "directory": str(tmp_path),
        "tcp": f"tcp://127.0.0.1:{free_port()}/47.0",
        "env": "env://",
    }
    if kind == "env":
        agent = dist.TCPStore("127.0.0.1", 0, 4, True, wait_for_workers=False)
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(agent.port))
    came = met(place[kind], 4, [0, 2], seconds=0.5)
    assert came[0] == came[1]
    assert came[0].startswith("2 of 4 ranks did not join in time: 1, 3;")
    assert socket.gethostname() in came[0]


def test_rank_0_that_does_not_come_is_missed_in_time(tmp_path) -> None:
    (refusal,) = met(str(tmp_path), 2, [1], seconds=0.2)
    assert "rank 0 wrote no port" in refusal
    (refusal,) = met(f"tcp://127.0.0.1:{free_port()}/47.0", 2, [1], seconds=0.2)
    assert "was not greeted by rank 0 at 127.0.0.1" in refusal


def test_host_without_an_address_is_named_by_all(monkeypatch) -> None:
    monkeypatch.setattr(rendezvous, "_RESOLVE_SECONDS", 0.1)
    with patch("socket.getaddrinfo", side_effect=socket.gaierror):
        refusals = met(f"tcp://n1:{free_port()}/47.0", 2, [0, 1])
    assert all("cannot resolve 'n1', the host of rank 0; set MASTER_ADDR" in r for r in refusals)


def test_ranks_that_are_late_are_listed_with_their_hosts_while_others_wait(
    tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(sign_in, "REPORT_SECONDS", 0.1)
    hosts = ("n1", "n1", "n2", "n3")

    def late(rank: int) -> Meeting:
        if rank == 3:
            wait_until(lambda: "is waiting for 1 of 4" in capsys_text(), "the line about rank 3")
        return meet(str(tmp_path), rank, 4, expected_hosts=hosts)

    said: list[str] = []

    def capsys_text() -> str:
        said.append(capsys.readouterr().err)
        return "".join(said)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(late, range(4)))
    assert "is waiting for 1 of 4 ranks: 3 (on n3)" in "".join(said)


def test_rank_that_never_comes_is_named_with_its_host(tmp_path) -> None:
    with pytest.raises(PlatformError, match=r"1 of 2 ranks did not join in time: 1 \(on n7\);"):
        meet(str(tmp_path), 0, 2, seconds=0.2, expected_hosts=("n6", "n7"))


def test_ranks_that_wait_for_rank_0_say_so_with_its_host(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sign_in, "REPORT_SECONDS", 0.1)
    for rank in (1, 99):
        with pytest.raises(PlatformError, match="rank 0 wrote no port"):
            meet(str(tmp_path), rank, 100, seconds=0.5, expected_hosts=("n6",) * 100)
    said = capsys.readouterr().err
    assert (
        "rank 1 on " in said and "is waiting for rank 0 (on n6)" in said and "rank 99" not in said
    )


def test_ranks_are_counted_by_host(tmp_path) -> None:
    hosts = ["a", "b", "b", "a", "b"]
    own = threading.local()

    def meet_on_host(rank: int) -> int:
        own.host = hosts[rank]
        return meet(str(tmp_path), rank, 5, seconds=60).ranks_per_host

    named = patch.object(rendezvous.socket, "gethostname", lambda: own.host)
    with named, ThreadPoolExecutor(5) as pool:
        assert list(pool.map(meet_on_host, range(5))) == [2, 3, 3, 2, 3]
