"""Cases of RMSNorm for tests, resource gate and benchmarks."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from phi4_kernels.registry import CallInputs, Case, Cost, Entry
from phi4_kernels.rms_norm import op, reference
from phi4_kernels.testing import random_inputs

_EPS = 1e-5

# One block and a tail of it, several blocks with and without a tail, phi-4's width, a program that
# owns several rows, and the empty and single row. Not width 1: its gradient is all cancellation.
_PROOF = (
    Case("w2", {"rows": 3, "hidden": 2}),
    Case("w63", {"rows": 5, "hidden": 63}),
    Case("w100-strided", {"rows": 9, "hidden": 100}, strided=True),
    Case("w640", {"rows": 4, "hidden": 640}),
    Case("w5120", {"rows": 5, "hidden": 5120}),
    Case("w6152", {"rows": 3, "hidden": 6152}),
    Case("empty", {"rows": 0, "hidden": 64}),
    Case("one-row", {"rows": 1, "hidden": 2048}),
    Case("fp32-weight", {"rows": 7, "hidden": 768, "fp32_weight": True}),
)
_SHIPPED = tuple(
    Case(f"w{width}", {"rows": 4, "hidden": width}) for width in (512, 2048, 5120, 8192)
)
_BENCH = tuple(Case(f"t{rows}-w5120", {"rows": rows, "hidden": 5120}) for rows in (4096, 16384))


def _make(case: Case, dtype: torch.dtype, *, add: bool) -> CallInputs:
    generator = case.generator()
    shape = (case.sizes["rows"], case.sizes["hidden"])
    weight_dtype = torch.float32 if case.sizes.get("fp32_weight") else dtype
    # Weights near 1, as in a trained norm; all different, so that a permutation shows.
    noise = torch.randn(shape[1], generator=generator, dtype=torch.float64)
    tensors = {
        "x": random_inputs.rows(shape, dtype, generator, strided=case.strided),
        "weight": (1 + 0.2 * noise).to(weight_dtype),
    }
    if add:
        tensors["residual"] = random_inputs.rows(shape, dtype, generator, strided=case.strided)
    return CallInputs(tensors, {"eps": _EPS})


def _make_norm(case: Case, dtype: torch.dtype) -> CallInputs:
    return _make(case, dtype, add=False)


def _make_add(case: Case, dtype: torch.dtype) -> CallInputs:
    return _make(case, dtype, add=True)


def _make_fp8(case: Case, dtype: torch.dtype) -> CallInputs:
    inputs = _make(case, dtype, add=case.sizes["rows"] % 2 == 1)
    # Values up to about 4 become up to 800: the largest saturate.
    return CallInputs(inputs.tensors, inputs.constants | {"scale": torch.tensor(200.0)})


def _fp8(columnwise: bool) -> Any:
    """The op and its definition without amax: one number is no sample for the error rule."""

    def run(**arguments: Any) -> tuple[Tensor, ...]:
        out = op.rms_norm_fp8(**arguments, columnwise=columnwise)
        transposed = () if out.columnwise is None else (out.columnwise.t(),)
        total = () if out.total is None else (out.total,)
        return (out.rowwise, *transposed, *total, out.rstd)

    def define(**arguments: Any) -> tuple[Tensor, ...]:
        rowwise, _, total, rstd = reference.rms_norm_fp8(**arguments)
        sums = () if arguments.get("residual") is None else (total,)
        return (rowwise, *((rowwise,) if columnwise else ()), *sums, rstd)

    return run, define


def _cost(case: Case, dtype: torch.dtype, *, forward: int, backward: int) -> dict[str, Cost]:
    # Forward reads x and writes y (with a residual two of each); backward reads dy and x, writes
    # dx.
    elements = case.sizes["rows"] * case.sizes["hidden"]

    def cost(passes: int, flops: int) -> Cost:
        formula = f"{passes} * T * H * {dtype.itemsize} B"
        return Cost(passes * elements * dtype.itemsize, flops * elements, formula)

    return {"forward": cost(forward, 4), "backward": cost(backward, 9)}


def _cost_fp8(case: Case, dtype: torch.dtype, *, writes: int) -> dict[str, Cost]:
    elements = case.sizes["rows"] * case.sizes["hidden"]
    formula = f"T * H * ({dtype.itemsize} + {writes}) B"
    return {"forward": Cost((dtype.itemsize + writes) * elements, 5 * elements, formula)}


_ROWWISE, _BOTH = _fp8(False), _fp8(True)
_fp8_entry = partial(
    Entry,
    op="rms_norm",
    make=_make_fp8,
    proof_cases=_PROOF,
    shipped_cases=(*_SHIPPED, Case("add-w5120", {"rows": 5, "hidden": 5120})),
    bench_cases=_BENCH[-1:],
    differentiable=False,
)

ENTRIES = (
    Entry(
        op="rms_norm",
        name="rms_norm",
        function=op.rms_norm,
        reference=reference.rms_norm,
        make=_make_norm,
        proof_cases=_PROOF,
        shipped_cases=_SHIPPED,
        bench_cases=_BENCH,
        cost=lambda case, dtype: _cost(case, dtype, forward=2, backward=3),
    ),
    Entry(
        op="rms_norm",
        name="add_rms_norm",
        function=op.add_rms_norm,
        reference=reference.add_rms_norm,
        make=_make_add,
        proof_cases=_PROOF,
        shipped_cases=_SHIPPED,
        bench_cases=_BENCH,
        cost=lambda case, dtype: _cost(case, dtype, forward=4, backward=4),
    ),
    _fp8_entry(
        name="rms_norm_fp8",
        function=_ROWWISE[0],
        reference=_ROWWISE[1],
        cost=lambda case, dtype: _cost_fp8(case, dtype, writes=1),
    ),
    _fp8_entry(
        name="rms_norm_fp8_columnwise",
        function=_BOTH[0],
        reference=_BOTH[1],
        cost=lambda case, dtype: _cost_fp8(case, dtype, writes=2),
    ),
)
