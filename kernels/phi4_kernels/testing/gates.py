"""The gates by name: what the tests, the command line and the benchmark run, in any process."""

from typing import Any

import torch

from phi4_kernels import registry
from phi4_kernels.testing import numerics, opcheck

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def names(entry: registry.Entry, implementation: str | None = None) -> list[tuple[str, str, str]]:
    """(entry, case, dtype) of every numeric check of an entry, or of one implementation of it."""
    taken = entry.dtypes
    if implementation in registry.implementations(entry.op):
        if not registry.runs(entry, implementation):
            return []
        module = registry.implementation(entry.op, implementation)
        taken = getattr(module, "DTYPES", entry.dtypes)
    return [
        (entry.name, case.name, name)
        for case in entry.proof_cases
        for name, dtype in DTYPES.items()
        if dtype in entry.dtypes and dtype in taken
    ]


def _find(entry: str, case: str) -> tuple[registry.Entry, registry.Case]:
    found = registry.entries()[entry]
    return found, next(known for known in found.proof_cases if known.name == case)


def check_numbers(
    entry: str, case: str, dtype: str, implementation: str = "triton", device: str = "cpu"
) -> dict[str, float]:
    """The error rule, guard bands and permuted program orders on one case.

    Returns:
        How much of the rule each output and gradient uses up.

    Raises:
        GateError: a gate is red.
    """
    margins = numerics.check(*_find(entry, case), DTYPES[dtype], implementation, device)
    return {name: max(margin.largest, margin.row) for name, margin in margins.items()}


def check_operators(entry: str, case: str, dtype: str) -> list[str]:
    """torch's opcheck on the operators behind an entry; see opcheck.check."""
    return opcheck.check(*_find(entry, case), DTYPES[dtype])


def red_cases(op: str, implementation: str, device: str) -> dict[str, Any]:
    """Run all numeric checks of an op.

    Returns:
        num_checks, the worst margin, and the message of every red check by name.
    """
    red, worst, num_checks = {}, 0.0, 0
    for entry in registry.entries().values():
        for check in names(entry, implementation) if entry.op == op else ():
            num_checks += 1
            try:
                margins = check_numbers(*check, implementation, device)
            except Exception as error:  # any failure is red, and the others are still worth knowing
                red["/".join(check)] = f"{type(error).__name__}: {error}"
            else:
                worst = max(worst, *margins.values())
    return {"num_checks": num_checks, "worst_margin": worst, "red": red}
