"""RMSNorm in Triton: a row stays in registers, as mask-free blocks, from load to store.

A width such as 5120 is 5 blocks of 1024, so no lane is wasted on the next power of two. Backward is
persistent: each program keeps its share of the weight gradient in fp32 registers over all of its
rows and writes it once; the shares are then summed in a fixed order.
"""

# Triton compiles tuples that grow by concatenation, not by unpacking.
# ruff: noqa: RUF005

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from phi4_kernels import launch
from phi4_kernels.launch import Launch

# By hidden size: 8 elements a thread and block, so bf16 moves in 16-byte pieces.
FORWARD = (Launch(512, 256, 1), Launch(10240, 1024, 4))
BACKWARD = (
    Launch(512, 256, 1, programs_per_processor=16),
    Launch(5120, 1024, 4, programs_per_processor=3),
    Launch(10240, 2048, 8, programs_per_processor=2),
)
# A row is read twice, the second time from L2: 32 rows make 32-byte pieces of the transpose.
COLUMNWISE = (Launch(10240, 128, 8, rows=32),)

FP8_MAX = tl.constexpr(448.0)


@triton.jit
def _load(ptr, block: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Block number `block` of a row, in fp32."""
    cols = block * BLOCK + tl.arange(0, BLOCK)
    # Decided when compiled: all blocks but a last, partial one have no mask.
    if (block + 1) * BLOCK <= WIDTH:
        return tl.load(ptr + cols).to(tl.float32)
    else:
        return tl.load(ptr + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, values, block: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    cols = block * BLOCK + tl.arange(0, BLOCK)
    if (block + 1) * BLOCK <= WIDTH:
        tl.store(ptr + cols, values.to(ptr.dtype.element_ty))
    else:
        tl.store(ptr + cols, values.to(ptr.dtype.element_ty), mask=cols < WIDTH)


@triton.jit
def _inverse_root(mean_square, eps):
    # One value serves a row, and an error in it shifts all of the row: a rounded root and then a
    # rounded quotient can be off by 1 ulp. A Newton step of rsqrt.approx, with the rests of the
    # products by fma, is off by little more than half.
    # root = 1 / sqrt(mean(x^2) + eps), then root += root / 2 * (1 - shifted * root^2)
    shifted = mean_square + eps
    root = tl.rsqrt(shifted)
    product = shifted * root
    rest = tl.fma(shifted, root, -product)
    error = tl.fma(-product, root, 1.0) - rest * root
    # The step turns infinity into NaN.
    return tl.where(error == error, tl.fma(0.5 * root, error, root), root)


@triton.jit
def _rms_norm_forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    scale_ptr,
    y_ptr,
    total_ptr,
    rstd_ptr,
    amax_ptr,
    stride_x,
    stride_residual,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    ADD: tl.constexpr,
    FP8: tl.constexpr,
):
    """A program per row: y, rstd, and as asked the sum with the residual and amax."""
    row = tl.program_id(0).to(tl.int64)
    # sum_j x_j^2, per lane: the lanes meet once, after the last block.
    squares = tl.zeros((BLOCK,), tl.float32)
    b_x = ()
    for block in tl.static_range(NUM_BLOCKS):
        x = _load(x_ptr + row * stride_x, block, WIDTH, BLOCK)
        if ADD:
            x += _load(residual_ptr + row * stride_residual, block, WIDTH, BLOCK)
            # The norm is of the sum as it is stored, rounded, so that backward sees the same
            # numbers.
            x = x.to(total_ptr.dtype.element_ty).to(tl.float32)
            _store(total_ptr + row * WIDTH, x, block, WIDTH, BLOCK)
        squares += x * x
        # The row stays in registers, one tuple entry per block.
        b_x = b_x + (x,)
    # rstd = 1 / sqrt(mean_j x_j^2 + eps)
    rstd = _inverse_root(tl.sum(squares) / WIDTH, eps)
    tl.store(rstd_ptr + row, rstd)
    largest = tl.zeros((BLOCK,), tl.float32)
    if FP8:
        scale = tl.load(scale_ptr)
    for block in tl.static_range(NUM_BLOCKS):
        # y_j = x_j * rstd * w_j
        y = b_x[block] * rstd * _load(weight_ptr, block, WIDTH, BLOCK)
        if FP8:
            # amax is of y before scaling, for the scale of a later step (delayed scaling).
            largest = tl.maximum(largest, tl.abs(y))
            # e4m3 has no infinity: what is past its largest number, 448, saturates.
            y = tl.clamp(y * scale, -FP8_MAX, FP8_MAX)
        _store(y_ptr + row * WIDTH, y, block, WIDTH, BLOCK)
    if FP8:
        # One maximum per row, reduced afterwards: no atomics.
        tl.store(amax_ptr + row, tl.max(largest))


@triton.jit
def _rms_norm_fp8_columnwise_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    scale_ptr,
    y_ptr,
    transposed_ptr,
    total_ptr,
    rstd_ptr,
    amax_ptr,
    stride_x,
    stride_residual,
    num_rows,
    eps,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    """A program per ROWS rows: y in e4m3 and its transpose, which needs several rows at a time."""
    program = tl.program_id(0)
    rows = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = (rows < num_rows)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, WIDTH, BLOCK):
        b_cols = start + cols
        mask = live & (b_cols < WIDTH)
        # First pass over the row: rstd. ROWS rows of 5120 do not fit in registers.
        x = tl.load(x_ptr + rows[:, None] * stride_x + b_cols, mask=mask, other=0.0).to(tl.float32)
        if ADD:
            added = residual_ptr + rows[:, None] * stride_residual + b_cols
            x += tl.load(added, mask=mask, other=0.0).to(tl.float32)
            x = x.to(total_ptr.dtype.element_ty).to(tl.float32)
        squares += x * x
    rstd = _inverse_root(tl.sum(squares, axis=1) / WIDTH, eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)
    scale, same_scale = tl.load(scale_ptr), tl.load(scale_ptr, volatile=True)
    largest = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, WIDTH, BLOCK):
        b_cols = start + cols
        mask = live & (b_cols < WIDTH)
        # Second pass, out of L2: y.
        x = tl.load(x_ptr + rows[:, None] * stride_x + b_cols, mask=mask, other=0.0).to(tl.float32)
        if ADD:
            added = residual_ptr + rows[:, None] * stride_residual + b_cols
            x += tl.load(added, mask=mask, other=0.0).to(tl.float32)
            x = x.to(total_ptr.dtype.element_ty).to(tl.float32)
            stored = x.to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + rows[:, None] * WIDTH + b_cols, stored, mask=mask)
        weight = tl.load(weight_ptr + b_cols, mask=b_cols < WIDTH, other=0.0).to(tl.float32)
        # y_j = x_j * rstd * w_j
        y = x * rstd[:, None] * weight
        largest = tl.maximum(largest, tl.abs(y))
        stored = tl.clamp(y * scale, -FP8_MAX, FP8_MAX).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + rows[:, None] * WIDTH + b_cols, stored, mask=mask)
        # Converted again: ptxas 12 miscompiles two uses of an e4m3 pair, see testing/fp8_pairs.py.
        turned = tl.clamp(y * same_scale, -FP8_MAX, FP8_MAX).to(transposed_ptr.dtype.element_ty)
        # y^T [H, T]: column j of the tile becomes a piece of ROWS bytes of row j.
        down = transposed_ptr + b_cols.to(tl.int64) * num_rows + rows[:, None]
        tl.store(tl.trans(down), tl.trans(turned), mask=tl.trans(mask))
    tl.store(amax_ptr + program, tl.max(tl.max(largest, axis=1), axis=0))


@triton.jit
def _rms_norm_backward_kernel(
    dy_ptr,
    dtotal_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_ptr,
    stride_dy,
    stride_dtotal,
    stride_x,
    num_rows,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    ADD: tl.constexpr,
):
    """dx of every row, and each program's share of dweight."""
    program = tl.program_id(0)
    b_dweight = ()
    for _ in tl.static_range(NUM_BLOCKS):
        b_dweight = b_dweight + (tl.zeros((BLOCK,), tl.float32),)
    # Persistent: row `program`, then every num_programs-th one, whose dweight stays in registers.
    for index in range(program, num_rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        rstd = tl.load(rstd_ptr + row)
        products = tl.zeros((BLOCK,), tl.float32)
        b_hat = ()
        b_dy = ()
        for block in tl.static_range(NUM_BLOCKS):
            # x^_j = x_j * rstd
            hat = _load(x_ptr + row * stride_x, block, WIDTH, BLOCK) * rstd
            dy = _load(dy_ptr + row * stride_dy, block, WIDTH, BLOCK)
            # sum_j dy_j * w_j * x^_j, per lane
            products += dy * _load(weight_ptr, block, WIDTH, BLOCK) * hat
            b_hat = b_hat + (hat,)
            b_dy = b_dy + (dy,)
        # c = mean_j(dy_j * w_j * x^_j)
        mean = tl.sum(products) / WIDTH
        summed = ()
        for block in tl.static_range(NUM_BLOCKS):
            weight = _load(weight_ptr, block, WIDTH, BLOCK)
            # dx_j = rstd * (dy_j * w_j - x^_j * c)
            dx = rstd * (b_dy[block] * weight - b_hat[block] * mean)
            if ADD:
                # The sum with the residual is also an output: its gradient passes through.
                dx += _load(dtotal_ptr + row * stride_dtotal, block, WIDTH, BLOCK)
            _store(dx_ptr + row * WIDTH, dx, block, WIDTH, BLOCK)
            # dw_j += dy_j * x^_j
            summed = summed + (b_dweight[block] + b_dy[block] * b_hat[block],)
        b_dweight = summed
    for block in tl.static_range(NUM_BLOCKS):
        # [programs, H]: shares are summed in order by the caller, so two runs give equal bits.
        share_ptr = dweight_ptr + program.to(tl.int64) * WIDTH
        _store(share_ptr, b_dweight[block], block, WIDTH, BLOCK)


@cache
def _blocks(row: Launch, width: int) -> dict[str, int]:
    # A block no wider than the row, or idle lanes would be the most of it.
    block = min(row.block, triton.next_power_of_2(width))
    return {"WIDTH": width, "BLOCK": block, "NUM_BLOCKS": launch.ceil_div(width, block)}


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, scale: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """y, total with a residual, rstd, and amax of each row with a scale."""
    (rows, width), device = x.shape, x.device
    dtype = x.dtype if scale is None else torch.float8_e4m3fn
    y = torch.empty((rows, width), dtype=dtype, device=device)
    total = None if residual is None else torch.empty((rows, width), dtype=x.dtype, device=device)
    rstd = torch.empty(rows, dtype=torch.float32, device=device)
    amax = None if scale is None else torch.empty(rows, dtype=torch.float32, device=device)
    if x.numel():
        row = launch.pick(FORWARD, width)
        _rms_norm_forward_kernel[(rows,)](
            x,
            residual,
            weight,
            scale,
            y,
            total,
            rstd,
            amax,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            eps,
            **_blocks(row, width),
            ADD=residual is not None,
            FP8=scale is not None,
            num_warps=row.num_warps,
        )
    return y, total, rstd, amax


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """[T, H] -> y [T, H], rstd [T] fp32."""
    y, _, rstd, _ = _forward(x, None, weight, eps)
    return y, rstd


def add_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """[T, H], [T, H] -> y, total, rstd."""
    y, total, rstd, _ = _forward(x, residual, weight, eps)
    assert total is not None
    return y, total, rstd


def forward_fp8(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, scale: Tensor, columnwise: bool
) -> tuple[Tensor, ...]:
    """[T, H] -> rowwise, transposed (empty unless columnwise), amax, total, rstd."""
    if not columnwise:
        y, total, rstd, amax = _forward(x, residual, weight, eps, scale)
        transposed = torch.empty((0, 0), dtype=y.dtype, device=y.device)
        total = x.new_empty((0, 0)) if total is None else total
    else:
        y, transposed, total, rstd, amax = _forward_columnwise(x, residual, weight, eps, scale)
    # Without rows the largest value is 0; torch's reduction of nothing is an error.
    largest = scale.new_zeros(()) if amax is None or not amax.numel() else amax.amax()
    return y, transposed, largest, total, rstd


def _forward_columnwise(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, scale: Tensor
) -> tuple[Tensor, ...]:
    rows, width = x.shape
    row = launch.pick(COLUMNWISE, width)
    programs = launch.ceil_div(rows, row.rows)
    y = torch.empty((rows, width), dtype=torch.float8_e4m3fn, device=x.device)
    transposed = torch.empty((width, rows), dtype=torch.float8_e4m3fn, device=x.device)
    total = torch.empty(
        (rows, width) if residual is not None else (0, 0), dtype=x.dtype, device=x.device
    )
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    amax = torch.empty(programs, dtype=torch.float32, device=x.device)
    if x.numel():
        _rms_norm_fp8_columnwise_kernel[(programs,)](
            x,
            residual,
            weight,
            scale,
            y,
            transposed,
            total,
            rstd,
            amax,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            rows,
            eps,
            WIDTH=width,
            ROWS=row.rows,
            BLOCK=row.block,
            ADD=residual is not None,
            num_warps=row.num_warps,
        )
    return y, transposed, total, rstd, amax


def backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """dx [T, H] in the dtype of x, dweight [H] in fp32."""
    rows, width = x.shape
    dx = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if not x.numel():
        return dx, torch.zeros(width, dtype=torch.float32, device=x.device)
    row = launch.pick(BACKWARD, width)
    programs = launch.persistent_programs(row.programs_per_processor, rows, x.device)
    shares = torch.empty((programs, width), dtype=torch.float32, device=x.device)
    _rms_norm_backward_kernel[(programs,)](
        dy,
        dtotal,
        x,
        weight,
        rstd,
        dx,
        shares,
        dy.stride(0),
        0 if dtotal is None else dtotal.stride(0),
        x.stride(0),
        rows,
        **_blocks(row, width),
        ADD=dtotal is not None,
        num_warps=row.num_warps,
    )
    return dx, shares.sum(0)
