"""Overview of an op on this machine for a kernel developer: margins, resources, costs, times.

Without a GPU: margins of the error rule under Triton's interpreter or in csrc's host form,
resources of the machine code for sm_90, bytes, FLOPs and floor times, and the committed times. With
a GPU, the margins are measured on it, and the kernels are timed together with torch.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from phi4_kernels import cuda_library, dispatch, registry
from phi4_kernels.bench import ceilings, measure, report
from phi4_kernels.errors import GateError
from phi4_kernels.qualification.gpu import two_sizes
from phi4_kernels.registry import Entry
from phi4_kernels.testing import budgets, gates
from phi4_kernels.testing.interpreted import InterpretedProcess

Cells = tuple[str, ...]


@dataclass(frozen=True)
class OpTable:
    """A table with its title and a note."""

    title: str
    head: Cells
    rows: tuple[Cells, ...]
    note: str = ""


def overview(op: str, implementation: str | None = None) -> Iterator[OpTable]:
    """Yield the tables of an op as they become ready.

    Args:
        op: one of registry.OPS.
        implementation: the implementation to show; None takes the op's default kernel.
    """
    name = implementation or registry.default_kernel(op)
    yield _implementations(op)
    yield _margins(op, name)
    yield _resources(op)
    yield _work(op)
    yield _times_now(op, name) if torch.cuda.is_available() else _times_on_file(op)


def _implementations(op: str) -> OpTable:
    rows = [row for row in dispatch.status() if row["op"] == op]
    head = ("implementation", "state", "device", "commit", "source")
    cells = [
        (
            *(row[key] for key in head[:-1]),
            registry.source_digest(op, row["implementation"]),
        )
        for row in rows
    ]
    return OpTable("Implementations", head, tuple(cells))


def _margins(op: str, name: str) -> OpTable:
    """Margin of the error rule of each function, on two sizes."""
    where = "on the GPU" if torch.cuda.is_available() else _HOST_FORMS.get(name, "on the CPU")
    title = f"Error rule, {name} {where}; 1.00 is the limit"
    # An absent library is reported, not left out.
    if reason := registry.missing(op, name):
        return OpTable(title, (), (), f"not run: {reason}")
    if name == "gluon" and not torch.cuda.is_available():
        return OpTable(title, (), (), "not run: tests/kernels/test_gluon_attention.py emulates it")
    rows = []
    with _Checks(name) as checks:
        for check in two_sizes(op, name):
            margins, problem = checks.run(check)
            worst = max(margins, key=margins.__getitem__) if margins else ""
            shown = f"{margins[worst]:.2f} ({worst})" if margins else problem
            rows.append((*check, shown))
    return OpTable(title, ("function", "case", "dtype", "worst margin"), tuple(rows))


_HOST_FORMS = {"triton": "interpreted", "cuda": "in csrc's host form"}


class _Checks:
    """Runs numeric checks where the implementation runs."""

    def __init__(self, implementation: str) -> None:
        self._implementation = implementation
        is_interpreted = implementation == "triton" and not torch.cuda.is_available()
        self._process = InterpretedProcess() if is_interpreted else None

    def __enter__(self) -> "_Checks":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._process is not None:
            self._process.close()

    def run(self, check: gates.Check) -> tuple[dict[str, float], str]:
        """Margins by output and gradient, or an empty dict and the reason."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            if self._process is None:
                return gates.check_numbers(*check, self._implementation, device), ""
            entry, case, dtype = check
            function = "phi4_kernels.testing.gates:check_numbers"
            return self._process.call(function, entry=entry, case=case, dtype=dtype), ""
        except GateError as error:
            return {}, f"RED: {error}"


