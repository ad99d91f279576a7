"""The library of CUDA ops: where its build lies, loading it, and why it is missing when it is.

The CUDA ops stand in a table of their own and not in the registry, whose gates interpret and
compile Triton. A build is filed under the hash of the sources and flags it came from, so a library
of other sources is never loaded. Loading needs no GPU: the ops then also take CPU tensors, by the
host form of the same arithmetic.

The library's operators, `phi4_native::`, take a stream, which its ABI cannot read on a machine
without CUDA. The public ones, `phi4::`, take none: they hand over what is current when they run, so
that they can be captured, compiled and called on any device.
"""

import hashlib
import importlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from phi4_kernels import dispatch, operators, registry
from phi4_kernels.dispatch import Choice
from phi4_kernels.errors import DeviceError, ImplementationError

OPS = ("adamw", "fp8_cast", "grad_norm")
SOURCES = registry.ROOT.parents[1] / "csrc"
BUILDS = registry.ROOT.parents[1] / "build/csrc"
LIBRARY = "libphi4_csrc.so"
NVCC_FLAGS = ("-arch=sm_90a", "-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fPIC")
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
"""The library runs with torch 2.11 and newer."""
_SUFFIXES = (".cpp", ".cu", ".cuh", ".h")
_log = logging.getLogger("phi4_kernels")


@cache
def entries() -> dict[str, registry.Entry]:
    """What gates and benchmark run of the CUDA ops, by name; see registry.entries."""
    modules = [importlib.import_module(f"phi4_kernels.{op}.cases") for op in OPS]
    return {entry.name: entry for module in modules for entry in module.ENTRIES}


def sources() -> list[Path]:
    """What a build depends on."""
    return sorted(path for path in SOURCES.rglob("*") if path.suffix in _SUFFIXES)


@cache
def digest() -> str:
    """Hash of sources and flags."""
    found = hashlib.sha256(" ".join((*NVCC_FLAGS, TORCH_TARGET)).encode())
    for path in sources():
        found.update(path.relative_to(SOURCES).as_posix().encode())
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def folder() -> Path:
    """Where the build of the present sources is, or would be."""
    return BUILDS / digest()


def missing() -> str | None:
    """Why the library cannot be loaded; None where it is built."""
    if not SOURCES.is_dir():
        return f"no csrc/ beside the package at {SOURCES}; run from a checkout"
    if not (folder() / LIBRARY).exists():
        stale = any(BUILDS.glob(f"*/{LIBRARY}"))
        state = "built from other sources" if stale else "not built"
        return f"csrc is {state}; run `make csrc` where nvcc is installed"
    return None


@cache
def load() -> None:
    """Load the library once, which defines its `torch.ops.phi4_native` operators.

    Raises:
        ImplementationError: it is not built, or this torch cannot load it.
    """
    if reason := missing():
        raise ImplementationError(f"implementation 'cuda': {reason}, or use 'torch'")
    try:
        torch.ops.load_library(str(folder() / LIBRARY))
    except OSError as error:
        raise ImplementationError(
            f"implementation 'cuda' cannot be loaded beside torch {torch.__version__} ({error}); "
            "expected torch 2.11 or newer; rebuild with `make csrc`, or use 'torch'"
        ) from error


def register(schema: str, fake: Callable[..., Any]) -> Any:
    """Define `phi4::<schema>` over the library's operator of that name and a last `int stream`.

    Args:
        schema: name, arguments and results in torch's schema language; the first argument is a
            tensor or a list of them, whose device is used.
        fake: makes outputs of the right shape, dtype and device without computing them.

    Returns:
        The operator's default overload. A call loads the library.
    """
    name = schema.partition("(")[0]

    def launch(*args: Any) -> Any:
        load()
        first = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
        with on_device(first.device) as stream:
            return getattr(torch.ops.phi4_native, name).default(*args, stream)

    return operators.define(name, schema.removeprefix(name), launch, fake)


@contextmanager
def on_device(device: torch.device) -> Iterator[int]:
    """Make a device current, and give its current stream as the ops take it; 0 on the CPU."""
    if device.type == "cpu":
        yield 0
        return
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


@cache
def choose(op: str, requested: str, device: torch.device) -> Choice:
    """Decide once per process whether `torch` or `cuda` runs an op, and log it once.

    Args:
        op: one of OPS.
        requested: `auto`, `torch` or `cuda`. `auto` takes `cuda` only on CUDA tensors and on a
            green committed row of this very source; `cuda` on CPU tensors runs the host form.
        device: where the tensors are.

    Raises:
        ImplementationError: no such op or implementation, or the library is missing.
        DeviceError: the tensors are neither on the CPU nor on a CUDA device.
    """
    if op not in OPS:
        raise ImplementationError(f"no CUDA op {op!r}; there are {', '.join(OPS)}")
    if requested not in ("auto", "torch", "cuda"):
        raise ImplementationError(
            f"{op}: no implementation {requested!r}; expected auto, torch or cuda"
        )
    choice = _decide(op, requested, device)
    if choice.implementation == "cuda":
        load()
    _log.info("%s", choice)
    return choice


@torch.compiler.assume_constant_result
def resolve(op: str, requested: str, device: torch.device) -> str:
    """Name of the implementation that runs a call; torch.compile keeps the answer it got."""
    return choose(op, requested, device).implementation


def _decide(op: str, requested: str, device: torch.device) -> Choice:
    if requested == "torch":
        return Choice(op, "torch", "named")
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"{op}: tensors are on {device.type}; expected cpu or cuda; move them")
    if device.type == "cpu":
        named = Choice(op, "cuda", "named; host form of the kernel's arithmetic")
        return named if requested == "cuda" else Choice(op, "torch", "auto: tensors are on cpu")
    capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
    row = _last_row(op, capability)
    proven = row is not None and row["source"] == digest() and row["green"]
    if requested == "cuda":
        return Choice(op, "cuda", "named" if proven else f"named; experimental on {capability}")
    if not proven:
        return Choice(op, "torch", f"auto: no kernel of this source is proven on {capability}")
    if reason := missing():
        return Choice(op, "torch", f"auto: {reason}")
    return Choice(op, "cuda", f"auto: proven on {capability}, commit {row['commit']}")


def _last_row(op: str, capability: str | None = None) -> dict[str, Any] | None:
    if not dispatch.CORRECTNESS_ROWS.exists():
        return None
    rows = [json.loads(line) for line in dispatch.CORRECTNESS_ROWS.read_text().splitlines() if line]
    mine = [row for row in rows if (row["op"], row["implementation"]) == (op, "cuda")]
    if capability is not None:
        mine = [row for row in mine if row["capability"] == capability]
    return mine[-1] if mine else None


def status() -> list[dict[str, str]]:
    """One row per CUDA op, as dispatch.status gives them."""
    return [_status_of(op) for op in OPS]


def _status_of(op: str) -> dict[str, str]:
    row = {"op": op, "implementation": "cuda", "device": "", "commit": "", "date": ""}
    last = _last_row(op)
    if last is None:
        state = "experimental: never executed on a GPU"
    elif last["source"] != digest():
        state = "experimental: changed since its last row"
    else:
        state = "proven" if last["green"] else "experimental: last row is red"
    if last is not None:
        row |= {key: last[key] for key in ("device", "commit", "date")}
    reason = missing()
    return row | {"state": f"{state}; {reason}" if reason else state}
