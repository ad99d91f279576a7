"""Cross-entropy in Triton: 2 bytes per bf16 logit for the loss, 4 for the gradient in its place.

One program owns a row. A thread keeps a running maximum and sum of its own for each 8 neighbouring
logits it loads, so the loop rescales once per 8 exponentials and never waits for another thread.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from phi4_kernels import launch
from phi4_kernels.launch import Launch

# By columns of the shard. A thread has four 16-byte loads of bf16 in flight in the last row.
FORWARD = (Launch(4096, 1024, 4), Launch(1 << 30, 8192, 8))
BACKWARD = (Launch(4096, 1024, 4), Launch(1 << 30, 8192, 8))
COMBINE_BLOCK = 128

PACK = tl.constexpr(8)
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _columns(start, BLOCK: tl.constexpr):
    packs = tl.arange(0, BLOCK // PACK)[:, None]
    return start + packs * PACK + tl.arange(0, PACK)[None, :]


@triton.jit
def _accumulate(
    row_ptr,
    start,
    largest,
    total,
    summed,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    SUMMED: tl.constexpr,
):
    cols = _columns(start, BLOCK)
    if MASKED:
        x = tl.load(row_ptr + cols, mask=cols < WIDTH, other=float("-inf")).to(tl.float32)
    else:
        x = tl.load(row_ptr + cols).to(tl.float32)
    higher = tl.maximum(largest, tl.max(x, axis=1))
    total = total * tl.exp(largest - higher) + tl.sum(tl.exp(x - higher[:, None]), axis=1)
    if SUMMED:
        summed += tl.sum(tl.where(cols < WIDTH, x, 0.0) if MASKED else x, axis=1)
    return higher, total, summed


@triton.jit
def _row_statistics(
    row_ptr, target, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SUMMED: tl.constexpr
):
    b_largest = tl.full((BLOCK // PACK,), LOWEST, tl.float32)
    b_total = tl.zeros((BLOCK // PACK,), tl.float32)
    b_summed = tl.zeros((BLOCK // PACK,), tl.float32)
    whole: tl.constexpr = WIDTH // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        b_largest, b_total, b_summed = _accumulate(
            row_ptr, start, b_largest, b_total, b_summed, WIDTH, BLOCK, False, SUMMED
        )
    if whole < WIDTH:
        b_largest, b_total, b_summed = _accumulate(
            row_ptr, whole, b_largest, b_total, b_summed, WIDTH, BLOCK, True, SUMMED
        )
    highest = tl.max(b_largest)
    total = tl.sum(b_total * tl.exp(b_largest - highest))
    column = target - first
    owned = (column >= 0) & (column < WIDTH)
    picked = tl.load(row_ptr + column, mask=owned, other=0.0).to(tl.float32)
    return highest, total, picked, tl.sum(b_summed)


@triton.jit
def _store_losses(
    tokens,
    live,
    largest,
    total,
    picked,
    summed,
    targets_ptr,
    weights_ptr,
    losses_ptr,
    log_probs_ptr,
    normalizer_ptr,
    vocabulary,
    ignore_index,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
):
    # A few numbers per token, so in fp64: the loss of a confident model is a difference near 0.
    target = tl.load(targets_ptr + tokens, mask=live, other=0).to(tl.int64)
    counted = target != ignore_index
    total = tl.where((target >= 0) & (target < vocabulary), total, float("nan"))
    total = tl.where(counted, total, 1.0)
    log_sum = tl.log(total)
    log_normalizer = largest.to(tl.float64) + log_sum
    log_prob = picked - largest.to(tl.float64) - log_sum
    loss = -log_prob
    if SMOOTHING > 0:
        loss = (1 - SMOOTHING) * loss + SMOOTHING * (log_normalizer - summed / vocabulary)
    if Z_LOSS > 0:
        loss += Z_LOSS * log_normalizer * log_normalizer
    if weights_ptr is not None:
        loss *= tl.load(weights_ptr + tokens, mask=live, other=0.0).to(tl.float64)
    tl.store(losses_ptr + tokens, tl.where(counted, loss, 0.0).to(tl.float32), mask=live)
    tl.store(log_probs_ptr + tokens, tl.where(counted, log_prob, 0.0).to(tl.float32), mask=live)
    out_ptr = normalizer_ptr + tokens * 3
    tl.store(out_ptr, tl.where(counted, largest, 0.0), mask=live)
    tl.store(out_ptr + 1, tl.where(counted, 1.0 / total, 0.0).to(tl.float32), mask=live)
    slope = 1.0 + 2.0 * Z_LOSS * log_normalizer
    tl.store(out_ptr + 2, tl.where(counted, slope, 0.0).to(tl.float32), mask=live)


@triton.jit
def _cross_entropy_forward_kernel(
    logits_ptr,
    targets_ptr,
    weights_ptr,
    losses_ptr,
    log_probs_ptr,
    normalizer_ptr,
    stride_logits,
    ignore_index,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row).to(tl.int64)
    highest = 0.0
    total = 0.0
    picked = 0.0
    summed = 0.0
    if target != ignore_index:
        row_ptr = logits_ptr + row * stride_logits
        highest, total, picked, summed = _row_statistics(
            row_ptr, target, 0, WIDTH, BLOCK, SMOOTHING > 0
        )
    _store_losses(
        row,
        True,
        highest,
        total.to(tl.float64),
        picked.to(tl.float64),
        summed.to(tl.float64),
        targets_ptr,
        weights_ptr,
        losses_ptr,
        log_probs_ptr,
        normalizer_ptr,
        WIDTH,
        ignore_index,
        SMOOTHING,
        Z_LOSS,
    )


@triton.jit
def _cross_entropy_statistics_kernel(
    logits_ptr,
    targets_ptr,
    statistics_ptr,
    stride_logits,
    first,
    ignore_index,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SUMMED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row).to(tl.int64)
    out_ptr = statistics_ptr + row * (4 if SUMMED else 3)
    highest = 0.0
    total = 0.0
    picked = 0.0
    summed = 0.0
    if target != ignore_index:
        row_ptr = logits_ptr + row * stride_logits
        highest, total, picked, summed = _row_statistics(
            row_ptr, target, first, WIDTH, BLOCK, SUMMED
        )
    tl.store(out_ptr, highest)
    tl.store(out_ptr + 1, total)
    tl.store(out_ptr + 2, picked)
    if SUMMED:
        tl.store(out_ptr + 3, summed)


@triton.jit
def _cross_entropy_combine_kernel(
    statistics_ptr,
    targets_ptr,
    weights_ptr,
    losses_ptr,
    log_probs_ptr,
    normalizer_ptr,
    num_tokens,
    vocabulary,
    ignore_index,
    RANKS: tl.constexpr,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = tokens < num_tokens
    columns: tl.constexpr = 4 if SMOOTHING > 0 else 3
    token_ptr = statistics_ptr + tokens * columns
    rank_stride = tl.cast(num_tokens, tl.int64) * columns
    largest = tl.full((BLOCK,), LOWEST, tl.float32)
    for rank in tl.static_range(RANKS):
        local = tl.load(token_ptr + rank * rank_stride, mask=live, other=0.0)
        largest = tl.maximum(largest, local)
    total = tl.zeros((BLOCK,), tl.float64)
    picked = tl.zeros((BLOCK,), tl.float64)
    summed = tl.zeros((BLOCK,), tl.float64)
    for rank in tl.static_range(RANKS):
        rank_ptr = token_ptr + rank * rank_stride
        local = tl.load(rank_ptr, mask=live, other=0.0).to(tl.float64)
        share = tl.load(rank_ptr + 1, mask=live, other=1.0).to(tl.float64)
        total += share * tl.exp(local - largest.to(tl.float64))
        picked += tl.load(rank_ptr + 2, mask=live, other=0.0).to(tl.float64)
        if SMOOTHING > 0:
            summed += tl.load(rank_ptr + 3, mask=live, other=0.0).to(tl.float64)
    _store_losses(
        tokens,
        live,
        largest,
        total,
        picked,
        summed,
        targets_ptr,
        weights_ptr,
        losses_ptr,
        log_probs_ptr,
        normalizer_ptr,
        vocabulary,
        ignore_index,
        SMOOTHING,
        Z_LOSS,
    )


@triton.jit
def _gradient(
    row_ptr,
    start,
    largest,
    scale,
    even,
    at_target,
    column,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    cols = _columns(start, BLOCK)
    if MASKED:
        x = tl.load(row_ptr + cols, mask=cols < WIDTH, other=float("-inf")).to(tl.float32)
    else:
        x = tl.load(row_ptr + cols).to(tl.float32)
    gradient = tl.exp(x - largest) * scale - even
    gradient = tl.where(cols == column, gradient + at_target, gradient)
    gradient = gradient.to(row_ptr.dtype.element_ty)
    if MASKED:
        tl.store(row_ptr + cols, gradient, mask=cols < WIDTH)
    else:
        tl.store(row_ptr + cols, gradient)


@triton.jit
def _zero(row_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    for start in range(0, WIDTH, BLOCK):
        cols = _columns(start, BLOCK)
        zeros = tl.zeros((BLOCK // PACK, PACK), row_ptr.dtype.element_ty)
        tl.store(row_ptr + cols, zeros, mask=cols < WIDTH)


@triton.jit
def _cross_entropy_backward_kernel(
    logits_ptr,
    targets_ptr,
    weights_ptr,
    normalizer_ptr,
    dlosses_ptr,
    dlog_probs_ptr,
    stride_logits,
    first,
    vocabulary,
    ignore_index,
    SMOOTHING: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits
    target = tl.load(targets_ptr + row).to(tl.int64)
    if target == ignore_index:
        _zero(row_ptr, WIDTH, BLOCK)
    else:
        largest = tl.load(normalizer_ptr + row * 3)
        inverse = tl.load(normalizer_ptr + row * 3 + 1)
        slope = tl.load(normalizer_ptr + row * 3 + 2)
        dloss = 0.0
        dlog_prob = 0.0
        if dlosses_ptr is not None:
            dloss = tl.load(dlosses_ptr + row)
            if weights_ptr is not None:
                dloss *= tl.load(weights_ptr + row)
        if dlog_probs_ptr is not None:
            dlog_prob = tl.load(dlog_probs_ptr + row)
        scale = (dloss * slope - dlog_prob) * inverse
        at_target = dlog_prob - dloss * (1.0 - SMOOTHING)
        even = dloss * SMOOTHING / vocabulary
        column = target - first
        whole: tl.constexpr = WIDTH // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            _gradient(row_ptr, start, largest, scale, even, at_target, column, WIDTH, BLOCK, False)
        if whole < WIDTH:
            _gradient(row_ptr, whole, largest, scale, even, at_target, column, WIDTH, BLOCK, True)


@cache
def _block(widest: int, width: int) -> int:
    return max(PACK.value, min(widest, triton.next_power_of_2(width)))


def forward(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See op._forward."""
    num_tokens, width = logits.shape
    outputs = _per_token(num_tokens, targets.device)
    if num_tokens:
        row = launch.pick(FORWARD, width)
        _cross_entropy_forward_kernel[(num_tokens,)](
            logits,
            targets,
            weights,
            *outputs,
            logits.stride(0),
            ignore_index,
            SMOOTHING=label_smoothing,
            Z_LOSS=z_loss,
            WIDTH=width,
            BLOCK=_block(row.block, width),
            num_warps=row.num_warps,
        )
    return outputs


