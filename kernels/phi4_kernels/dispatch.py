"""Which implementation runs an op: the caller's explicit choice, or `auto`, always with a reason.

`auto` takes a kernel only on proof: a committed row of `correctness.jsonl` that is green on this
compute capability for the very source that is installed. An
implementation behind the speed gate must also be faster than the one it would replace on this very
device, by a committed row of `speed.jsonl`. Everything else is experimental and
runs only when named. There is no fallback: a named implementation that cannot run is an error.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from phi4_kernels import cuda_library, registry
from phi4_kernels.errors import DeviceError, ImplementationError

CORRECTNESS_ROWS = registry.ROOT / "correctness.jsonl"
SPEED_ROWS = registry.ROOT / "speed.jsonl"
_PREFERENCE = ("gluon", "cuda", "triton")
SPEED_GATED = {"gluon": "triton"}
"""Implementations behind the speed gate, and the one that each has to beat."""
_calls: ContextVar[Counter[tuple[str, str]] | None] = ContextVar("phi4_kernels_calls", default=None)
_log = logging.getLogger("phi4_kernels")


@dataclass(frozen=True, slots=True)
class Choice:
    """What runs an op on a device, and why."""

    op: str
    implementation: str
    reason: str

    def describe(self) -> str:
        """One line for the log."""
        return f"{self.op}: {self.implementation} ({self.reason})"


def debug() -> bool:
    """Whether PHI4_KERNELS_DEBUG=1 asks for checks that read device memory, and so synchronise."""
    return os.environ.get("PHI4_KERNELS_DEBUG", "0") == "1"


def interpreting() -> bool:
    """Whether TRITON_INTERPRET=1 asks for Triton's CPU interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _read(path: Path) -> tuple[dict[str, Any], ...]:
    if not path.exists():
        return ()
    return tuple(json.loads(line) for line in path.read_text().splitlines() if line)


def proof(op: str, implementation: str, capability: str) -> dict[str, Any] | None:
    """The newest row of this very source on this capability, if it is green."""
    digest = registry.source_digest(op, implementation)
    wanted = (op, implementation, capability, digest)
    keys = ("op", "implementation", "capability", "source")
    rows = [row for row in _read(CORRECTNESS_ROWS) if tuple(row[key] for key in keys) == wanted]
    return rows[-1] if rows and rows[-1]["green"] else None


def is_faster(op: str, implementation: str, device_name: str) -> bool:
    """Whether the newest speed row of these very sources on this device says so.

    True for an implementation that is not behind the speed gate.
    """
    if implementation not in SPEED_GATED:
        return True
    against = SPEED_GATED[implementation]
    wanted = {
        "op": op,
        "implementation": implementation,
        "against": against,
        "device": device_name,
        "source": registry.source_digest(op, implementation),
        "against_source": registry.source_digest(op, against),
    }
    rows = [row for row in _read(SPEED_ROWS) if wanted.items() <= row.items()]
    return bool(rows) and rows[-1]["faster"]


def _automatic(op: str, device: torch.device, step: str | None) -> Choice:
    if device.type != "cuda":
        return Choice(op, "torch", f"auto: tensors are on {device.type}")
    capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
    for name in _PREFERENCE:
        if name not in registry.implementations(op):
            continue
        row = proof(op, name, capability)
        if not row or not is_faster(op, name, torch.cuda.get_device_name(device)):
            continue
        if not registry.provides(op, name, step):
            continue
        if name == "cuda" and (reason := cuda_library.missing()):
            return Choice(op, "torch", f"auto: {reason}")
        return Choice(op, name, f"auto: proven on {capability}, commit {row['commit']}")
    return Choice(op, "torch", f"auto: no kernel of this source is proven on {capability}")


@cache
def choose(op: str, requested: str, device: torch.device, step: str | None = None) -> Choice:
    """Decide once per process, and log the decision once.

    Args:
        op: one of registry.OPS.
        requested: `auto` or the name of an implementation.
        device: where the tensors are.
        step: function of an implementation's module that not every implementation has.

    Raises:
        ImplementationError: no such op or implementation, or it cannot be imported or loaded, or it
            has no such step.
        DeviceError: the implementation cannot use this device.
    """
    if op not in registry.OPS:
        raise ImplementationError(f"no op {op!r}; there are {', '.join(registry.OPS)}")
    if requested == "auto":
        choice = _automatic(op, device, step)
    else:
        choice = Choice(op, requested, _named_reason(op, requested, device, step))
    if choice.implementation == "cuda":
        cuda_library.load()
    _log.info("%s", choice.describe())
    return choice


def _named_reason(op: str, name: str, device: torch.device, step: str | None) -> str:
    if not registry.provides(op, name, step):
        others = [other for other in registry.implementations(op) if other != name]
        raise ImplementationError(
            f"{op}: implementation {name!r} has no {step!r}; use one of {', '.join(others)}"
        )
    if name == "torch":
        return "named"
    if device.type == "cuda":
        capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
        return "named" if proof(op, name, capability) else f"named; experimental on {capability}"
    if name == "cuda" and device.type == "cpu":
        return "named; host form of the kernel's arithmetic"
    if name == "triton" and interpreting():
        from phi4_kernels import interpreter

        interpreter.repair()
        return "named; interpreted on the CPU"
    others = ", or start with TRITON_INTERPRET=1 to interpret Triton on the CPU"
    raise DeviceError(
        f"{op}: implementation {name!r} got tensors on {device.type}; expected cuda; move them, or "
        f"use 'torch'{others if name == 'triton' else ''}"
    )


@torch.compiler.assume_constant_result
def resolve(op: str, requested: str, device: torch.device, step: str | None = None) -> str:
    """Name of the implementation that runs this call; counts it for `count_calls`.

    torch.compile calls it while it traces and keeps the answer, so compiled calls are not counted.
    """
    choice = choose(op, requested, device, step)
    if (calls := _calls.get()) is not None:
        calls[op, choice.implementation] += 1
    return choice.implementation


@contextmanager
def count_calls() -> Iterator[Counter[tuple[str, str]]]:
    """Count the calls made inside, by (op, implementation): proof that a kernel was used."""
    token = _calls.set(Counter())
    try:
        yield _calls.get()
    finally:
        _calls.reset(token)


def status() -> list[dict[str, str]]:
    """One row per op and implementation: its state, and the last row that says so."""
    return [_status_of(op, name) for op in registry.OPS for name in registry.implementations(op)]


def _status_of(op: str, name: str) -> dict[str, str]:
    row = {"op": op, "implementation": name, "device": "", "commit": "", "date": ""}
    if name == "torch":
        return row | {"state": "always available"}
    rows = _read(CORRECTNESS_ROWS)
    past = [entry for entry in rows if (entry["op"], entry["implementation"]) == (op, name)]
    source = registry.source_digest(op, name)
    current = [entry for entry in past if entry["source"] == source]
    if not past:
        state = "experimental: never executed on a GPU"
    elif not current:
        state = "experimental: changed since its last row"
    else:
        state = "proven" if current[-1]["green"] else "experimental: last row is red"
    if past:
        last = (current or past)[-1]
        row |= {key: last[key] for key in ("device", "commit", "date")}
    reason = cuda_library.missing() if name == "cuda" else None
    return row | {"state": f"{state}; {reason}" if reason else state}
