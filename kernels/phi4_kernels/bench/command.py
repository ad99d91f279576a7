"""`phi4 bench kernels` and `python -m phi4_kernels.bench`."""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from phi4_kernels import cuda_library, registry
from phi4_kernels.bench import ceilings, measure, report
from phi4_kernels.bench.providers import TABLE
from phi4_kernels.errors import KernelError
from phi4_kernels.testing import evidence_rows

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(prog="phi4 bench kernels", description=__doc__)
    options.add_argument("--op", choices=registry.OPS, help="one op; all without it")
    options.add_argument(
        "--against",
        default="torch,compile",
        help=f"comma-separated: {', '.join(TABLE)}; torch means the best of eager and compile",
    )
    options.add_argument("--implementation", help="of ours; triton, cuda for csrc's ops without it")
    options.add_argument("--dtype", choices=_DTYPES, default="bf16", help="of the inputs")
    options.add_argument("--json", type=Path, help="append the rows to this file")
    options.add_argument(
        "--report", action="store_true", help="only write kernels/FLOORS.md and the picture"
    )
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the bench; returns the exit status."""
    options = parser().parse_args(arguments)
    if options.report:
        print("wrote", *report.write())
        return 0
    try:
        return _timed(options) if torch.cuda.is_available() else _untimed(options)
    except KernelError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


def _untimed(options: argparse.Namespace) -> int:
    print("No GPU on this machine: nothing was timed.\n\nAnalytic floors, bf16, H200:\n")
    print(report.floors(options.op))
    built = (
        cuda_library.missing() or "csrc is built; `python tools/build_csrc.py` names its registers"
    )
    print(f"CUDA ops: {built}")
    if options.op and "triton" not in registry.implementations(options.op):
        return 0
    print("Compiled for sm_90:\n", flush=True)
    command = [sys.executable, "-m", "phi4_kernels.testing", "compile"]
    return subprocess.run(command + (["--op", options.op] if options.op else [])).returncode


def _timed(options: argparse.Namespace) -> int:
    against = [name for name in options.against.split(",") if name]
    if "torch" in against and "compile" not in against:
        against.append("compile")
    unknown = sorted(set(against) - set(TABLE))
    if unknown:
        raise KernelError(
            f"--against {','.join(unknown)}: not known; expected some of {', '.join(TABLE)}; "
            "fix the list"
        )
    chosen = [entry for entry in registry.entries().values() if options.op in (None, entry.op)]
    for entry in chosen:
        measure.require_green(entry, _ours(entry, options))
    print(f"{len(chosen)} entries green; measuring ceilings")
    rates = ceilings.measure()
    print(f"copy {rates.bytes_per_second / 1e12:.2f} TB/s", end=", ")
    print(f"matmul {rates.flops_per_second / 1e12:.0f} TFLOP/s")
    for entry in chosen:
        found, absent = measure.variants(entry, _ours(entry, options), against)
        print(*(f"  {text}" for text in absent), sep="\n")
        for task in measure.passes(entry, _DTYPES[options.dtype]):
            for row in measure.best_of_torch(measure.measure(task, found, rates)):
                print(_line(row), flush=True)
                if options.json:
                    evidence_rows.append(options.json, row)
    return 0


def _ours(entry: registry.Entry, options: argparse.Namespace) -> str:
    return options.implementation or registry.default_kernel(entry.op)


def _line(row: dict) -> str:
    right = "" if row["meets_error_rule"] else "  FAILS THE ERROR RULE"
    return (
        f"{row['op']:24} {row['mode']:9} {row['case']:24} {row['provider']:14} "
        f"{row['p50_us']:9.1f} us {row['percent_of_floor']:6.1f}% of floor, "
        f"host {row['host_us']:6.1f} us{right}"
    )