def _resources(op: str) -> OpTable:
    """Resources of the shipped launches; numbers that differ from the budget are marked."""
    head = ("kernel", "registers", "warps", "spill bytes", "shared bytes", "matrix", "128-bit")
    rows, title = [], "Machine code for sm_90"
    if dispatch.interpreting():
        return OpTable(title, (), (), "not compiled: TRITON_INTERPRET=1 is set; unset it")
    if "triton" in registry.implementations(op):
        command = [sys.executable, "-m", "phi4_kernels.testing", "compile", "--op", op, "--json"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return OpTable(title, (), (), f"not compiled: {done.stderr.strip()[-300:]}")
        found = json.loads(done.stdout)["found"]
        known = budgets.load() if budgets.path().exists() else {}
        rows += [_compiled(key, numbers, known.get(key, {})) for key, numbers in found.items()]
    rows += list(_csrc(op))
    return OpTable(title, head, tuple(rows), "" if rows else "nothing that is compiled")


def _compiled(key: str, found: dict[str, int], budget: dict[str, int]) -> Cells:
    def shown(*names: str) -> str:
        total = sum(found[name] for name in names)
        allowed = sum(budget.get(name, 0) for name in names)
        return f"{total} (budget {allowed})" if budget and total != allowed else str(total)

    return (
        key,
        shown("registers"),
        str(found["num_warps"]),
        shown("stack_bytes"),
        shown("shared_bytes"),
        shown("hgmma", "hmma"),
        shown("wide_loads", "wide_stores"),
    )


def _csrc(op: str) -> Iterator[Cells]:
    """Budgets of the op's CUDA kernels, which a build must meet."""
    files = [path for path in cuda_library.sources() if op in path.parts]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    for path in sorted(budgets.FOLDER.glob("csrc-*.json")) if text else ():
        for kernel, found in json.loads(path.read_text()).items():
            if re.search(rf"\b{re.escape(kernel.partition('<')[0])}\b", text):
                spills = found["spill_stores"] + found["spill_loads"]
                numbers = (found["registers"], "", spills, found["shared_bytes"], "", "")
                yield (f"{kernel} ({path.stem}, budget)", *map(str, numbers))


def _tasks(op: str) -> Iterator[measure.Pass]:
    for entry in registry.entries().values():
        if entry.op == op:
            yield from measure.passes(entry, torch.bfloat16)


def _work(op: str) -> OpTable:
    rates, rows = ceilings.NOMINAL, []
    for task in _tasks(op):
        floor = task.cost.floor_seconds(rates.bytes_per_second, rates.flops_per_second)
        where = (task.entry.name, task.mode, task.case.name, task.cost.formula)
        numbers = (f"{task.cost.bytes / 1e6:.1f}", f"{task.cost.flops / 1e9:.1f}")
        rows.append((*where, *numbers, f"{floor * 1e6:.1f}"))
    head = ("function", "pass", "case", "least bytes", "MB", "GFLOP", "floor, us")
    assumed = (
        f"floors are arithmetic for an H200: {rates.bytes_per_second / 1e12:.1f} TB/s, "
        f"{rates.flops_per_second / 1e12:.0f} TFLOP/s"
    )
    return OpTable("Least work in bf16", head, tuple(rows), assumed)


_TIME_HEAD = ("function", "pass", "case", "by", "us", "of floor", "useful rate")


def _time_cells(rows: Sequence[dict[str, Any]]) -> tuple[Cells, ...]:
    return tuple(
        (
            *(str(row[key]) for key in ("op", "mode", "case", "provider")),
            f"{row['p50_us']:.1f}",
            f"{row['percent_of_floor']:.0f}%",
            report.useful_rate(row),
        )
        for row in rows
    )


def _times_on_file(op: str) -> OpTable:
    names = {entry.name for entry in registry.entries().values() if entry.op == op}
    rows = [row for row in report.latest(report.load()) if row["op"] in names]
    devices = ", ".join(sorted({f"{row['device']} at commit {row['commit']}" for row in rows}))
    note = "" if rows else "no committed row; `make gpu` on a machine with a GPU writes them"
    return OpTable(f"Times on file: {devices or 'none'}", _TIME_HEAD, _time_cells(rows), note)


def _times_now(op: str, name: str) -> OpTable:
    """The first bench case of each function, timed together with torch."""
    rates, rows = ceilings.measure(), []
    for entry in _timed(op, name):
        found, _ = measure.variants(entry, name, ["torch"])
        first = entry.bench_cases[0].name
        for task in measure.passes(entry, torch.bfloat16):
            if task.case.name == first:
                rows += measure.measure(task, found, rates)
    copy, product = rates.bytes_per_second / 1e12, rates.flops_per_second / 1e12
    title = f"Times now: copy {copy:.2f} TB/s, bf16 product {product:.0f} TFLOP/s"
    return OpTable(title, _TIME_HEAD, _time_cells(rows))


def _timed(op: str, name: str) -> list[Entry]:
    entries = registry.entries().values()
    return [e for e in entries if e.op == op and e.bench_cases and registry.runs(e, name)]
