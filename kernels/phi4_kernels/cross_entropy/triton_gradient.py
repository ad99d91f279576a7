"""Cross-entropy's backward kernel in Triton: the gradient in place of the logits; see triton_impl.

    p_j = exp(x_j - m) / l
    dx_j = p_j * (dloss * slope - dlog_prob) - dloss * e / V
           + [j = y] * (dlog_prob - dloss * (1 - e))

slope = 1 + 2 z lse is d loss / d lse without smoothing and weight; y, e, z, m and l as in
triton_losses.
"""

import triton
import triton.language as tl

from phi4_kernels.cross_entropy.triton_losses import PACK, columns_of


@triton.jit
def _gradient(
    row_ptr,
    start,
    row_max,
    scale,
    even,
    at_target,
    column,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block of a row, each logit overwritten by its gradient."""
    cols = columns_of(start, BLOCK)
    if MASKED:
        x = tl.load(row_ptr + cols, mask=cols < WIDTH, other=float("-inf")).to(tl.float32)
    else:
        x = tl.load(row_ptr + cols).to(tl.float32)
    # dx_j = exp(x_j - m) * scale - even + [j = y] * at_target
    dx = tl.exp(x - row_max) * scale - even
    dx = tl.where(cols == column, dx + at_target, dx)
    dx = dx.to(row_ptr.dtype.element_ty)
    if MASKED:
        tl.store(row_ptr + cols, dx, mask=cols < WIDTH)
    else:
        tl.store(row_ptr + cols, dx)


@triton.jit
def _zero(row_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Zero gradient for a row."""
    for start in range(0, WIDTH, BLOCK):
        cols = columns_of(start, BLOCK)
        zeros = tl.zeros((BLOCK // PACK, PACK), row_ptr.dtype.element_ty)
        tl.store(row_ptr + cols, zeros, mask=cols < WIDTH)


@triton.jit
def cross_entropy_backward_kernel(
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
    """A program per row, over a rank's share of the vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits
    target = tl.load(targets_ptr + row).to(tl.int64)
    if target == ignore_index:
        _zero(row_ptr, WIDTH, BLOCK)
    else:
        row_max = tl.load(normalizer_ptr + row * 3)
        inverse = tl.load(normalizer_ptr + row * 3 + 1)
        slope = tl.load(normalizer_ptr + row * 3 + 2)
        dloss = 0.0
        dlog_prob = 0.0
        if dlosses_ptr is not None:
            dloss = tl.load(dlosses_ptr + row)
            # The weight is part of the loss, not of log_prob.
            if weights_ptr is not None:
                dloss *= tl.load(weights_ptr + row)
        if dlog_probs_ptr is not None:
            dlog_prob = tl.load(dlog_probs_ptr + row)
        # Of every column: p_j * (dloss * slope - dlog_prob), where p_j = exp(x_j - m) / l
        scale = (dloss * slope - dlog_prob) * inverse
        # Of the target's column alone: d log_prob / dx_y and (1 - e) of the loss
        at_target = dlog_prob - dloss * (1.0 - SMOOTHING)
        # Of every column: smoothing's share of the mean over all V, not over the shard
        even = dloss * SMOOTHING / vocabulary
        # On ranks that do not hold the target, no column equals it.
        column = target - first
        full: tl.constexpr = WIDTH // BLOCK * BLOCK
        for start in range(0, full, BLOCK):
            _gradient(row_ptr, start, row_max, scale, even, at_target, column, WIDTH, BLOCK, False)
        if full < WIDTH:
            _gradient(row_ptr, full, row_max, scale, even, at_target, column, WIDTH, BLOCK, True)
