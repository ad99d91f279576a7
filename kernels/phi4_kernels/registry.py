"""The ops, and what each op folder hands to tests, resource gate and benchmarks.

An op is a folder: `op.py` (the public functions), `reference.py` (their definition),
`<name>_impl.py` (one per implementation) and `cases.py`, whose `ENTRIES` describe every public
function to the machinery. Naming the folder in OPS is all it takes to be tested, gated and timed.
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

from phi4_kernels.errors import ImplementationError

OPS = ("attention", "cross_entropy", "rms_norm", "rope", "swiglu")
ROOT = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Case:
    """One set of sizes; what they mean is between an entry's `make` and its function."""

    name: str
    sizes: dict[str, Any]
    strided: bool = False
    """Inputs and incoming gradients have gaps between their rows."""

    def generator(self) -> torch.Generator:
        """A generator on the default device, seeded by the case's name: runs draw alike."""
        device = torch.get_default_device()
        return torch.Generator(device).manual_seed(zlib.crc32(self.name.encode()))


@dataclass(frozen=True, slots=True)
class Inputs:
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
        """No correct kernel is faster on a device with these ceilings."""
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
    make: Callable[[Case, torch.dtype], Inputs]
    proof_cases: tuple[Case, ...]
    """Small: for numerics under the interpreter and on a GPU."""
    shipped_cases: tuple[Case, ...]
    """Reach every row of the launch ladders: for the resource gate."""
    bench_cases: tuple[Case, ...]
    cost: Callable[[Case, torch.dtype], dict[str, Cost]]
    """Per timed pass: `forward`, and `backward` where there is one."""
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
    differentiable: bool = True
    timed: Callable[..., Any] | None = None
    """What the benchmark's forward calls instead, where `function` does more than the op."""


@cache
def entries() -> dict[str, Entry]:
    """All entries of all ops by name."""
    modules = [importlib.import_module(f"phi4_kernels.{op}.cases") for op in OPS]
    return {entry.name: entry for module in modules for entry in module.ENTRIES}


def implementations(op: str) -> tuple[str, ...]:
    """Names of the implementations in the op's folder."""
    return tuple(sorted(path.stem.removesuffix("_impl") for path in folder(op).glob("*_impl.py")))


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


def folder(op: str) -> Path:
    """Where the op lives."""
    return ROOT / op


@cache
def source_digest(op: str, name: str) -> str:
    """Hash of the files that decide what an implementation computes: a row proves these alone.

    A file `<name>_*.py` belongs to the implementation of that name, the others to all of them.
    """
    others = tuple(f"{other}_" for other in implementations(op) if other != name)
    files = [path for path in sorted(folder(op).glob("*.py")) if not path.name.startswith(others)]
    digest = hashlib.sha256()
    for path in (*files, ROOT / "launch.py", ROOT / "operators.py"):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
