"""Compiles every shipped launch for sm_90 without a GPU, and reads resources of the machine code.

A driver that only compiles is installed, and the public functions are called on CPU tensors: the
compiled kernels are those that a GPU would launch, with Triton's own specialisation of arguments.
This changes Triton for the whole process, so it runs in a separate process:

    python -m phi4_kernels.testing compile
"""

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from phi4_kernels import dispatch, launch, registry
from phi4_kernels.dispatch import Choice
from phi4_kernels.registry import Case, Entry
from phi4_kernels.testing import fp8_pairs
from phi4_kernels.testing.numerics import outputs_of

CAPABILITY = 90
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_WARP = 32
_COMPILED = ("triton", "gluon")
_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True, slots=True)
class Resources:
    """Resources of one compiled kernel, from its cubin."""

    registers: int
    """Per thread."""
    num_warps: int
    stack_bytes: int
    shared_bytes: int
    wide_loads: int
    """128-bit global loads in the machine code."""
    wide_stores: int
    hgmma: int
    """Warpgroup matrix instructions, fp8's included."""
    hmma: int
    local_accesses: int
    float_atomics: int
    tf32: int
    bulk_loads: int
    """Loads by the copy engine."""
    product_waits: int
    """Waits for warpgroup instructions."""
    hidden_exponentials: int
    """Exponentials between the waits for two warpgroup products: one runs meanwhile."""
    lost_fp8_pairs: int
    """Pairs of fp8 values that ptxas 12 loses."""


_PATTERNS = {
    "wide_loads": r"\bLDG\.E\.128",
    "wide_stores": r"\bSTG\.E\.128",
    "hgmma": r"\b[HQ]GMMA\b",
    "hmma": r"\bHMMA\b",
    "local_accesses": r"\b(?:LDL|STL)\b",
    "float_atomics": r"\b(?:ATOM|RED)\w*\.\S*(?:F16|F32|F64|BF16)",
    "tf32": r"\bTF32\b|\.TF32",
    "bulk_loads": r"\bUTMALDG\b",
    "product_waits": r"\bWARPGROUP\.DEPBAR\b",
}


class _CompileOnlyDriver(DriverBase):
    """Provides the device properties that the compiler needs; cannot launch kernels."""

    def __init__(self) -> None:
        """Nothing to open."""

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, _WARP)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("this driver only compiles")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def count_instructions(sass: str) -> dict[str, int]:
    """Counts of the instructions that the gate checks."""
    counts = {name: len(re.findall(pattern, sass)) for name, pattern in _PATTERNS.items()}
    # DEPBAR waits for all but N products: text between two waits runs while N are in flight.
    waits = re.split(r"\bWARPGROUP\.DEPBAR\.LE gsb0, (0x\d)", sass)
    between = [text for text, left in zip(waits[2::2], waits[1::2], strict=True) if left != "0x0"]
    return counts | {"hidden_exponentials": sum(text.count("MUFU.EX2") for text in between)}


def tool(name: str, *arguments: str) -> str:
    """Output of one of the binary tools that Triton carries: cuobjdump, nvdisasm."""
    command = [str(_TOOLS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read_resources(kernel: Any) -> Resources:
    """Disassemble one compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", cubin.name)
        sass = tool("nvdisasm", "-c", cubin.name)
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    return Resources(
        registers=numbers["REG"],
        num_warps=kernel.metadata.num_warps,
        stack_bytes=numbers["STACK"],
        shared_bytes=kernel.metadata.shared,
        lost_fp8_pairs=len(fp8_pairs.lost(kernel.asm["ptx"])),
        **count_instructions(sass),
    )


@contextmanager
def _compiling(implementation: str) -> Iterator[dict[str, Any]]:
    """Compile launches instead of running them; yields kernels by name as they are launched."""
    kernels: dict[str, Any] = {}
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, warmup: bool = False, **kwargs: Any) -> Any:
        kernels[self.__name__] = run(self, *args, warmup=True, **kwargs)
        return kernels[self.__name__]

    driver.set_active(_CompileOnlyDriver())
    chosen = partial(Choice, implementation=implementation, reason="compile only")
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(dispatch, "choose", lambda op, *_: chosen(op)),
    ):
        yield kernels


def _shipped(entry: Entry, implementation: str) -> Iterator[tuple[Case, torch.dtype]]:
    """Cases and dtypes to compile: all that ship, or those that the implementation names."""
    names = tuple(case.name for case in entry.shipped_cases)
    everything = (names, entry.dtypes)
    module = registry.implementation(entry.op, implementation)
    gated, dtypes = getattr(module, "GATED", everything)
    for case in entry.shipped_cases:
        if case.name in gated:
            yield from ((case, dtype) for dtype in dtypes)


def _compile_entry(entry: Entry, implementation: str, kernels: dict[str, Any]) -> dict[str, Any]:
    """Every kernel of every shipped case and dtype of an entry, as `entry/case/dtype/kernel`."""
    compiled: dict[str, Any] = {}
    for case, dtype in _shipped(entry, implementation):
        kernels.clear()
        inputs = entry.make(case, dtype)
        tensors = [t.requires_grad_(entry.differentiable) for t in inputs.tensors.values()]
        leaves = dict(zip(inputs.tensors, tensors, strict=True))
        outputs = outputs_of(entry.function(**leaves, **inputs.constants))
        if entry.differentiable:
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        prefix = f"{entry.name}/{case.name}/{_DTYPE_NAMES[dtype]}"
        compiled |= {f"{prefix}/{name}": kernel for name, kernel in kernels.items()}
    return compiled


def _read_all(compiled: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Resources by key; equal machine code is read once, two at a time."""
    # Many cases compile to the same code: disassembling is the slow part.
    distinct = {kernel.asm["cubin"]: kernel for kernel in compiled.values()}
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(distinct, pool.map(read_resources, distinct.values()), strict=True))
    return {key: asdict(found[kernel.asm["cubin"]]) for key, kernel in compiled.items()}


def compile_all(entries: Iterable[Entry]) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Resources of everything that ships, and the ladder rows that no shipped case reaches."""
    reached: set[tuple[int, int]] = set()
    ladders: dict[int, launch.Ladder] = {}
    pick = launch.pick

    def recorded(ladder: launch.Ladder, size: int) -> launch.Launch:
        row = pick(ladder, size)
        # By identity: equal ladders of two ops are different ladders.
        ladders[id(ladder)] = ladder
        reached.add((id(ladder), ladder.index(row)))
        return row

    compiled: dict[str, Any] = {}
    chosen = list(entries)
    for implementation in _COMPILED:
        with _compiling(implementation) as kernels, mock.patch.object(launch, "pick", recorded):
            for entry in chosen:
                if registry.runs(entry, implementation):
                    compiled |= _compile_entry(entry, implementation, kernels)
    unreached = [
        f"{row} of {ladder}"
        for identity, ladder in ladders.items()
        for index, row in enumerate(ladder)
        if (identity, index) not in reached
    ]
    return _read_all(compiled), unreached
