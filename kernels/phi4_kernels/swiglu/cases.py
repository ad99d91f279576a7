"""Cases of SwiGLU for tests, resource gate and benchmarks."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from phi4_kernels.registry import CallInputs, Case, Cost, Entry
from phi4_kernels.swiglu import op, reference
from phi4_kernels.testing import random_inputs

# Blocks that divide the width and blocks with a tail, rows that fill a tile and rows that do not,
# phi-4's width (35 * 512), and the empty and single row.
_PROOF = (
    Case("w1", {"rows": 3, "width": 1}),
    Case("w63", {"rows": 5, "width": 63}),
    Case("w100-strided", {"rows": 9, "width": 100}, strided=True),
    Case("w640", {"rows": 6, "width": 640}),
    Case("rows70", {"rows": 70, "width": 72}),
    Case("w1030", {"rows": 5, "width": 1030}),
    Case("w17920", {"rows": 3, "width": 17920}),
    Case("empty", {"rows": 0, "width": 64}),
    Case("one-row", {"rows": 1, "width": 512}),
)
# Local widths at TP 1, 2, 5 and 10 all divide by 512 or 256.
_SHIPPED = (Case("w17920", {"rows": 8, "width": 17920}), Case("w1792", {"rows": 8, "width": 1792}))
_BENCH = tuple(Case(f"t{rows}-w17920", {"rows": rows, "width": 17920}) for rows in (4096, 16384))


def _make(case: Case, dtype: torch.dtype) -> CallInputs:
    generator = case.generator()
    shape = (case.sizes["rows"], case.sizes["width"])
    gate = random_inputs.rows(shape, dtype, generator)
    up = random_inputs.rows(shape, dtype, generator, high=random_inputs.gradient_high(dtype))
    gate_up = torch.cat((gate, up), dim=1)
    if not case.strided:
        return CallInputs({"gate_up": gate_up})
    wide = torch.full((shape[0], 2 * shape[1] + 8), torch.nan, dtype=dtype)
    wide[:, : 2 * shape[1]] = gate_up
    return CallInputs({"gate_up": wide[:, : 2 * shape[1]]})


def _make_linear(case: Case, dtype: torch.dtype) -> CallInputs:
    generator = case.generator()
    weight = torch.randn(24, case.sizes["width"], generator=generator, dtype=torch.float64)
    # Columns of norm 1, so that the product is of the activation's size.
    weight = (weight / case.sizes["width"] ** 0.5).to(dtype)
    return CallInputs(_make(case, dtype).tensors | {"weight": weight})


def _make_backward(case: Case, dtype: torch.dtype) -> CallInputs:
    gate_up = _make(case, dtype).tensors["gate_up"]
    shape = (case.sizes["rows"], case.sizes["width"])
    high = random_inputs.gradient_high(dtype)
    dout = random_inputs.rows(shape, dtype, case.generator(), high=high, strided=case.strided)
    return CallInputs({"dout": dout, "gate_up": gate_up})


def _make_fp8(case: Case, dtype: torch.dtype) -> CallInputs:
    inputs = _make(case, dtype)
    product = reference.swiglu(inputs.tensors["gate_up"].double())
    return CallInputs(inputs.tensors, {"scale": random_inputs.saturating_scale(product)})


def _backward(**arguments: Any) -> tuple[Tensor, Tensor | None]:
    return op.swiglu_backward(**arguments, emit_product=True)


def _fp8(columnwise: bool) -> Any:
    """The op and its definition without amax: one number is no sample for the error rule."""

    def run(**arguments: Any) -> tuple[Tensor, ...]:
        out = op.swiglu_fp8(**arguments, columnwise=columnwise)
        return (out.rowwise, *(() if out.columnwise is None else (out.columnwise.t(),)))

    def define(gate_up: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        rowwise, _ = reference.swiglu_fp8(gate_up, scale)
        return (rowwise, *((rowwise,) if columnwise else ()))

    return run, define


def _cost(passes: dict[str, tuple[int, int, int]]) -> Any:
    """Per pass: elements of the activation dtype, bytes of e4m3, flops, each per element of F."""

    def cost(case: Case, dtype: torch.dtype) -> dict[str, Cost]:
        elements = case.sizes["rows"] * case.sizes["width"]
        return {
            mode: Cost(
                (wide * dtype.itemsize + fp8) * elements,
                flops * elements,
                f"T * F * ({wide} * {dtype.itemsize} + {fp8}) B",
            )
            for mode, (wide, fp8, flops) in passes.items()
        }

    return cost


_ROWWISE, _BOTH = _fp8(False), _fp8(True)
_FP8_PROOF = tuple(case for case in _PROOF if case.name != "w17920")
_entry = partial(Entry, op="swiglu", shipped_cases=_SHIPPED)

ENTRIES = (
    _entry(
        name="swiglu",
        bench_cases=_BENCH,
        proof_cases=_PROOF,
        function=op.swiglu,
        reference=reference.swiglu,
        make=_make,
        # Elements of [T, F] that are moved: gate, up, out; backward dout, gate, up, dgate, dup.
        cost=_cost({"forward": (3, 0, 6), "backward": (5, 0, 12)}),
    ),
    _entry(
        name="swiglu_backward",
        bench_cases=_BENCH[-1:],
        proof_cases=_PROOF,
        function=_backward,
        reference=reference.swiglu_backward,
        make=_make_backward,
        # The backward pass, and the product written once more.
        cost=_cost({"forward": (6, 0, 13)}),
        differentiable=False,
    ),
    Entry(
        op="swiglu",
        name="swiglu_linear",
        function=op.swiglu_linear,
        reference=reference.swiglu_linear,
        make=_make_linear,
        proof_cases=_PROOF[1:4],
        shipped_cases=(),
        bench_cases=(),
        cost=lambda case, dtype: {},
    ),
    _entry(
        name="swiglu_fp8",
        bench_cases=_BENCH[-1:],
        proof_cases=_FP8_PROOF,
        function=_ROWWISE[0],
        reference=_ROWWISE[1],
        make=_make_fp8,
        # gate and up in the input's dtype, out in e4m3; columnwise its transpose too.
        cost=_cost({"forward": (2, 1, 7)}),
        differentiable=False,
    ),
    _entry(
        name="swiglu_fp8_columnwise",
        bench_cases=_BENCH[-1:],
        proof_cases=_FP8_PROOF,
        function=_BOTH[0],
        reference=_BOTH[1],
        make=_make_fp8,
        cost=_cost({"forward": (2, 2, 7)}),
        differentiable=False,
    ),
)
