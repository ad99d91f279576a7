"""The speed gate: whether an implementation beats the one it would replace, on this device.

    python -m phi4_kernels.bench.speed_gate --op attention

Appends the row that `auto` requires, see KernelEvidence.is_faster: the candidate is taken only if
it is faster in every pass of every bench case, timed interleaved, with the numeric checks of both
green.
"""

import argparse
import sys
from functools import partial
from typing import Any

import torch

from phi4_kernels import dispatch, registry
from phi4_kernels.bench import ceilings, measure
from phi4_kernels.bench.measure import Variant
from phi4_kernels.errors import KernelError
from phi4_kernels.evidence import SPEED_GATED
from phi4_kernels.registry import Entry
from phi4_kernels.testing import evidence_rows


def verdict(op: str, candidate: str, ratios: dict[str, float]) -> dict[str, Any]:
    """The row without the machine's columns.

    Args:
        op: both implementations'.
        candidate: the gated implementation, a key of SPEED_GATED.
        ratios: its median time over that of the other, per pass.
    """
    against = SPEED_GATED[candidate]
    return {
        "op": op,
        "implementation": candidate,
        "against": against,
        "source": registry.source_digest(op, candidate),
        "against_source": registry.source_digest(op, against),
        "ratios": {name: round(ratio, 4) for name, ratio in ratios.items()},
        # In every pass of every case: a mean could hide a slow case.
        "faster": bool(ratios) and max(ratios.values()) < 1.0,
    }


def ratios(entry: Entry, candidate: str) -> dict[str, float]:
    """Median time of the candidate over that of the other, per case and pass, in bf16."""
    names = (candidate, SPEED_GATED[candidate])
    # Both must be correct before they are timed.
    for name in names:
        measure.require_green(entry, name)
    run = entry.timed or entry.function
    found = [Variant(name, partial(run, implementation=name), True) for name in names]
    rates, measured = ceilings.measure(), {}
    for task in measure.passes(entry, torch.bfloat16):
        times = {row["provider"]: row["p50_us"] for row in measure.measure(task, found, rates)}
        ratio = times[names[0]] / times[names[1]]
        measured[f"{task.case.name}/{task.mode}"] = ratio
        print(f"{entry.name} {task.mode:9} {task.case.name:16}", end=" ")
        print(
            *(f"{name} {times[name]:9.1f} us" for name in names), f"ratio {ratio:.3f}", flush=True
        )
    return measured


def main() -> int:
    """Run the gate; returns the exit status."""
    options = argparse.ArgumentParser(prog="python -m phi4_kernels.bench.speed_gate")
    options.add_argument("--op", choices=registry.OPS, required=True)
    options.add_argument("--implementation", choices=SPEED_GATED, default="gluon")
    chosen = options.parse_args()
    if not torch.cuda.is_available():
        print("no GPU on this machine: nothing was timed")
        return 2
    measured: dict[str, float] = {}
    try:
        for entry in registry.entries().values():
            if entry.op == chosen.op and registry.runs(entry, chosen.implementation):
                measured |= ratios(entry, chosen.implementation)
    except KernelError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    row = verdict(chosen.op, chosen.implementation, measured) | evidence_rows.machine()
    evidence_rows.append(dispatch.SPEED_ROWS, row)
    print(f"{chosen.op}: {chosen.implementation} faster everywhere: {row['faster']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
