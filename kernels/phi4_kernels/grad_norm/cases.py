"""Cases of the gradient norm for checks and benchmarks."""

from typing import Any

import torch
from torch import Tensor

from phi4_kernels.grad_norm import op
from phi4_kernels.reference_arithmetic import widened
from phi4_kernels.registry import CallInputs, Case, Cost, Entry
from phi4_kernels.testing import random_inputs

# Around packs of 4 and chunks of 65536, more tensors than a launch takes, an empty one.
_PROOF = (
    Case("sizes", {"lengths": (0, 1, 3, 65536, 65537, 200001)}),
    Case("many", {"lengths": tuple(range(1, 140))}),
    Case("one", {"lengths": (1,)}),
    Case("empty", {"lengths": (0, 0)}),
)
_BENCH = (Case("n134M", {"lengths": (78643200, 28311552, 27262976)}),)


def _make(case: Case, dtype: torch.dtype) -> CallInputs:
    generator, lengths = case.generator(), case.sizes["lengths"]
    scales = random_inputs.row_scales(len(lengths), generator, 1e-3, 1e3).tolist()
    tensors = {
        f"t{i}": (torch.randn(n, generator=generator) * scale).to(dtype)
        for i, (n, scale) in enumerate(zip(lengths, scales, strict=True))
    }
    return CallInputs(tensors)


def _norm(implementation: str, **tensors: Tensor) -> Tensor:
    return op.square_sum(list(tensors.values()), implementation=implementation).sqrt().float()


def _define(**tensors: Tensor) -> Tensor:
    return torch.stack([widened(tensor).square().sum() for tensor in tensors.values()]).sum().sqrt()


def _cost(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    size = sum(case.sizes["lengths"])
    return {"forward": Cost(dtype.itemsize * size, 2 * size, f"N * {dtype.itemsize} B")}


ENTRIES = (
    Entry(
        op="grad_norm",
        name="grad_norm",
        function=_norm,
        reference=_define,
        make=_make,
        proof_cases=_PROOF,
        shipped_cases=(),
        bench_cases=_BENCH,
        cost=_cost,
        dtypes=(torch.float32, torch.bfloat16),
        differentiable=False,
    ),
)
