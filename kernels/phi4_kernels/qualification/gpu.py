"""Checks and times kernels on a CUDA device: the checks of `testing`, in separate processes."""

import math
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from phi4_kernels import registry
from phi4_kernels.bench import measure
from phi4_kernels.evidence import Row, machine_of
from phi4_kernels.qualification.qualify import Candidate
from phi4_kernels.testing import evidence_rows, gates

_LARGEST_NUM_JOBS = 12
_RETRY_SECONDS = 20.0


class GpuProver:
    """See `qualify.Prover`.

    Args:
        device: a CUDA device.
        jobs: processes that share the checks; None takes one per core, at most 12.
    """

    def __init__(self, device: torch.device, jobs: int | None = None) -> None:
        self.machine = machine_of(device)
        self._device = device
        # Cores that this process may use, which a container makes fewer than the machine has.
        self._jobs = jobs or min(_LARGEST_NUM_JOBS, len(os.sched_getaffinity(0)))

    def columns(self) -> Row:
        """See `qualify.Prover`."""
        return evidence_rows.machine()

    def prove(
        self, candidates: Sequence[Candidate], seconds: float
    ) -> Iterator[tuple[Candidate, dict[str, Any] | None]]:
        """See `qualify.Prover`. All checks are handed out at once: compilation is most of it."""
        # One deadline for all: checks that are not done by then are left to the next run.
        deadline = time.monotonic() + seconds
        tasks = {candidate: two_sizes(*candidate) for candidate in candidates}
        num_checks = sum(map(len, tasks.values()))
        if not num_checks:
            return
        # A fresh process has no CUDA context: the checks' memory goes when it ends.
        spawned = multiprocessing.get_context("spawn")
        with spawned.Pool(min(self._jobs, num_checks), initializer=_take_signals) as pool:
            run = partial(_outcome, str(self._device))
            waiting = {
                candidate: [pool.apply_async(run, (candidate[1], check)) for check in checks]
                for candidate, checks in tasks.items()
            }
            for candidate, results in waiting.items():
                outcomes = [_awaited(result, deadline) for result in results]
                yield candidate, self._judged(candidate, tasks[candidate], outcomes)

    def time(self, op: str, names: Sequence[str]) -> dict[str, float | None]:
        """See `qualify.Prover`."""
        entry = next(e for e in registry.entries().values() if e.op == op and e.bench_cases)
        with torch.cuda.device(self._device):
            return measure.beside_each_other(entry, names)

    def _judged(
        self, candidate: Candidate, checks: list[gates.Check], outcomes: list[float | str | None]
    ) -> dict[str, Any] | None:
        # If one check has no result, the candidate has no verdict.
        if None in outcomes:
            return None
        red = {}
        for check, outcome in zip(checks, outcomes, strict=True):
            # A fault of another kernel makes its process unusable: a red check is repeated alone
            # in a fresh process.
            if isinstance(outcome, str) and isinstance(again := self._alone(candidate, check), str):
                red["/".join(check)] = again
        margins = [outcome for outcome in outcomes if isinstance(outcome, float)]
        return {"num_checks": len(checks), "worst_margin": max(margins, default=0.0), "red": red}

    def _alone(self, candidate: Candidate, check: gates.Check) -> float | str:
        with multiprocessing.get_context("spawn").Pool(1, initializer=_take_signals) as pool:
            result = pool.apply_async(_outcome, (str(self._device), candidate[1], check))
            outcome = _awaited(result, time.monotonic() + _RETRY_SECONDS)
        return f"no result within {_RETRY_SECONDS:.0f} s" if outcome is None else outcome


def two_sizes(op: str, implementation: str) -> list[gates.Check]:
    """Of every function of an op the largest proof case and a medium one, in bf16 where it can.

    One of another dtype is checked in the first that it takes.
    """
    found = []
    for entry in registry.entries().values():
        checks = gates.names(entry, implementation) if entry.op == op else []
        if not checks:
            continue
        dtype = "bf16" if any(check[2] == "bf16" for check in checks) else checks[0][2]
        # The largest case reaches all paths; the medium one uses another row of the ladder, or has
        # another tail.
        volumes = {case.name: _volume(case) for case in entry.proof_cases}
        sized = sorted((c for c in checks if c[2] == dtype), key=lambda c: (volumes[c[1]], c[1]))
        found += [sized[len(sized) // 2], sized[-1]] if len(sized) > 1 else sized
    return list(dict.fromkeys(found))


def _volume(case: registry.Case) -> int:
    """Approximate size of a case: the product of its sizes, of lists their sums."""
    sizes = case.sizes.values()
    numbers = [s if isinstance(s, int) else sum(s) for s in sizes if isinstance(s, int | tuple)]
    return math.prod(max(int(number), 1) for number in numbers if not isinstance(number, bool))


def _take_signals() -> None:
    """Unblock signals in a child: a training run handles them in a thread and blocks them, and with
    the inherited mask an abandoned pool would wait for its processes forever."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})


def _outcome(device: str, implementation: str, check: gates.Check) -> float | str:
    return gates.outcome_of(implementation, device, check)


def _awaited(result: Any, deadline: float) -> float | str | None:
    try:
        return result.get(max(0.0, deadline - time.monotonic()))
    except multiprocessing.TimeoutError:
        return None
