"""Matrix products that are summed, and left, in fp32, whatever the dtype of their factors.

On a GPU the GEMM does so; on a CPU the factors are widened block by block. They are registered as
operators because torch.compile cannot trace torch's form of them.
"""

import torch
from torch import Tensor

from phi4_kernels import operators

_BLOCK_ELEMENTS = 1 << 22
_BLOCK_SUMMANDS = 512
"""A CPU's product of one or two rows sums sequentially: over 100,352 terms its error is ten times
that of the blocked product of many rows."""


def _blocks(num_rows: int, width: int) -> list[slice]:
    """Groups of rows of at most _BLOCK_ELEMENTS elements, or one row."""
    step = max(1, _BLOCK_ELEMENTS // max(width, 1))
    return [slice(start, start + step) for start in range(0, num_rows, step)]


def _wide_product_gpu(left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left, right, out_dtype=torch.float32)


def _wide_product_cpu(left: Tensor, right: Tensor) -> Tensor:
    if right.shape[0] <= _BLOCK_SUMMANDS:
        return left.float() @ right.float()
    # Sums of 512 products in fp32, their sum in fp64: the error does not grow with the length.
    out = left.new_zeros((left.shape[0], right.shape[1]), dtype=torch.float64)
    for start in range(0, right.shape[0], _BLOCK_SUMMANDS):
        block = slice(start, start + _BLOCK_SUMMANDS)
        out += left[:, block].float() @ right[block].float()
    return out.float()


def _add_product_gpu(total: Tensor, left: Tensor, right: Tensor) -> None:
    # total += left^T right, accumulated in fp32 by the GEMM itself
    torch.addmm(total, left.t(), right, out_dtype=torch.float32, out=total)


def _add_product_cpu(total: Tensor, left: Tensor, right: Tensor) -> None:
    wide = right.float()
    for block in _blocks(total.shape[0], total.shape[1]):
        total[block].addmm_(left[:, block].t().float(), wide)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    add = _add_product_cpu if total.device.type == "cpu" else _add_product_gpu
    add(total, left, right)


torch.library.define("phi4::wide_product", "(Tensor left, Tensor right) -> Tensor")
torch.library.impl("phi4::wide_product", "cuda")(_wide_product_gpu)
torch.library.impl("phi4::wide_product", "cpu")(_wide_product_cpu)
torch.library.register_fake("phi4::wide_product")(
    lambda left, right: left.new_empty((left.shape[0], right.shape[1]), dtype=torch.float32)
)
_add_wide_product = operators.define(
    "add_wide_product",
    "(Tensor(a!) total, Tensor left, Tensor right) -> ()",
    _add_product,
    lambda total, left, right: None,
)


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """left [A, B] @ right [B, C] as fp32 [A, C]; equal dtypes."""
    return torch.ops.phi4.wide_product(left, right)


def add_wide_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [B, C], fp32, += left [A, B].T @ right [A, C]; equal dtypes."""
    _add_wide_product(total, left, right)


def narrowed_in_place(total: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """fp32 [A, B], contiguous, rounded to `dtype` inside its own memory; None stays None.

    A second matrix would raise the peak by half. The result keeps the fp32 memory alive.
    """
    if total is None or dtype == torch.float32:
        return total
    narrow = total.view(-1).view(dtype)[: total.numel()].view(total.shape)
    # Row i of the result overlaps only source rows up to i, which have been read already.
    for block in _blocks(*total.shape):
        narrow[block] = total[block].to(dtype, copy=True)
    return narrow
