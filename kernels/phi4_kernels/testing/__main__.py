"""Command line of the checks.

    python -m phi4_kernels.testing numbers [--op OP] [--implementation NAME] [--jobs N] [--record]
    python -m phi4_kernels.testing compile [--op OP] [--json]
    python -m phi4_kernels.testing budgets [--op OP]

`numbers` interprets Triton on a machine without a GPU, and runs the host form of csrc's ops.
`compile` compares Triton's resources with the budgets, `budgets` writes them. `--record` appends
the rows that let `auto` choose a kernel.
"""

import argparse
import json
import sys
from typing import Any

import torch

from phi4_kernels import dispatch, registry
from phi4_kernels.testing import evidence_rows
from phi4_kernels.testing.interpreted import InterpretedProcess


def _numbers(options: argparse.Namespace) -> int:
    on_gpu = torch.cuda.is_available()
    if options.record and not on_gpu:
        print("--record needs a GPU: a row says what ran on it; nothing was recorded")
        return 2
    failures = 0
    for op in [options.op] if options.op else registry.OPS:
        implementation = options.implementation or registry.default_kernel(op)
        if reason := registry.missing(op, implementation):
            print(f"{op} {implementation}: not run: {reason}")
            failures += options.record
            continue
        result = _run_numbers(op, implementation, on_gpu, options.jobs)
        failures += len(result["red"])
        state = "red" if result["red"] else "green"
        print(
            f"{op} {implementation}: {state}, {result['num_checks']} checks, "
            f"worst margin {result['worst_margin']:.2f} of the error rule"
        )
        for name, message in result["red"].items():
            print(f"  {name}: {message}")
        if options.record:
            evidence_rows.append(
                dispatch.CORRECTNESS_ROWS, evidence_rows.correctness(op, implementation, result)
            )
    return int(failures > 0)


def _run_numbers(op: str, implementation: str, on_gpu: bool, jobs: int) -> dict[str, Any]:
    device = "cuda" if on_gpu else "cpu"
    arguments: dict[str, Any] = {"op": op, "implementation": implementation, "device": device}
    if on_gpu or implementation in ("cuda", "torch"):
        from phi4_kernels.testing import gates

        return gates.red_cases(**arguments, jobs=jobs)
    if implementation == "gluon":
        from phi4_kernels.testing import gates
        from phi4_kernels.testing.gluon.emulator import emulating

        with emulating():
            return gates.red_cases(**arguments)
    process = InterpretedProcess()
    try:
        return process.call("phi4_kernels.testing.gates:red_cases", **arguments)
    finally:
        process.close()


def _compile(options: argparse.Namespace) -> int:
    from phi4_kernels.testing import budgets, compiled

    entries = [entry for entry in registry.entries().values() if options.op in (None, entry.op)]
    found, unreached = compiled.compile_all(entries)
    if options.json:
        print(json.dumps({"found": found, "unreached": unreached}))
        return 0
    if options.command == "budgets":
        budgets.write(found, [entry.name for entry in entries])
        print(f"wrote {len(found)} budgets to {budgets.path()}")
        return 0
    known, broken = budgets.load(), [f"no shipped case reaches {row}" for row in unreached]
    for key, numbers in found.items():
        print(key, *(f"{name}={value}" for name, value in numbers.items() if value))
        broken += budgets.laws(key, numbers)
        broken += budgets.over_budget(key, numbers, known[key]) if key in known else [f"{key}: new"]
    print(*broken, sep="\n")
    print(f"{len(found)} kernels compiled for sm_90, {len(broken)} over budget")
    return int(bool(broken))


def _compiled_ops() -> list[str]:
    return [op for op in registry.OPS if "triton" in registry.implementations(op)]


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m phi4_kernels.testing")
    commands = parser.add_subparsers(dest="command", required=True)
    numbers = commands.add_parser("numbers", help="the error rule on every case")
    numbers.add_argument("--implementation", help="triton, or cuda for csrc's ops, without it")
    numbers.add_argument("--record", action="store_true", help="append correctness rows")
    numbers.add_argument(
        "--jobs", type=int, default=1, help="processes that share the checks, where none interprets"
    )
    compiling = commands.add_parser("compile", help="resources against the budgets")
    compiling.add_argument("--json", action="store_true", help="print resources, judge nothing")
    writing = commands.add_parser("budgets", help="write the budgets")
    writing.set_defaults(json=False)
    numbers.add_argument("--op", choices=registry.OPS)
    compiling.add_argument("--op", choices=_compiled_ops())
    writing.add_argument("--op", choices=_compiled_ops(), help="leave the other ops' budgets")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    chosen = _parse(sys.argv[1:])
    sys.exit(_numbers(chosen) if chosen.command == "numbers" else _compile(chosen))
