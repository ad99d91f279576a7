"""Self-qualification: check the kernels on this machine, and time them together with torch.

Committed rows do not cover every GPU, compiler and source. Missing rows are written within a minute
on the user's own GPU: every implementation runs two sizes of each of its functions and is checked
by the error rule, guard bands and bitwise equality of two runs; green ones are timed with torch.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from phi4_kernels import dispatch, registry
from phi4_kernels.evidence import SPEED_GATED, GpuMachine, KernelEvidence, Row
from phi4_kernels.qualification.cache import RowCache, held

LIMIT_SECONDS = 60.0
"""For all ops together."""
_PROOF_SHARE = 0.7
"""Share of the limit for correctness checks; the rest is for times."""

Candidate = tuple[str, str]
"""Names of an op and of one of its implementations."""
KernelVerdict = Literal["proven", "red", "not in time", "absent"]


class Prover(Protocol):
    """A device that runs kernels; tests simulate one."""

    machine: GpuMachine

    def columns(self) -> Row:
        """The machine's columns of every row."""

    def prove(
        self, candidates: Sequence[Candidate], seconds: float
    ) -> Iterator[tuple[Candidate, dict[str, Any] | None]]:
        """Check candidates; yields (candidate, result) in order, None where time ran out.

        A result has num_checks, worst_margin and the messages of red checks by name, `red`.
        """

    def time(self, op: str, names: Sequence[str]) -> dict[str, float | None]:
        """Microseconds of one case of an op by implementation; None of one that cannot run it."""


@dataclass(frozen=True)
class KernelFinding:
    """Current state of one implementation on this machine."""

    op: str
    implementation: str
    verdict: KernelVerdict
    detail: str = ""

    def describe(self) -> str:
        """One line for a user."""
        detail = f": {self.detail}" if self.detail else ""
        return f"{self.op} {self.implementation}: {self.verdict}{detail}"


@dataclass(frozen=True)
class Qualification:
    """Result of a qualification."""

    evidence: KernelEvidence
    """All evidence, including rows that could not be written."""
    findings: tuple[KernelFinding, ...]
    rows: tuple[Row, ...]
    """Rows of this qualification."""
    seconds: float
    problem: str | None
    """Why the rows could not be kept for the next run; None if they were."""


def is_needed(
    machine: GpuMachine, evidence: KernelEvidence, ops: Sequence[str] = registry.OPS
) -> bool:
    """Whether a candidate lacks a row of this device, source and Triton, or times."""
    return bool(_unproven(machine, evidence, ops) or _untimed(machine, evidence, ops))


def qualify(
    prover: Prover,
    *,
    ops: Sequence[str] = registry.OPS,
    again: bool = False,
    limit_seconds: float = LIMIT_SECONDS,
    cache: Path | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Qualification:
    """Write the rows that this machine lacks to the user's cache.

    Args:
        prover: runs the kernels.
        ops: which ops.
        again: make all rows again.
        limit_seconds: checks not done by then are left to the next call.
        cache: file of the rows; None takes the user's.
        clock: returns seconds.
    """
    begun, machine = clock(), prover.machine
    with held(cache or dispatch.cache_file(), wait_seconds=2 * limit_seconds) as kept:
        # Read under the lock: another rank or run may have just written them.
        work = _Qualifying(prover, kept, dispatch.known())
        known = KernelEvidence((), work.evidence.speed) if again else work.evidence
        # Checks first, at most 70% of the time: an unproven kernel never runs, one without times
        # does.
        missing = _unproven(machine, known, ops)
        work.prove(missing, max(0.0, begun + _PROOF_SHARE * limit_seconds - clock()))
        known = KernelEvidence(tuple(work.rows)) if again else work.evidence
        for op, names in _untimed(machine, known, ops):
            # Ops without times are timed by the next run.
            if clock() - begun >= limit_seconds:
                break
            work.time(op, names)
    return Qualification(
        work.evidence,
        tuple(_findings(machine, work, ops)),
        tuple(work.rows),
        clock() - begun,
        kept.problem,
    )


class _Qualifying:
    """Collects rows and writes each at once, so that a kill loses at most one."""

    def __init__(self, prover: Prover, cache: RowCache, evidence: KernelEvidence) -> None:
        self.rows: list[Row] = []
        self.evidence = evidence
        self.red: dict[Candidate, str] = {}
        self._prover, self._cache = prover, cache

    def prove(self, candidates: Sequence[Candidate], seconds: float) -> None:
        for (op, name), result in self._prover.prove(candidates, seconds):
            if result is None:
                continue
            if result["red"]:
                check, message = next(iter(result["red"].items()))
                self.red[op, name] = f"{check}: {message}"
            self._add(
                {
                    "kind": "correctness",
                    "op": op,
                    "implementation": name,
                    "source": registry.source_digest(op, name),
                    "green": not result["red"],
                    "num_checks": result["num_checks"],
                    "worst_margin": round(result["worst_margin"], 3),
                }
            )

    def time(self, op: str, names: Sequence[str]) -> None:
        sources = {name: registry.source_digest(op, name) for name in names}
        us = {name: us and round(us, 2) for name, us in self._prover.time(op, names).items()}
        self._add({"kind": "time", "op": op, "us": us, "sources": sources})

    def _add(self, row: Row) -> None:
        row = row | self._prover.columns()
        self.rows.append(row)
        self.evidence = self.evidence.with_rows([row])
        self._cache.keep(row)


def _candidates(ops: Sequence[str]) -> list[Candidate]:
    """Implementations that qualification covers; gated kernels use the speed gate."""
    return [(op, n) for op in ops for n in dispatch.candidates(op) if n not in SPEED_GATED]


def _unproven(machine: GpuMachine, evidence: KernelEvidence, ops: Sequence[str]) -> list[Candidate]:
    return [
        (op, name)
        for op, name in _candidates(ops)
        if not registry.missing(op, name)
        and not evidence.verdict(op, name, machine, same_device=True)
    ]


def _untimed(
    machine: GpuMachine, evidence: KernelEvidence, ops: Sequence[str]
) -> list[tuple[str, list[str]]]:
    """Ops with proven kernels that were never timed here, and the implementations to time."""
    found = []
    for op in ops:
        names = [
            name
            for other, name in _candidates([op])
            if not registry.missing(op, name) and evidence.proof(other, name, machine)
        ]
        if names and not evidence.times(op, [*names, "torch"], machine):
            found.append((op, [*names, "torch"]))
    return found


def _findings(
    machine: GpuMachine, work: _Qualifying, ops: Sequence[str]
) -> Iterator[KernelFinding]:
    for op, name in _candidates(ops):
        row = work.evidence.verdict(op, name, machine, same_device=True)
        if reason := registry.missing(op, name):
            yield KernelFinding(op, name, "absent", reason)
        elif row is None:
            yield KernelFinding(op, name, "not in time", "the next start continues with it")
        elif not row["green"]:
            detail = work.red.get((op, name), f"found on {row['date']}")
            yield KernelFinding(op, name, "red", detail)
        else:
            checks = f"{row['num_checks']} checks, worst {row['worst_margin']:.2f} of the rule"
            timed = work.evidence.times(op, [name, "torch"], machine) or {"us": {}}
            times = ", ".join(f"{n} {us:.1f} us" for n, us in timed["us"].items() if us)
            yield KernelFinding(op, name, "proven", f"{checks}; {times or 'not timed'}")
