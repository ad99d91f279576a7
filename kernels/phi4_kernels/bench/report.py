"""Renders the committed benchmark rows of the kernels as Markdown and as a figure, and the floors.

`tools/benchmark_page.py` of the checkout puts the measured tables into BENCHMARKS.md. Floors are
computed, and need no measured row.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from phi4_kernels import dispatch, registry
from phi4_kernels.bench import ceilings, measure, roofline
from phi4_kernels.evidence import read_rows

ROOT = registry.ROOT.parent.parent
ROWS = ROOT / "benchmarks" / "kernels.jsonl"
FLOORS = ROOT / "kernels" / "FLOORS.md"
PICTURE = ROOT / "benchmarks" / "roofline.png"

_ABOUT = """
### Kernels

Every row is a median over interleaved CUDA-graph replays with inputs rotated past L2. The floor is
the larger of the least bytes of the pass over the rate of a copy and its least FLOPs over the rate
of a bf16 matrix product, both measured in the same run: a kernel at 100% moves each byte once, as
fast as a copy does, or multiplies what must be multiplied, as fast as cuBLAS does. The rate is that
of useful work: bytes or FLOPs that the definition needs over the time that the kernel took; what is
masked away, loaded twice or computed again does not count. No row is written while the op's numeric
checks are red. A + after a commit says that files differed from it.
[kernels.jsonl](benchmarks/kernels.jsonl), written by `make gpu`.
"""
_FLOORS = """# Floors of the kernels

Arithmetic, not measurements: the least time of each pass in bf16 on an H200 that copies {copy} TB/s
and multiplies {product} TFLOP/s, from the least bytes and FLOPs that its definition needs. Measured
times are in [BENCHMARKS.md](../BENCHMARKS.md). Generated from the ops' `cases.py` by `make bench
ARGS=--report`; do not edit.

"""


def load() -> list[dict[str, Any]]:
    """All committed rows, oldest first."""
    if not ROWS.exists():
        return []
    return [json.loads(line) for line in ROWS.read_text().splitlines() if line]


def latest(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest row of each device, op, mode, case, dtype and provider."""
    keys = ("device", "op", "mode", "case", "dtype", "provider")
    return list({tuple(row[key] for key in keys): row for row in rows}.values())


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    """A Markdown table."""
    body = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in body) + "\n"


def floors(op: str | None = None) -> str:
    """The analytic floors of all bench cases in bf16."""
    rates = ceilings.NOMINAL
    lines = []
    for entry in registry.entries().values():
        for task in measure.passes(entry, torch.bfloat16) if op in (None, entry.op) else ():
            cost = task.cost
            floor = cost.floor_seconds(rates.bytes_per_second, rates.flops_per_second)
            work = [f"{cost.bytes / 1e6:.1f}", f"{cost.flops / 1e9:.0f}" if cost.flops else ""]
            name = [entry.name, task.mode, task.case.name, cost.formula]
            lines.append([*name, *work, f"{1e6 * floor:.1f}"])
    return table(["op", "pass", "case", "least bytes", "MB", "GFLOP", "floor, us"], lines)


def useful_rate(row: dict[str, Any]) -> str:
    """Rate in bytes/s or FLOP/s, whichever sets the floor of the row."""
    moving = row["bytes"] / row["copy_bytes_per_second"]
    multiplying = row["flops"] / row["matmul_flops_per_second"]
    work, unit = (row["flops"], "TFLOP/s") if multiplying > moving else (row["bytes"], "TB/s")
    rate = work / row["p50_us"] * 1e-6
    return f"{rate:.0f} {unit}" if rate > 10 else f"{rate:.2f} {unit}"


def changed_since() -> str:
    """Return a sentence that names the kernels that have changed since their check on a GPU."""
    checked: dict[tuple[str, str], set[str]] = {}
    for row in read_rows(dispatch.CORRECTNESS_ROWS):
        checked.setdefault((row["op"], row["implementation"]), set()).add(row["source"])
    changed = [
        f"{op} ({name})"
        for (op, name), sources in sorted(checked.items())
        if registry.source_digest(op, name) not in sources
    ]
    if not changed:
        return "The kernels are those that were checked on a GPU."
    return (
        f"Kernels that have changed since they were last checked on a GPU: {', '.join(changed)}. "
        "Their rows are times of the programs at the rows' commits."
    )


def measured(rows: list[dict[str, Any]]) -> str:
    """The newest rows as a section of BENCHMARKS.md: a table per device; nothing without rows."""
    if not rows:
        return ""
    rows = latest(rows)
    parts = [_ABOUT, f"\n{changed_since()}\n"]
    for device in sorted({row["device"] for row in rows}):
        mine = [row for row in rows if row["device"] == device]
        lines = [
            [
                *(row[key] for key in ("op", "mode", "case", "dtype")),
                row["provider"] + ("" if row["meets_error_rule"] else " (fails the error rule)"),
                f"{row['p50_us']:.1f} ({row['p20_us']:.1f} to {row['p80_us']:.1f})",
                useful_rate(row),
                f"{row['percent_of_floor']:.0f}%",
                f"{row['host_us']:.0f}",
                f"{row['saved_bytes'] / 1e6:.0f}",
                row["commit"],
            ]
            for row in sorted(mine, key=lambda r: (r["op"], r["mode"], r["case"], r["p50_us"]))
        ]
        head = ["op", "pass", "case", "dtype", "provider", "p50 (p20 to p80), us"]
        head += ["useful rate", "of floor", "host, us", "saved, MB", "commit"]
        last = mine[-1]
        parts.append(
            f"\n#### {device}\n\nCopy {last['copy_bytes_per_second'] / 1e12:.2f} TB/s, bf16 matmul "
            f"{last['matmul_flops_per_second'] / 1e12:.0f} TFLOP/s, driver {last['driver']}, torch "
            f"{last['torch']}, triton {last['triton']}.\n\n{table(head, lines)}"
        )
    return "".join(parts) + "\n![roofline](benchmarks/roofline.png)\n"


def floors_page() -> str:
    """kernels/FLOORS.md."""
    rates = ceilings.NOMINAL
    copy, product = rates.bytes_per_second / 1e12, rates.flops_per_second / 1e12
    return _FLOORS.format(copy=f"{copy:.1f}", product=f"{product:.0f}") + floors()


def write() -> list[Path]:
    """Write the floors, and the figure if there are rows."""
    FLOORS.write_text(floors_page())
    rows = load()
    if not rows:
        return [FLOORS]
    roofline.draw(latest(rows), PICTURE)
    return [FLOORS, PICTURE]
