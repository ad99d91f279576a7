"""Cases of the FP8 casts for checks and benchmarks: both layouts from one read."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from phi4_kernels.fp8_cast import op, reference
from phi4_kernels.launch import ceil_div
from phi4_kernels.registry import CallInputs, Case, Cost, Entry
from phi4_kernels.testing import random_inputs

# Whole tiles of 128 x 128, tiles cut in either direction, widths that 4 does not divide.
_PROOF = (
    Case("r260-c263", {"rows": 260, "columns": 263}),
    Case("r128-c256", {"rows": 128, "columns": 256}),
    Case("r5-c300", {"rows": 5, "columns": 300}),
    Case("one", {"rows": 1, "columns": 1}),
    Case("no-rows", {"rows": 0, "columns": 5}),
    Case("no-columns", {"rows": 3, "columns": 0}),
)
_BENCH = (
    Case("t16384-c5120", {"rows": 16384, "columns": 5120}),
    Case("t16384-c17920", {"rows": 16384, "columns": 17920}),
)


def _make(case: Case, dtype: torch.dtype) -> CallInputs:
    shape = (case.sizes["rows"], case.sizes["columns"])
    return CallInputs({"x": random_inputs.rows(shape, dtype, case.generator())})


def _make_tensor(case: Case, dtype: torch.dtype) -> CallInputs:
    inputs = _make(case, dtype)
    return CallInputs(
        inputs.tensors, {"scale": random_inputs.saturating_scale(inputs.tensors["x"])}
    )


def _tensor(x: Tensor, scale: Tensor, implementation: str, fp8: torch.dtype) -> tuple[Tensor, ...]:
    found = op.cast_tensor(x, scale, dtype=fp8, columnwise=True, implementation=implementation)
    assert found.columnwise is not None
    return found.rowwise, found.columnwise.t()


def _define_tensor(x: Tensor, scale: Tensor, fp8: torch.dtype) -> tuple[Tensor, ...]:
    rowwise, _ = reference.cast_tensor(x, scale, fp8)
    return rowwise, rowwise


def _blocks(
    x: Tensor, implementation: str, block_rows: int, fp8: torch.dtype
) -> tuple[Tensor, ...]:
    found = op.cast_blocks(
        x, block_rows=block_rows, dtype=fp8, columnwise=True, implementation=implementation
    )
    return tuple(part for part in found if part is not None)


def _define_blocks(x: Tensor, block_rows: int, fp8: torch.dtype) -> tuple[Tensor, ...]:
    rowwise, inverse = reference.cast_blocks(x, block_rows, fp8)
    return rowwise, inverse, *reference.cast_blocks(x.t().contiguous(), block_rows, fp8)


def _cost(scale_bytes: Any, text: str) -> Any:
    def cost(case: Case, dtype: torch.dtype) -> dict[str, Cost]:
        rows, columns = case.sizes["rows"], case.sizes["columns"]
        size = rows * columns
        return {
            "forward": Cost(
                # Read once, written in two layouts of a byte each.
                (dtype.itemsize + 2) * size + scale_bytes(rows, columns),
                4 * size,
                f"T * C * ({dtype.itemsize} + 2) B{text}",
            )
        }

    return cost


def _line_bytes(rows: int, columns: int) -> int:
    # An fp32 scale per 128 elements of a row, and per 128 of a column for the transpose.
    return 4 * (rows * ceil_div(columns, 128) + columns * ceil_div(rows, 128))


def _tile_bytes(rows: int, columns: int) -> int:
    # One per tile, which both layouts share.
    return 4 * ceil_div(rows, 128) * ceil_div(columns, 128)


_entry = partial(
    Entry,
    op="fp8_cast",
    proof_cases=_PROOF,
    shipped_cases=(),
    bench_cases=_BENCH,
    dtypes=(torch.bfloat16, torch.float32),
    differentiable=False,
)


def _entries(fp8: torch.dtype, suffix: str) -> tuple[Entry, ...]:
    of_blocks = partial(_entry, make=_make)
    return (
        _entry(
            name=f"fp8_cast_transpose{suffix}",
            function=partial(_tensor, fp8=fp8),
            reference=partial(_define_tensor, fp8=fp8),
            make=_make_tensor,
            cost=_cost(lambda rows, columns: 0, ""),
        ),
        of_blocks(
            name=f"fp8_cast_1x128{suffix}",
            function=partial(_blocks, block_rows=1, fp8=fp8),
            reference=partial(_define_blocks, block_rows=1, fp8=fp8),
            cost=_cost(_line_bytes, " + T * C / 16 B"),
        ),
        of_blocks(
            name=f"fp8_cast_128x128{suffix}",
            function=partial(_blocks, block_rows=128, fp8=fp8),
            reference=partial(_define_blocks, block_rows=128, fp8=fp8),
            cost=_cost(_tile_bytes, " + T * C / 4096 B"),
        ),
    )


_E5M2 = (replace(entry, bench_cases=()) for entry in _entries(torch.float8_e5m2, "_e5m2"))
ENTRIES = (*_entries(torch.float8_e4m3fn, ""), *_E5M2)
