"""The ops, and what each op folder provides to tests, resource gate and benchmarks.

An op is a folder: `op.py` (the public functions), `reference.py` (their definition),
`<name>_impl.py` (one per implementation) and `cases.py`, whose `ENTRIES` describe every public
function. A folder that is listed in OPS is tested, gated and timed.

Implementations are of different kinds: `torch` always runs; `triton` and `gluon` are Python, which
is interpreted or emulated on a CPU; `cuda` calls the library that is compiled from csrc; `flash`
and `cudnn` call kernels of other libraries, which a machine may lack.
"""

import hashlib
import importlib
import importlib.util
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from phi4_kernels import cuda_library
from phi4_kernels.errors import ImplementationError
from phi4_kernels.program_text import program_text

OPS = (
    "adamw",
    "attention",
    "cross_entropy",
    "fp8_cast",
    "grad_norm",
    "rms_norm",
    "rope",
    "swiglu",
)
ROOT = Path(__file__).parent
FOREIGN = ("cudnn", "flash")
"""Implementations that call kernels of other libraries. Their modules define `missing`, the reason
why this machine lacks them, and `library`, the library's name and version."""
EQUAL_BITS = "a caller that asks for equal bits of two runs"
"""The need that an implementation with DETERMINISTIC = False does not serve."""


@dataclass(frozen=True, slots=True)
class Case:
    """One set of sizes, whose meaning is defined by the entry's `make`."""

    name: str
    sizes: dict[str, Any]
    strided: bool = False
    """Inputs and incoming gradients have gaps between their rows."""
    needs: tuple[str, ...] = ()
    """Needs that some implementations do not serve; see `unserved`."""

    def generator(self) -> torch.Generator:
        """A generator on the default device, seeded by the case's name, so runs draw the same."""
        device = torch.get_default_device()
        return torch.Generator(device).manual_seed(zlib.crc32(self.name.encode()))


@dataclass(frozen=True, slots=True)
class CallInputs:
    """Arguments of an entry's function by name; only `tensors` are differentiated."""

    tensors: dict[str, Tensor]
    constants: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cost:
    """The least work of one pass: each input read once, each output written once."""

    bytes: int
    flops: int
    formula: str

    def floor_seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """Least seconds of a correct kernel on a device with these ceilings."""
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One public function of an op."""

    op: str
    name: str
    function: Callable[..., Any]
    """Called with the inputs and `implementation=`."""
    reference: Callable[..., Any]
    """Called with the inputs; dtype-generic; the definition of the function."""
    make: Callable[[Case, torch.dtype], CallInputs]
    proof_cases: tuple[Case, ...]
    """Small: for numerics under the interpreter and on a GPU."""
    shipped_cases: tuple[Case, ...]
    """Reach every row of the launch ladders: for the resource gate."""
    bench_cases: tuple[Case, ...]
    cost: Callable[[Case, torch.dtype], dict[str, Cost]]
    """Per timed pass: `forward`, and `backward` where there is one."""
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
    differentiable: bool = True
    step: str | None = None
    """Function of an implementation's module that the entry runs, if some modules lack it."""
    timed: Callable[..., Any] | None = None
    """What the benchmark's forward calls instead, where `function` does more than the op."""


@cache
def entries(implementation: str | None = None) -> dict[str, Entry]:
    """All entries by name, or those of the ops that have an implementation of this name."""
    ops = [op for op in OPS if implementation is None or implementation in implementations(op)]
    modules = [importlib.import_module(f"phi4_kernels.{op}.cases") for op in ops]
    return {entry.name: entry for module in modules for entry in module.ENTRIES}


def implementations(op: str) -> tuple[str, ...]:
    """Names of the implementations in the op's folder."""
    return tuple(sorted(path.stem.removesuffix("_impl") for path in folder(op).glob("*_impl.py")))


def default_kernel(op: str) -> str:
    """The implementation that checks and benchmarks run when none is named."""
    return next(name for name in ("triton", "cuda", "torch") if name in implementations(op))


