"""Runs a filter of classic BPF on a system call, as the kernel does."""

import struct

ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


def verdict(program: bytes, architecture: int, number: int, argument: int = 0) -> int:
    """What the filter returns for one call.

    Args:
        program: instructions, eight bytes each.
        architecture: AUDIT_ARCH_* word.
        number: of the call.
        argument: the first one, 64 bits.
    """
    data = struct.pack("<IIQ6Q", number, architecture, 0, argument, 0, 0, 0, 0, 0)
    instructions = list(struct.iter_unpack("<HBBI", program))
    accumulator, at = 0, 0
    while True:
        code, if_true, if_false, value = instructions[at]
        at += 1
        match code:
            case 0x20:
                (accumulator,) = struct.unpack_from("<I", data, value)
            case 0x54:
                accumulator &= value
            case 0x15:
                at += if_true if accumulator == value else if_false
            case 0x35:
                at += if_true if accumulator >= value else if_false
            case 0x06:
                return value
            case _:
                raise ValueError(f"instruction {code:#x}")
