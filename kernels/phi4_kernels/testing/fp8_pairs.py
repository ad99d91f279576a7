"""Finds in PTX the pairs of e4m3 values that ptxas 12 loses.

`cvt.rn.satfinite.e4m3x2.f32` writes two values into a 16-bit register. Where two such registers
are joined into a word, ptxas 12 (Triton 3.6 and 3.7 carry 12.8 and 12.9) folds the joining into the
second conversion, F2FP.SATFINITE.E4M3.F32.PACK_AB_MERGE_C, and ignores the register's other
readers: they read an undefined hardware register, often R1, the stack pointer. ptxas 13 is correct.
A kernel that stores a tile and its transpose must therefore convert it twice.
"""

import re

_CONVERSION = re.compile(r"cvt\.rn\.satfinite\.e[45]m[23]x2\.f(?:32|16x2)\s+(%\w+),")
_REGISTER = re.compile(r"%rs\d+\b")
_JOINED = re.compile(r"\{[^{}]*%rs\d+\s*,[^{}]*\}")


def lost(ptx: str) -> list[str]:
    """Registers of fp8 pairs that are joined to others in one instruction and read in another."""
    pairs: dict[str, int] = {}
    readers: dict[str, int] = {}
    joined: set[str] = set()
    for line in ptx.splitlines():
        code = line.partition("//")[0]
        # A register that is written again starts a new count.
        if conversion := _CONVERSION.search(code):
            pairs[conversion[1]] = 0
            continue
        for register in set(_REGISTER.findall(code)) & pairs.keys():
            readers[register] = readers.get(register, 0) + 1
            # `{%rs1, %rs2}` makes a word of two pairs; in a .b8 access each is a byte of its own.
            if _JOINED.search(code) and ".b8" not in code:
                joined.add(register)
    return sorted(register for register in joined if readers[register] > 1)
