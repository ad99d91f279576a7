"""SwiGLU in Triton: tiles of a few rows by a power of two that divides the width, so without masks.

phi-4's width, 17,920, is 35 * 512. Each thread holds 16 elements of each half: with several 16-byte
loads in flight the kernel waits for bandwidth, not for latency.
"""

from functools import lru_cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from phi4_kernels import launch
from phi4_kernels.launch import Launch

# By width F. `block` is the widest tile; the kernel takes the largest power of two that divides F.
FORWARD = (Launch(1 << 30, 512, 4, rows=4),)
BACKWARD = (Launch(1 << 30, 512, 4, rows=2),)
# 64 rows make 64-byte pieces of the transpose.
COLUMNWISE = (Launch(1 << 30, 128, 8, rows=64),)
_SMALLEST_EXACT_BLOCK = 128

FP8_MAX = tl.constexpr(448.0)
_LOG2_E = tl.constexpr(1.4426950408889634)
# ln(2), and the first 16 bits of it apart from the rest.
_LN_2_HIGH = tl.constexpr(0.693145751953125)
_LN_2_LOW = tl.constexpr(1.4286068203094172e-06)


@triton.jit
def _exp(x):
    # tl.exp(x) is ex2.approx of a rounded x * log2(e): at -40 that rounding alone is 3 ulp. Here a
    # whole power of 2 is taken out first; its product with _LN_2_HIGH is exact.
    x = tl.maximum(x, -128.0)
    # x = n ln(2) + r with |r| <= ln(2) / 2, so exp(x) = 2^n * exp(r)
    whole = tl.floor(x * _LOG2_E + 0.5)
    rest = x - whole * _LN_2_HIGH - whole * _LN_2_LOW
    return tl.exp2(whole) * tl.exp2(rest * _LOG2_E)


@triton.jit
def _sigmoid(x, EXACT: tl.constexpr):
    # exp of a non-positive number only: no overflow, and full precision on both sides of zero.
    small = _exp(-tl.abs(x)) if EXACT else tl.exp(-tl.abs(x))
    # sigmoid(x) = 1 / (1 + exp(-x)) for x >= 0, else exp(x) / (1 + exp(x))
    share = tl.where(x >= 0, 1.0, small)
    # `/` is div.full, which loses 2 ulp.
    return tl.div_rn(share, 1.0 + small) if EXACT else share / (1.0 + small)


