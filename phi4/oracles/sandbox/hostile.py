"""Programs that attack the sandbox, and the expected outcome of each.

An attack reports its own success, in one word, so that a person can read the table of `phi4 sandbox
check` and a test can compare it. None of them harms a machine whose sandbox leaks: they open files
without writing, and fork a few hundred times, not indefinitely.
"""

import json
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from phi4.oracles.sandbox.languages import PYTHON
from phi4.oracles.sandbox.seccomp import CLONE, CLONE3, DENIED, SOCKET, column
from phi4.oracles.sandbox.supervisor import run
from phi4.oracles.sandbox.task import Ended, Limits, Outcome, Task
from phi4.oracles.sandbox.tools import Tools

_MIB = 1 << 20
_SMALL = Limits(
    cpu_seconds=2.0, idle_seconds=2.0, memory_bytes=96 * _MIB, tmp_bytes=4 * _MIB, file_bytes=_MIB
)


@dataclass(frozen=True)
class Attack:
    """A hostile program.

    Attributes:
        name: name of its file in `attacks/`, and of its row in the table.
        outcome: expected end of its run.
        says: expected output, or the beginning of the reason if it does not finish.
        limits: its resource limits.
    """

    name: str
    outcome: Outcome
    says: str
    limits: Limits = _SMALL

    @property
    def source(self) -> str:
        """The program."""
        return (Path(__file__).parent / "attacks" / f"{self.name}.py").read_text(encoding="utf-8")

    @property
    def expected(self) -> str:
        """The expected result, in the form of `told`."""
        return f"{self.outcome}: {self.says}"


_FINISHED, _KILLED, _TIMEOUT = Outcome.FINISHED, Outcome.KILLED, Outcome.TIMEOUT

ATTACKS: tuple[Attack, ...] = (
    Attack("fork_bomb", _FINISHED, "refused"),
    Attack("address_space", _FINISHED, "refused"),
    Attack("memory_of_many", _KILLED, "used more than 96 MiB of memory"),
    Attack("uncounted_memory", _FINISHED, "refused"),
    Attack("fill_disks", _FINISHED, "refused"),
    Attack("output_flood", _KILLED, "wrote more than 1048576 bytes"),
    Attack("environment", _FINISHED, "nothing"),
    Attack("descriptors", _FINISHED, "0 1 2"),
    Attack("host_files", _FINISHED, "refused"),
    Attack("kernel_settings", _FINISHED, "refused"),
    Attack("network", _FINISHED, "refused"),
    Attack("kill_others", _FINISHED, "alone"),
    Attack("system_calls", _FINISHED, "refused"),
    Attack("x32_call", _KILLED, "ended by SIGSYS"),
    Attack("survive", _FINISHED, "forked"),
    Attack("fork_and_spin", _TIMEOUT, "used 0.2 s", Limits(cpu_seconds=0.2)),
    Attack("wait_for_ever", _TIMEOUT, "waited 0.2 s", Limits(idle_seconds=0.2)),
    Attack("imitate_failed_start", _FINISHED, "exit status 1"),
)


def attacks(machine: str) -> Iterator[Attack]:
    """Return those that are applicable to a machine."""
    return (one for one in ATTACKS if one.name != "x32_call" or machine == "x86_64")


def run_attack(attack: Attack, tools: Tools) -> Ended:
    """Run one, with real targets outside the sandbox."""
    with (
        closing(socket.create_server(("127.0.0.1", 0))) as tcp,
        closing(socket.socket(socket.AF_UNIX)) as abstract,
    ):
        name = f"phi4-{secrets.token_hex(8)}"
        abstract.bind(f"\0{name}")
        abstract.listen()
        targets = {
            "port": tcp.getsockname()[1],
            "abstract": name,
            "pid": os.getpid(),
            "calls": _system_calls(tools.machine),
        }
        files = {"attack.py": attack.source.encode()}
        command = (*PYTHON, "/program/attack.py", name)
        stdin = json.dumps(targets).encode()
        ended = run(Task(command, files, stdin), attack.limits, tools)
        if survivors := _processes_of(name):
            return Ended(Outcome.UNDECIDED, f"processes {survivors} are still running")
    return ended


def told(ended: Ended) -> str:
    """Return how a run ended, as shown in the table."""
    if ended.outcome is not Outcome.FINISHED:
        return f"{ended.outcome}: {ended.reason}"
    said = ended.stdout.decode(errors="replace").strip()
    return (
        f"{ended.outcome}: {said if ended.exit_status == 0 else f'exit status {ended.exit_status}'}"
    )


def is_held(attack: Attack, ended: Ended) -> bool:
    """Return whether the sandbox behaved as required."""
    if attack.outcome is Outcome.FINISHED:
        return told(ended) == attack.expected
    return told(ended).startswith(attack.expected)


def _system_calls(machine: str) -> Mapping[str, int]:
    at = column(machine)
    numbers = DENIED | {"clone": CLONE, "clone3": CLONE3, "socket": SOCKET}
    return {name: number for name, row in numbers.items() if (number := row[at]) is not None}


def _processes_of(marker: str) -> list[int]:
    """Return processes with the marker among their arguments."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                arguments = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if marker.encode() in arguments:
                found.append(int(entry.name))
    return found