@cache
def implementation(op: str, name: str) -> ModuleType:
    """The module of one implementation.

    Raises:
        ImplementationError: the op has no such implementation, or importing it fails.
    """
    if name not in implementations(op):
        raise ImplementationError(
            f"{op}: no implementation {name!r}; there are {', '.join(implementations(op))}"
        )
    try:
        return importlib.import_module(f"phi4_kernels.{op}.{name}_impl")
    except ImportError as error:
        raise ImplementationError(
            f"{op}: implementation {name!r} cannot be imported ({error}); install what it "
            "needs, or use 'torch'"
        ) from error


def provides(op: str, name: str, step: str | None) -> bool:
    """Whether an implementation has an optional step; None is a step that all have.

    Raises:
        ImplementationError: see implementation.
    """
    module = implementation(op, name)
    return step is None or hasattr(module, step)


def runs(entry: Entry, name: str) -> bool:
    """Whether the entry's op has an implementation of this name that runs the entry."""
    return name in implementations(entry.op) and provides(entry.op, name, entry.step)


def is_deterministic(op: str, name: str) -> bool:
    """Whether an implementation is bitwise reproducible: its DETERMINISTIC, True by default."""
    return getattr(implementation(op, name), "DETERMINISTIC", True)


def unserved(op: str, name: str, needs: tuple[str, ...]) -> tuple[str, ...]:
    """The needs of a caller that an implementation does not serve.

    Args:
        op: one of OPS.
        name: one of its implementations.
        needs: entries of the modules' NOT_SERVED, `EQUAL_BITS`, or `need_of` a dtype, which a
            module with DTYPES serves only if they contain it.
    """
    module = implementation(op, name)
    taken = getattr(module, "DTYPES", None)
    left_out = [] if taken is None else [need_of(dtype) for dtype in _FLOATS if dtype not in taken]
    refused = {*getattr(module, "NOT_SERVED", ()), *left_out}
    if not is_deterministic(op, name):
        refused.add(EQUAL_BITS)
    return tuple(need for need in needs if need in refused)


_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def need_of(dtype: torch.dtype) -> str:
    """The need for an implementation that takes a dtype."""
    return f"{str(dtype).removeprefix('torch.')} tensors"


def missing(op: str, name: str) -> str | None:
    """Why an implementation's library is missing on this machine; None if it is not."""
    if name == "cuda":
        return cuda_library.missing()
    if name in ("triton", "gluon") and importlib.util.find_spec("triton") is None:
        return "triton is not installed; install it in the environment of torch"
    is_foreign = name in FOREIGN and name in implementations(op)
    return implementation(op, name).missing() if is_foreign else None


def folder(op: str) -> Path:
    """Folder of the op."""
    return ROOT / op


def _program(path: Path) -> bytes:
    return program_text(path.read_text(encoding="utf-8")).encode()


@cache
def source_digest(op: str, name: str) -> str:
    """Hash of the programs that determine what an implementation computes; a row proves only these.

    A file or folder `<name>_*` belongs to the implementation of that name, the others to all of
    them. Comments and docstrings are left out (program_text). For `cuda` all bytes of csrc's
    sources are hashed. Kernels of other libraries are included by their version.
    """
    if name == "cuda":
        return cuda_library.digest()
    # `triton_tiles.py` belongs to Triton, `cases.py` to all implementations.
    others = tuple(f"{other}_" for other in implementations(op) if other != name)
    digest = hashlib.sha256()
    for path in sorted(folder(op).rglob("*.py")):
        parts = path.relative_to(folder(op)).parts
        if not any(part.startswith(others) for part in parts):
            digest.update(_program(path))
    for path in (ROOT / "launch.py", ROOT / "operators.py"):
        digest.update(_program(path))
    if name in FOREIGN:
        digest.update(implementation(op, name).library().encode())
    return digest.hexdigest()[:16]