@triton.jit
def _tile(num_rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [ROWS, 1], columns [1, BLOCK] and mask [ROWS, BLOCK] of a program."""
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    # Neighbouring programs take neighbouring columns of the same rows.
    rows = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = (program % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = rows < num_rows
    if WIDTH % BLOCK != 0:
        mask = mask & (cols < WIDTH)
    return rows, cols, tl.broadcast_to(mask, (ROWS, BLOCK))


@triton.jit
def _swiglu_forward_kernel(
    gate_up_ptr,
    scale_ptr,
    out_ptr,
    transposed_ptr,
    amax_ptr,
    stride_gate_up,
    num_rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    FP8: tl.constexpr,
    COLUMNWISE: tl.constexpr,
):
    rows, cols, mask = _tile(num_rows, WIDTH, ROWS, BLOCK)
    gate_ptr = gate_up_ptr + rows * stride_gate_up + cols
    # A row is [gate, up], F columns each.
    gate = tl.load(gate_ptr, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + WIDTH, mask=mask, other=0.0).to(tl.float32)
    # out = silu(g) * u = g * sigmoid(g) * u
    out = gate * _sigmoid(gate, out_ptr.dtype.element_ty == tl.float32) * up
    if COLUMNWISE:
        # Converted again: ptxas 12 miscompiles two uses of an e4m3 pair, see testing/fp8_pairs.py.
        # The second load of the scale keeps the compiler from merging the two conversions.
        turned = tl.clamp(out * tl.load(scale_ptr, volatile=True), -FP8_MAX, FP8_MAX)
        turned = tl.trans(turned.to(transposed_ptr.dtype.element_ty))
        down = transposed_ptr + cols.to(tl.int64) * num_rows + rows
        tl.store(tl.trans(down), turned, mask=tl.trans(mask))
    if FP8:
        # amax is of out before scaling; one per program, reduced afterwards: no atomics.
        tl.store(amax_ptr + tl.program_id(0), tl.max(tl.max(tl.abs(out), axis=1), axis=0))
        # e4m3 has no infinity: what is past its largest number, 448, saturates.
        out = tl.clamp(out * tl.load(scale_ptr), -FP8_MAX, FP8_MAX)
    tl.store(out_ptr + rows * WIDTH + cols, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward_kernel(
    dout_ptr,
    gate_up_ptr,
    gradient_ptr,
    product_ptr,
    stride_dout,
    stride_gate_up,
    num_rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EMIT: tl.constexpr,
):
    rows, cols, mask = _tile(num_rows, WIDTH, ROWS, BLOCK)
    dout = tl.load(dout_ptr + rows * stride_dout + cols, mask=mask, other=0.0).to(tl.float32)
    gate_ptr = gate_up_ptr + rows * stride_gate_up + cols
    gate = tl.load(gate_ptr, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + WIDTH, mask=mask, other=0.0).to(tl.float32)
    # s = sigmoid(g)
    sigmoid = _sigmoid(gate, gate_up_ptr.dtype.element_ty == tl.float32)
    silu = gate * sigmoid
    # dg = dout * u * s * (1 + g * (1 - s)), as d silu / dg = s + g * s * (1 - s)
    dgate = dout * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    dgate_ptr = gradient_ptr + rows * (2 * WIDTH) + cols
    tl.store(dgate_ptr, dgate.to(gradient_ptr.dtype.element_ty), mask=mask)
    # du = dout * silu(g)
    tl.store(dgate_ptr + WIDTH, (dout * silu).to(gradient_ptr.dtype.element_ty), mask=mask)
    if EMIT:
        # out once more: the weight gradient of the next product needs it, forward did not keep it.
        product = (silu * up).to(product_ptr.dtype.element_ty)
        tl.store(product_ptr + rows * WIDTH + cols, product, mask=mask)


@lru_cache(maxsize=1024)
def _grid(widest: int, rows: int, num_rows: int, width: int) -> tuple[int, dict[str, int]]:
    block = launch.divisor_block(width, widest, _SMALLEST_EXACT_BLOCK)
    # A narrower tile is taller: every thread keeps its 16-byte pieces.
    rows = rows * widest // block
    programs = launch.ceil_div(num_rows, rows) * launch.ceil_div(width, block)
    return programs, {"WIDTH": width, "ROWS": rows, "BLOCK": block}


def forward(gate_up: Tensor) -> Tensor:
    """[T, 2F] -> [T, F]."""
    num_rows, both_widths = gate_up.shape
    width = both_widths // 2
    out = gate_up.new_empty(num_rows, width)
    if out.numel():
        row = launch.pick(FORWARD, width)
        programs, tile = _grid(row.block, row.rows, num_rows, width)
        _swiglu_forward_kernel[(programs,)](
            gate_up,
            None,
            out,
            None,
            None,
            gate_up.stride(0),
            num_rows,
            **tile,
            FP8=False,
            COLUMNWISE=False,
            num_warps=row.num_warps,
        )
    return out


def forward_fp8(gate_up: Tensor, scale: Tensor, columnwise: bool) -> tuple[Tensor, Tensor, Tensor]:
    """[T, 2F] -> e4m3 [T, F], its transpose (empty unless columnwise), amax []."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    row = launch.pick(COLUMNWISE if columnwise else FORWARD, width)
    programs, tile = _grid(row.block, row.rows, num_rows, width)
    fp8 = partial(torch.empty, dtype=torch.float8_e4m3fn, device=gate_up.device)
    out = fp8((num_rows, width))
    transposed = fp8((width, num_rows) if columnwise else (0, 0))
    amax = torch.empty(programs, dtype=torch.float32, device=gate_up.device)
    if not out.numel():
        return out, transposed, scale.new_zeros(())
    _swiglu_forward_kernel[(programs,)](
        gate_up,
        scale,
        out,
        transposed,
        amax,
        gate_up.stride(0),
        num_rows,
        **tile,
        FP8=True,
        COLUMNWISE=columnwise,
        num_warps=row.num_warps,
    )
    return out, transposed, amax.amax()


def backward(dout: Tensor, gate_up: Tensor, emit_product: bool) -> tuple[Tensor, Tensor]:
    """[T, F], [T, 2F] -> gradient [T, 2F], product [T, F] (empty unless emitted)."""
    num_rows, width = dout.shape
    like = partial(torch.empty, dtype=gate_up.dtype, device=gate_up.device)
    gradient = like((num_rows, 2 * width))
    product = like((num_rows, width) if emit_product else (0, 0))
    if dout.numel():
        row = launch.pick(BACKWARD, width)
        programs, tile = _grid(row.block, row.rows, num_rows, width)
        _swiglu_backward_kernel[(programs,)](
            dout,
            gate_up,
            gradient,
            product,
            dout.stride(0),
            gate_up.stride(0),
            num_rows,
            **tile,
            EMIT=emit_product,
            num_warps=row.num_warps,
        )
    return gradient, product
