"""Evidence about implementations: rows of GPU runs, committed or written on this machine.

A row of kind `correctness` records that an implementation of one source was green or red on a
device; one of kind `time` records the times of an op's implementations, measured together. Rows are
never changed: the newest matching row counts.
"""

import importlib.metadata
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from phi4_kernels import registry

Row = dict[str, Any]

SPEED_GATED = {"gluon": "triton"}
"""Implementations behind the speed gate, and the one that each has to beat."""


@dataclass(frozen=True, slots=True)
class GpuMachine:
    """What a kernel's result and speed depend on, apart from its source."""

    device: str
    """Name of the GPU."""
    capability: str
    triton: str
    """Version of the compiler; empty where it is not installed."""


def machine_of(device: torch.device) -> GpuMachine:
    """The machine description of a CUDA device."""
    capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
    return GpuMachine(torch.cuda.get_device_name(device), capability, triton_version())


@cache
def triton_version() -> str:
    """Version of the installed Triton; empty where there is none."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def read_rows(*paths: Path) -> tuple[Row, ...]:
    """Rows of files, in order; missing files and damaged lines are skipped."""
    rows: list[Row] = []
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        rows += filter(None, map(_row_of, lines))
    return tuple(rows)


def _row_of(line: str) -> Row | None:
    # A crash during a write leaves an incomplete line.
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("op"), str) else None


@dataclass(frozen=True, eq=False)
class KernelEvidence:
    """All rows that are known, oldest first."""

    rows: tuple[Row, ...]
    speed: tuple[Row, ...] = ()
    """Rows of the speed gate."""

    def with_rows(self, rows: Iterable[Row]) -> "KernelEvidence":
        """This evidence with newer rows added."""
        return KernelEvidence((*self.rows, *rows), self.speed)

    def verdict(
        self, op: str, implementation: str, machine: GpuMachine, *, same_device: bool = False
    ) -> Row | None:
        """The newest row, green or red, of the installed source on such a machine.

        Args:
            op: one of registry.OPS.
            implementation: one of the op's.
            machine: whose capability it must be; and whose Triton, where Triton compiles it.
            same_device: whether the device must be the same too.
        """
        wanted = {
            "op": op,
            "implementation": implementation,
            "capability": machine.capability,
            "source": registry.source_digest(op, implementation),
        }
        # csrc is compiled by nvcc, whose flags are in its digest.
        if implementation != "cuda":
            wanted["triton"] = machine.triton
        if same_device:
            wanted["device"] = machine.device
        # The newest counts, also a red one: a new driver may break a kernel.
        rows = [r for r in self._of("correctness") if wanted.items() <= r.items()]
        return rows[-1] if rows else None

    def proof(self, op: str, implementation: str, machine: GpuMachine) -> Row | None:
        """The row of `verdict` if it is green, else None."""
        row = self.verdict(op, implementation, machine)
        return row if row and row["green"] else None

    def times(self, op: str, names: Sequence[str], machine: GpuMachine) -> Row | None:
        """The newest times of the installed sources of these implementations, measured together.

        Returns:
            The row, or None where one of them was never timed on this device with the others.
        """
        sources = {name: registry.source_digest(op, name) for name in names}
        wanted = {"op": op, "device": machine.device, "triton": machine.triton}
        rows = [
            row
            for row in self._of("time")
            if wanted.items() <= row.items() and sources.items() <= row["sources"].items()
        ]
        return rows[-1] if rows else None

    def is_faster(self, op: str, implementation: str, device_name: str) -> bool:
        """Whether the newest speed gate row of the installed sources on this device is `faster`.

        True for an implementation that is not behind the gate.
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
        rows = [row for row in self.speed if wanted.items() <= row.items()]
        return bool(rows) and rows[-1]["faster"]

    def _of(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row.get("kind", "correctness") == kind]
