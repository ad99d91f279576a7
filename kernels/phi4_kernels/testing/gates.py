"""The numeric checks by name, for the tests, the command line and the benchmark."""

import multiprocessing
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from phi4_kernels import registry
from phi4_kernels.testing import numerics, opcheck

Check = tuple[str, str, str]
"""Names of an entry, of one of its cases and of a dtype."""
_CHECKS_PER_PROCESS = 12
_CHECK_SECONDS = 120
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def names(entry: registry.Entry, implementation: str | None = None) -> list[Check]:
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
        if dtype in entry.dtypes and dtype in taken and not _unserved(entry, case, implementation)
    ]


def _unserved(
    entry: registry.Entry, case: registry.Case, implementation: str | None
) -> tuple[str, ...]:
    if not case.needs or implementation not in registry.implementations(entry.op):
        return ()
    return registry.unserved(entry.op, implementation, case.needs)


def _find(entry: str, case: str) -> tuple[registry.Entry, registry.Case]:
    found = registry.entries()[entry]
    return found, next(known for known in found.proof_cases if known.name == case)


def check_numbers(
    entry: str, case: str, dtype: str, implementation: str = "triton", device: str = "cpu"
) -> dict[str, float]:
    """The error rule, guard bands and permuted program orders on one case.

    Returns:
        Margin of each output and gradient.

    Raises:
        GateError: a gate is red.
    """
    margins = numerics.check(*_find(entry, case), DTYPES[dtype], implementation, device)
    return {name: max(margin.largest, margin.row) for name, margin in margins.items()}


def check_operators(entry: str, case: str, dtype: str) -> list[str]:
    """torch's opcheck on the operators behind an entry; see opcheck.check."""
    return opcheck.check(*_find(entry, case), DTYPES[dtype])


def red_cases(op: str, implementation: str, device: str, jobs: int = 1) -> dict[str, Any]:
    """Run all numeric checks of an op.

    Args:
        op: one of registry.OPS.
        implementation: of the op's.
        device: cpu or cuda.
        jobs: processes that share the checks; compilation on one core is most of the time on a GPU.

    Returns:
        num_checks, the worst margin, and the message of every red check by name.
    """
    ops = [entry for entry in registry.entries().values() if entry.op == op]
    checks = [check for entry in ops for check in names(entry, implementation)]
    run = partial(outcome_of, implementation, device)
    # In this process, so that a debugger or profiler can attach.
    if jobs == 1:
        outcomes = [run(check) for check in checks]
    else:
        outcomes = _shared(run, checks, jobs)
    red = {
        "/".join(check): outcome
        for check, outcome in zip(checks, outcomes, strict=True)
        if isinstance(outcome, str)
    }
    worst = max((outcome for outcome in outcomes if isinstance(outcome, float)), default=0.0)
    return {"num_checks": len(checks), "worst_margin": worst, "red": red}


def _shared(run: Callable[[Check], float | str], checks: list[Check], jobs: int) -> list:
    """Outcomes from spawned processes of a few checks each, so that a device fault affects one."""
    spawned = multiprocessing.get_context("spawn")
    # Spawned, not forked: CUDA does not survive a fork.
    with spawned.Pool(min(jobs, len(checks) or 1), maxtasksperchild=_CHECKS_PER_PROCESS) as pool:
        waiting = [pool.apply_async(run, (check,)) for check in checks]
        return [_awaited(result) for result in waiting]


def _awaited(result: Any) -> float | str:
    try:
        # The result of a process that died never arrives.
        return result.get(_CHECK_SECONDS)
    except multiprocessing.TimeoutError:
        return f"no result within {_CHECK_SECONDS} s: it hangs, or its process died"


def outcome_of(implementation: str, device: str, check: Check) -> float | str:
    """The worst margin of a green check, the message of a red one."""
    try:
        return max(check_numbers(*check, implementation, device).values(), default=0.0)
    except Exception as error:  # any failure is red; the other checks still run
        return f"{type(error).__name__}: {error}"
