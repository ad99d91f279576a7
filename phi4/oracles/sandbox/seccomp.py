"""A seccomp filter, in classic BPF, of system calls that a program in the sandbox may not make.

It is a deny list, not an allow list, so that any runtime works. It contains calls that cross the
isolation (other processes' memory, keys, namespaces, mounts, kernel interfaces) and calls that
create uncounted memory (memory files, System V IPC). The namespaces and the missing capabilities
already refuse most of them; this is a second layer.
"""

import errno
import struct
from collections.abc import Sequence

_MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""AUDIT_ARCH_* word and column of the table below."""

DENIED: dict[str, tuple[int | None, int | None]] = {
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    # keys are not namespaced
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # Calls that a filter does not see.
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    # Kernel interfaces.
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "syslog": (103, 116),
    "acct": (163, 89),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "lookup_dcookie": (212, 18),
    "fanotify_init": (300, 262),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # namespaces and mounts
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_tree_attr": (467, 467),
    # Memory that neither the size of /tmp nor resident memory shows.
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
}
"""Refused with EPERM; numbers on x86_64 and aarch64. Source: asm/unistd_64.h, asm-generic."""

CLONE = (56, 220)
CLONE3 = (435, 435)
SOCKET = (41, 198)
_NEW_NAMESPACES = 0x7E020080
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET and NEWTIME in `clone`."""
_FAMILIES = (1, 2, 10)
"""AF_UNIX, AF_INET, AF_INET6. Others, such as AF_VSOCK, may bypass the network namespace."""
_X32 = 0x40000000

_LOAD, _AND, _RETURN = 0x20, 0x54, 0x06
_EQUAL, _AT_LEAST = 0x15, 0x35
_NUMBER, _ARCHITECTURE, _ARGUMENT_0 = 0, 4, 16
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000

_Instruction = tuple[int, int, int, int]


def machines() -> tuple[str, ...]:
    """Return machines with a table, as `platform.machine()` names them."""
    return tuple(_MACHINES)


def column(machine: str) -> int:
    """Return the column of a machine in the tables of this module."""
    return _MACHINES[machine][1]


def filter_program(machine: str) -> bytes:
    """Return the filter in the format of `bwrap --seccomp`.

    A call with another architecture's number, x32 included, ends the process. `clone3`, whose flags
    a filter cannot see, is reported as missing; the C library then uses `clone`.

    Args:
        machine: one of `machines()`.
    """
    word, at = _MACHINES[machine]
    program: list[_Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, word),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if machine == "x86_64":
        program += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL)]
    refusal = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    for numbers in DENIED.values():
        if (number := numbers[at]) is not None:
            program += [(_EQUAL, 0, 1, number), refusal]
    program += [(_EQUAL, 0, 1, CLONE3[at]), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    program += _on_argument(CLONE[at], _namespace_flags(refusal))
    program += _on_argument(SOCKET[at], _other_families(refusal))
    program.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)


def _on_argument(number: int, rule: Sequence[_Instruction]) -> list[_Instruction]:
    """Apply `rule` to the low half of the first argument of one call, to allow or refuse it."""
    return [(_EQUAL, 0, len(rule) + 1, number), (_LOAD, 0, 0, _ARGUMENT_0), *rule]


def _namespace_flags(refusal: _Instruction) -> list[_Instruction]:
    return [(_AND, 0, 0, _NEW_NAMESPACES), (_EQUAL, 1, 0, 0), refusal, (_RETURN, 0, 0, _ALLOW)]


def _other_families(refusal: _Instruction) -> list[_Instruction]:
    tests = [(_EQUAL, len(_FAMILIES) - at, 0, family) for at, family in enumerate(_FAMILIES)]
    return [*tests, refusal, (_RETURN, 0, 0, _ALLOW)]
