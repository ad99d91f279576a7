"""Whom this process talks to: clients under test must not ask anybody but the server under test."""

import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

TRACING = ("LANGSMITH_TRACING", "LANGSMITH_TRACING_V2", "LANGCHAIN_TRACING", "LANGCHAIN_TRACING_V2")
"""Settings of a developer's own that make LangChain send what it does to a service."""


@contextmanager
def only_loopback() -> Iterator[list[str]]:
    """Refuse connections to other machines while the block runs, and look-ups of their names.

    Yields:
        The hosts that were asked for, refused ones included.

    Raises:
        AssertionError: at the end, for another host, also where a client did not mind the refusal.
    """
    hosts: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in TRACING:
            patch.delenv(name, raising=False)
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, _watched_connect(hosts, name))
        patch.setattr(socket, "getaddrinfo", _watched_look_up(hosts))
        yield hosts
    if foreign := sorted({host for host in hosts if not _is_loopback(host)}):
        raise AssertionError(f"asked for {', '.join(foreign)}; expected this machine only")


def _watched_connect(hosts: list[str], name: str):
    connect = getattr(socket.socket, name)

    def watched(self: socket.socket, address: object) -> object:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _note(hosts, address[0])
        return connect(self, address)

    return watched


def _watched_look_up(hosts: list[str]):
    look_up = socket.getaddrinfo

    def watched(host: str | bytes | None, *args: object, **fields: object) -> object:
        _note(hosts, host.decode() if isinstance(host, bytes) else host or "localhost")
        return look_up(host, *args, **fields)

    return watched


def _note(hosts: list[str], host: str) -> None:
    hosts.append(host)
    if not _is_loopback(host):
        raise OSError(f"a test asked for {host}")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
