"""Which implementation runs an op: the caller's explicit choice, or `auto`, always with a reason.

`auto` takes a kernel only if it is proven: a row that is green on this compute capability and
Triton for the installed source, committed in `correctness.jsonl` or written on this machine by
`phi4 kernels qualify`. Where the proven kernels were timed together with torch on this device, it
takes the fastest. An implementation behind the speed gate must also be faster than the one that it
would replace, by a committed row of `speed.jsonl`. Everything else is experimental and runs only
when named; the same holds for an implementation that is not bitwise reproducible. There is no
fallback: a named implementation that cannot run is an error, and `auto` excludes those that do not
serve a call before it chooses.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from phi4_kernels import cuda_library, registry
from phi4_kernels.errors import DeviceError, ImplementationError
from phi4_kernels.evidence import SPEED_GATED, GpuMachine, KernelEvidence, machine_of, read_rows

CORRECTNESS_ROWS = registry.ROOT / "correctness.jsonl"
SPEED_ROWS = registry.ROOT / "speed.jsonl"
# Without times our kernels come first. cudnn is not bitwise reproducible and never automatic.
_PREFERENCE = ("gluon", "cuda", "triton", "flash")
_calls: ContextVar[Counter[tuple[str, str]] | None] = ContextVar("phi4_kernels_calls", default=None)
_log = logging.getLogger("phi4_kernels")


@dataclass(frozen=True, slots=True)
class Choice:
    """The implementation that runs an op on a device, and the reason."""

    op: str
    implementation: str
    reason: str

    def describe(self) -> str:
        """One line for the log."""
        return f"{self.op}: {self.implementation} ({self.reason})"


def debug() -> bool:
    """Whether PHI4_KERNELS_DEBUG=1 enables checks that read device memory, and so synchronise."""
    return os.environ.get("PHI4_KERNELS_DEBUG", "0") == "1"


def interpreting() -> bool:
    """Whether TRITON_INTERPRET=1 selects Triton's CPU interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def cache_file() -> Path:
    """File of the rows that were written on this machine, for this user's later runs."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "phi4" / "kernels.jsonl"


def known() -> KernelEvidence:
    """Committed rows, then those written on this machine."""
    return KernelEvidence(read_rows(CORRECTNESS_ROWS, cache_file()), read_rows(SPEED_ROWS))


def candidates(op: str) -> list[str]:
    """Kernels of an op, in the order in which `auto` prefers them without times."""
    return [name for name in _PREFERENCE if name in registry.implementations(op)]


def _automatic(
    op: str,
    device: torch.device,
    step: str | None,
    needs: tuple[str, ...],
    evidence: KernelEvidence,
) -> Choice:
    if device.type != "cuda":
        return Choice(op, "torch", f"auto: tensors are on {device.type}")
    machine = machine_of(device)
    # Proven here, faster where a gate requires it, able to serve the call, and installed.
    proven = [
        name
        for name in candidates(op)
        if evidence.proof(op, name, machine)
        and evidence.is_faster(op, name, machine.device)
        and registry.provides(op, name, step)
        and not registry.unserved(op, name, (*needs, registry.EQUAL_BITS))
        and not (name in registry.FOREIGN and registry.missing(op, name))
    ]
    if not proven:
        reason = f"auto: no kernel of this source is proven on {machine.capability}"
        red = [n for n in candidates(op) if evidence.verdict(op, n, machine)]
        return Choice(op, "torch", f"{reason}; red: {', '.join(red)}" if red else reason)
    if proven[0] == "cuda" and (missing := cuda_library.missing()):
        return Choice(op, "torch", f"auto: {missing}")
    return _fastest(op, proven, machine, evidence)


def _fastest(op: str, proven: list[str], machine: GpuMachine, evidence: KernelEvidence) -> Choice:
    """Choose among proven implementations and torch: the fastest if timed, else the preferred."""
    # Only times within one row are comparable: they were measured together on one device.
    timed = evidence.times(op, [*proven, "torch"], machine)
    # A gated kernel was timed by its gate, in every case and pass.
    if timed is None or proven[0] in SPEED_GATED:
        row = evidence.proof(op, proven[0], machine)
        assert row is not None, "what is proven has a row"
        where = f"proven on {machine.capability}, commit {row['commit']}"
        return Choice(op, proven[0], f"auto: {where}")
    times = {name: timed["us"][name] for name in (*proven, "torch")}
    microseconds = {name: us for name, us in times.items() if us is not None}
    if not microseconds:
        return Choice(op, proven[0], f"auto: proven on this {machine.device}; none could be timed")
    # torch takes part: a proven kernel that is slower is not taken.
    best = min(microseconds, key=microseconds.__getitem__)
    shown = ", ".join(f"{name} {us:.1f} us" for name, us in microseconds.items())
    return Choice(op, best, f"auto: fastest that is proven on this {machine.device}: {shown}")


@cache
def choose(
    op: str,
    requested: str,
    device: torch.device,
    step: str | None = None,
    needs: tuple[str, ...] = (),
    evidence: KernelEvidence | None = None,
) -> Choice:
    """Decide once per process, and log the decision once.

    Args:
        op: one of registry.OPS.
        requested: `auto` or the name of an implementation.
        device: where the tensors are.
        step: function of an implementation's module that the call needs; some modules lack it.
        needs: other requirements that some implementations do not serve; see registry.unserved.
        evidence: rows about the implementations; None reads `known`.

    Raises:
        ImplementationError: no such op or implementation, or it cannot be imported or loaded, or it
            has no such step, or does not serve the needs.
        DeviceError: the implementation cannot use this device.
    """
    if op not in registry.OPS:
        raise ImplementationError(f"no op {op!r}; there are {', '.join(registry.OPS)}")
    evidence = evidence or known()
    if requested == "auto":
        choice = _automatic(op, device, step, needs, evidence)
    else:
        _check_named(op, requested, step, needs)
        choice = Choice(op, requested, _named_reason(op, requested, device, evidence))
    if choice.implementation == "cuda":
        cuda_library.load()
    _log.info("%s", choice.describe())
    return choice


def _check_named(op: str, name: str, step: str | None, needs: tuple[str, ...]) -> None:
    """Raise ImplementationError unless an implementation has the step and serves the needs."""
    unserved = registry.unserved(op, name, needs)
    if registry.provides(op, name, step) and not unserved:
        return
    others = [
        other
        for other in registry.implementations(op)
        if registry.provides(op, other, step) and not registry.unserved(op, other, needs)
    ]
    lack = f"does not serve {' or '.join(unserved)}" if unserved else f"has no {step!r}"
    raise ImplementationError(
        f"{op}: implementation {name!r} {lack}; use one of {', '.join(others)}"
    )


def _named_reason(op: str, name: str, device: torch.device, evidence: KernelEvidence) -> str:
    if name == "torch":
        return "named"
    if device.type == "cuda":
        if name in registry.FOREIGN and (reason := registry.missing(op, name)):
            raise ImplementationError(
                f"{op}: implementation {name!r} is absent: {reason}, or use 'triton'"
            )
        machine = machine_of(device)
        is_proven = evidence.proof(op, name, machine)
        return "named" if is_proven else f"named; experimental on {machine.capability}"
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


def resolve(
    op: str,
    requested: str,
    device: torch.device,
    step: str | None = None,
    needs: tuple[str, ...] = (),
) -> str:
    """Name of the implementation that runs this call; counts it for `count_calls`.

    torch.compile calls it while tracing and keeps the result, so compiled calls are not counted.
    """
    choice = choose(op, requested, device, step, needs)
    if (calls := _calls.get()) is not None:
        calls[op, choice.implementation] += 1
    return choice.implementation


# What torch.compiler.assume_constant_result sets; calling it imports torch's compiler, half a
# second of every process.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]  # functions have attributes


@contextmanager
def count_calls() -> Iterator[Counter[tuple[str, str]]]:
    """Count the calls made inside, by (op, implementation): proof that a kernel was used."""
    calls: Counter[tuple[str, str]] = Counter()
    token = _calls.set(calls)
    try:
        yield calls
    finally:
        _calls.reset(token)


def status() -> list[dict[str, str]]:
    """One row per op and implementation: its state, and the evidence row behind it."""
    return [_status_of(op, name) for op in registry.OPS for name in registry.implementations(op)]


def _status_of(op: str, name: str) -> dict[str, str]:
    row = {"op": op, "implementation": name, "device": "", "commit": "", "date": ""}
    if name == "torch":
        return row | {"state": "always available"}
    rows = [row for row in known().rows if row.get("kind", "correctness") == "correctness"]
    past = [entry for entry in rows if (entry["op"], entry["implementation"]) == (op, name)]
    source = registry.source_digest(op, name)
    # Rows of another source prove nothing about this one, but show that there was a run.
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
    notes = [state, registry.missing(op, name)]
    notes += [] if registry.is_deterministic(op, name) else ["not deterministic, never automatic"]
    return row | {"state": "; ".join(filter(None, notes))}
