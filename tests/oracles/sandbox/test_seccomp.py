"""The filter refuses what it names on both machines, and nothing that a program needs."""

import errno
import platform
import re
from pathlib import Path

import pytest

from phi4.oracles.sandbox.seccomp import (
    CLONE,
    CLONE3,
    DENIED,
    SOCKET,
    column,
    filter_program,
    machines,
)
from tests.support.filter_reader import ALLOW, ERRNO, KILL, verdict

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# read, write, openat, mmap, exit_group, execve, wait4, socketpair, getrandom, prlimit64
NEEDED = {
    "x86_64": (0, 1, 257, 9, 231, 59, 61, 53, 318, 302),
    "aarch64": (63, 64, 56, 222, 94, 221, 260, 199, 278, 261),
}
NEW_USER, NEW_NAMESPACE, NEW_TIME, SIGCHLD = 0x10000000, 0x00020000, 0x80, 17
THREAD_FLAGS = 0x003D0F00
AF_VSOCK, AF_NETLINK = 40, 16


@pytest.mark.parametrize("machine", machines())
def test_named_calls_are_refused_and_needed_ones_are_not(machine: str) -> None:
    program, word, at = filter_program(machine), ARCHITECTURES[machine], column(machine)
    denied = {name: row[at] for name, row in DENIED.items() if row[at] is not None}
    refused = {name for name, call in denied.items() if verdict(program, word, call) != ALLOW}
    assert refused == set(denied)
    assert {verdict(program, word, call) for call in denied.values()} == {ERRNO | errno.EPERM}
    assert len(set(denied.values())) == len(denied)
    assert [call for call in NEEDED[machine] if verdict(program, word, call) != ALLOW] == []


@pytest.mark.parametrize("machine", machines())
def test_calls_of_another_table_end_the_process(machine: str) -> None:
    program, word = filter_program(machine), ARCHITECTURES[machine]
    foreign = [other for other in (*ARCHITECTURES.values(), 0x40000003) if other != word]
    assert {verdict(program, other, 39) for other in foreign} == {KILL}
    if machine == "x86_64":
        assert verdict(program, word, 0x40000000 | 101) == KILL


@pytest.mark.parametrize("machine", machines())
def test_clone_makes_processes_and_threads_but_no_namespaces(machine: str) -> None:
    program, word, at = filter_program(machine), ARCHITECTURES[machine], column(machine)
    for flags in (SIGCHLD, THREAD_FLAGS):
        assert verdict(program, word, CLONE[at], flags) == ALLOW
    for flags in (NEW_USER, NEW_NAMESPACE, NEW_TIME, 0x02000000, 0x04000000, 0x08000000):
        refused = verdict(program, word, CLONE[at], flags | SIGCHLD)
        assert refused == ERRNO | errno.EPERM, hex(flags)
    assert verdict(program, word, CLONE3[at]) == ERRNO | errno.ENOSYS


@pytest.mark.parametrize("machine", machines())
def test_sockets_are_of_families_that_namespaces_hold(machine: str) -> None:
    program, word, at = filter_program(machine), ARCHITECTURES[machine], column(machine)
    assert {verdict(program, word, SOCKET[at], family) for family in (1, 2, 10)} == {ALLOW}
    for family in (0, 3, AF_NETLINK, 17, 38, AF_VSOCK):
        assert verdict(program, word, SOCKET[at], family) == ERRNO | errno.EPERM


@pytest.mark.parametrize(
    ("machine", "header"),
    [("x86_64", "x86_64-linux-gnu/asm/unistd_64.h"), ("aarch64", "asm-generic/unistd.h")],
)
def test_numbers_are_those_of_the_headers(machine: str, header: str) -> None:
    path = Path("/usr/include", header)
    if not path.exists():
        return  # comes with the C library's headers; any machine that has them checks for all
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text())
    numbers = {name: int(number) for name, number in found}
    ours = DENIED | {"clone": CLONE, "clone3": CLONE3, "socket": SOCKET}
    known = {name: row[column(machine)] for name, row in ours.items() if name in numbers}
    known = {name: number for name, number in known.items() if number is not None}
    assert known == {name: numbers[name] for name in known}
    assert len(known) > 50


def test_filter_of_this_machine_has_its_numbers() -> None:
    # A wrong column would refuse the calls of another machine.
    machine = platform.machine()
    if machine in machines():
        assert column(machine) == list(ARCHITECTURES).index(machine)
