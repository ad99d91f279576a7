"""Tasks for the sandbox, and their results.

Time is counted so that the load of the machine does not change the result: processor time that a
program used, and idle time in which it needed no processor; waiting for a busy processor counts as
neither. The wall clock limit only leads to an undecided result.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


@dataclass(frozen=True)
class Limits:
    """Resource limits of a program.

    Attributes:
        cpu_seconds: processor time of all its processes together.
        idle_seconds: time in which none of its threads ran or waited for a processor.
        wall_seconds: limit after which the run is `undecided`; reached on a machine that is too
            busy.
        memory_bytes: resident memory of all its processes together, checked every 50 ms.
        address_space_bytes: of one process; None if a runtime reserves more than it uses.
        num_tasks: processes and threads.
        output_bytes: standard output and standard error together.
        file_bytes: size of one file.
        tmp_bytes: size of /tmp, which is memory; /dev/shm has half of it.
        num_open_files: per process.
    """

    cpu_seconds: float = 5.0
    idle_seconds: float = 10.0
    wall_seconds: float = 900.0
    memory_bytes: int = 1 << 30
    address_space_bytes: int | None = 1 << 30
    num_tasks: int = 16
    output_bytes: int = 1 << 20
    file_bytes: int = 16 << 20
    tmp_bytes: int = 32 << 20
    num_open_files: int = 64


@dataclass(frozen=True)
class Task:
    """A program and its input.

    Attributes:
        command: absolute path of the executable inside the sandbox, and its arguments.
        files: contents by name; they are read-only and executable in /program.
        stdin: content of standard input.
        read_only: further readable absolute paths of the host, in addition to /usr.
    """

    command: tuple[str, ...]
    files: Mapping[str, bytes] = field(default_factory=dict)
    stdin: bytes = b""
    read_only: tuple[str, ...] = ()


class Outcome(StrEnum):
    """How a run ended.

    `finished` has an exit status. `timeout` and `killed` are caused by the program. The last two
    say nothing about the program and must not count against it.
    """

    FINISHED = "finished"
    TIMEOUT = "timeout"
    KILLED = "killed"
    UNDECIDED = "undecided"
    NOT_STARTED = "could not start"


@dataclass(frozen=True)
class Ended:
    """A run that is over; none of its processes is left.

    Attributes:
        outcome: how it ended.
        reason: why, in a line; empty for `finished`.
        exit_status: exit status of a finished program, 0 to 255.
        stdout: at most `Limits.output_bytes`.
        stderr: the same.
        cpu_seconds: last measured use; too small by the use after that.
        peak_bytes: largest measured resident memory.
    """

    outcome: Outcome
    reason: str = ""
    exit_status: int | None = None
    stdout: bytes = b""
    stderr: bytes = b""
    cpu_seconds: float = 0.0
    peak_bytes: int = 0

    @property
    def says_nothing(self) -> bool:
        """Whether the sandbox or the machine, not the program, caused the outcome."""
        return self.outcome in (Outcome.UNDECIDED, Outcome.NOT_STARTED)