def _per_token(num_tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, log-probabilities and normalizer, not yet written."""
    fp32 = torch.float32
    losses = torch.empty(num_tokens, dtype=fp32, device=device)
    log_probs = torch.empty(num_tokens, dtype=fp32, device=device)
    return losses, log_probs, torch.empty((num_tokens, 3), dtype=fp32, device=device)


def statistics(
    logits: Tensor, targets: Tensor, first: int, ignore_index: int, with_sum: bool
) -> Tensor:
    """See op._statistics."""
    num_tokens, width = logits.shape
    shape = (num_tokens, 3 + with_sum)
    out = torch.empty(shape, dtype=torch.float32, device=logits.device)
    if num_tokens:
        row = launch.pick(FORWARD, width)
        _cross_entropy_statistics_kernel[(num_tokens,)](
            logits,
            targets,
            out,
            logits.stride(0),
            first,
            ignore_index,
            WIDTH=width,
            BLOCK=_block(row.block, width),
            SUMMED=with_sum,
            num_warps=row.num_warps,
        )
    return out


def combine(
    statistics: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    vocabulary: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See op._combine."""
    ranks, num_tokens, _ = statistics.shape
    outputs = _per_token(num_tokens, statistics.device)
    if num_tokens:
        _cross_entropy_combine_kernel[(launch.ceil_div(num_tokens, COMBINE_BLOCK),)](
            statistics,
            targets,
            weights,
            *outputs,
            num_tokens,
            vocabulary,
            ignore_index,
            RANKS=ranks,
            SMOOTHING=label_smoothing,
            Z_LOSS=z_loss,
            BLOCK=COMBINE_BLOCK,
            num_warps=4,
        )
    return outputs


def backward(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    normalizer: Tensor,
    dlosses: Tensor | None,
    dlog_probs: Tensor | None,
    first: int,
    vocabulary: int,
    ignore_index: int,
    label_smoothing: float,
) -> None:
    """See op._backward; overwrites logits [T, V / P]."""
    num_tokens, width = logits.shape
    if num_tokens:
        row = launch.pick(BACKWARD, width)
        _cross_entropy_backward_kernel[(num_tokens,)](
            logits,
            targets,
            weights,
            normalizer,
            dlosses,
            dlog_probs,
            logits.stride(0),
            first,
            vocabulary,
            ignore_index,
            SMOOTHING=label_smoothing,
            WIDTH=width,
            BLOCK=_block(row.block, width),
            num_warps=row.num_warps,
        )
