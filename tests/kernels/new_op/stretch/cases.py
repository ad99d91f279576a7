"""What tests, resource gate and benchmarks run of the stretch."""

import torch
from phi4_kernels.registry import CallInputs, Case, Cost, Entry
from phi4_kernels.stretch import op, reference
from phi4_kernels.testing import random_inputs

_PROOF = (
    Case("w63", {"rows": 5, "hidden": 63}),
    Case("w300-strided", {"rows": 3, "hidden": 300}, strided=True),
    Case("one-row", {"rows": 1, "hidden": 2048}),
    Case("empty", {"rows": 0, "hidden": 8}),
)
# One per launch.
_SHIPPED = (Case("w1024", {"rows": 8, "hidden": 1024}), Case("w5120", {"rows": 8, "hidden": 5120}))
_BENCH = (Case("t16384-w5120", {"rows": 16384, "hidden": 5120}),)


def _make(case: Case, dtype: torch.dtype) -> CallInputs:
    shape = (case.sizes["rows"], case.sizes["hidden"])
    x = random_inputs.rows(shape, dtype, case.generator(), strided=case.strided)
    return CallInputs({"x": x}, {"factor": 0.37})


def _cost(case: Case, dtype: torch.dtype) -> dict[str, Cost]:
    size = case.sizes["rows"] * case.sizes["hidden"]
    cost = Cost(2 * size * dtype.itemsize, size, f"2 * T * H * {dtype.itemsize} B")
    return {"forward": cost, "backward": cost}


ENTRIES = (
    Entry(
        op="stretch",
        name="stretch",
        function=op.stretch,
        reference=reference.stretch,
        make=_make,
        proof_cases=_PROOF,
        shipped_cases=_SHIPPED,
        bench_cases=_BENCH,
        cost=_cost,
    ),
)
