"""The stretch in Triton: one program per block of a row."""

import torch
import triton
import triton.language as tl
from phi4_kernels import launch
from phi4_kernels.launch import Launch
from torch import Tensor

# By width H.
LAUNCHES = (Launch(1024, 256, 2), Launch(1 << 30, 1024, 4))


@triton.jit
def _stretch_kernel(x_ptr, out_ptr, factor, stride_x, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < WIDTH
    x = tl.load(x_ptr + row * stride_x + cols, mask=mask, other=0.0).to(tl.float32)
    out = (factor * x).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * WIDTH + cols, out, mask=mask)


def forward(x: Tensor, factor: float) -> Tensor:
    """[T, H] -> [T, H]; the backward pass too, which is the same product."""
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    row = launch.pick(LAUNCHES, width)
    grid = (rows, triton.cdiv(width, row.block))
    _stretch_kernel[grid](
        x, out, factor, launch.row_stride(x), width, row.block, num_warps=row.num_warps
    )
    return out
