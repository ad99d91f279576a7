"""Cross-entropy's forward kernels in Triton: from a row of logits to its loss; see triton_impl.

    m = max_j x_j        l = sum_j exp(x_j - m)        lse = m + log(l)        log_prob = x_y - lse
    loss = weight * ((1 - e) * -log_prob + e * (lse - mean_j x_j) + z * lse^2)

y is the target, e the label smoothing, z the factor of the z-loss. The maximum and the sum come
from one pass over the row (Milakov and Gimelshein 2018, online softmax): each new maximum rescales
the sum that was taken under the old one.
"""

import triton
import triton.language as tl

# A thread's neighbouring logits: 16 bytes of bf16, one load.
PACK = tl.constexpr(8)
# The smallest fp32 number. -inf as the first maximum would make exp(-inf - -inf), which is NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def columns_of(start, BLOCK: tl.constexpr):
    """[BLOCK / PACK, PACK]: columns from `start` on, neighbours in one thread."""
    packs = tl.arange(0, BLOCK // PACK)[:, None]
    return start + packs * PACK + tl.arange(0, PACK)[None, :]


@triton.jit
def _accumulate(
    row_ptr,
    start,
    m_i,
    l_i,
    sum_x,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    SUMMED: tl.constexpr,
):
    cols = columns_of(start, BLOCK)
    if MASKED:
        x = tl.load(row_ptr + cols, mask=cols < WIDTH, other=float("-inf")).to(tl.float32)
    else:
        x = tl.load(row_ptr + cols).to(tl.float32)
    # m' = max(m, max_j x_j), l' = l * exp(m - m') + sum_j exp(x_j - m')
    # Of each pack's own numbers, so that no thread waits for another. Past the end x is -inf and
    # adds exp(-inf) = 0.
    m_new = tl.maximum(m_i, tl.max(x, axis=1))
    l_i = l_i * tl.exp(m_i - m_new) + tl.sum(tl.exp(x - m_new[:, None]), axis=1)
    # sum_j x_j, for the mean that label smoothing needs.
    if SUMMED:
        sum_x += tl.sum(tl.where(cols < WIDTH, x, 0.0) if MASKED else x, axis=1)
    return m_new, l_i, sum_x


@triton.jit
def _row_statistics(
    row_ptr, target, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SUMMED: tl.constexpr
):
    m_i = tl.full((BLOCK // PACK,), LOWEST, tl.float32)
    l_i = tl.zeros((BLOCK // PACK,), tl.float32)
    sum_x = tl.zeros((BLOCK // PACK,), tl.float32)
    # Blocks that the row fills need no mask; at most one is left over.
    full: tl.constexpr = WIDTH // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        m_i, l_i, sum_x = _accumulate(row_ptr, start, m_i, l_i, sum_x, WIDTH, BLOCK, False, SUMMED)
    if full < WIDTH:
        m_i, l_i, sum_x = _accumulate(row_ptr, full, m_i, l_i, sum_x, WIDTH, BLOCK, True, SUMMED)
    # The packs' sums are rescaled to one maximum: l = sum_i l_i * exp(m_i - m)
    row_max = tl.max(m_i)
    row_sum = tl.sum(l_i * tl.exp(m_i - row_max))
    # A shard begins at vocabulary entry `first`; one rank of P holds the target.
    column = target - first
    owned = (column >= 0) & (column < WIDTH)
    x_target = tl.load(row_ptr + column, mask=owned, other=0.0).to(tl.float32)
    return row_max, row_sum, x_target, tl.sum(sum_x)


@triton.jit
def _store_losses(
    tokens,
    live,
    row_max,
    row_sum,
    x_target,
    sum_x,
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
    # A target outside the vocabulary makes all of its numbers NaN.
    row_sum = tl.where((target >= 0) & (target < vocabulary), row_sum, float("nan"))
    # An ignored token has no statistics: log(1) instead of log(0).
    row_sum = tl.where(counted, row_sum, 1.0)
    log_sum = tl.log(row_sum)
    # lse = m + log(l)
    lse = row_max.to(tl.float64) + log_sum
    # log_prob = x_y - lse, the maximum first: where x_y is the maximum, only -log(l) is left.
    log_prob = x_target - row_max.to(tl.float64) - log_sum
    loss = -log_prob
    if SMOOTHING > 0:
        # (1 - e) * (lse - x_y) + e * (lse - mean_j x_j)
        loss = (1 - SMOOTHING) * loss + SMOOTHING * (lse - sum_x / vocabulary)
    if Z_LOSS > 0:
        # z * lse^2, which keeps lse near 0
        loss += Z_LOSS * lse * lse
    if weights_ptr is not None:
        loss *= tl.load(weights_ptr + tokens, mask=live, other=0.0).to(tl.float64)
    tl.store(losses_ptr + tokens, tl.where(counted, loss, 0.0).to(tl.float32), mask=live)
    tl.store(log_probs_ptr + tokens, tl.where(counted, log_prob, 0.0).to(tl.float32), mask=live)
    # For backward, of each token: m, 1 / l and d loss / d lse = 1 + 2 z lse.
    out_ptr = normalizer_ptr + tokens * 3
    tl.store(out_ptr, tl.where(counted, row_max, 0.0), mask=live)
    tl.store(out_ptr + 1, tl.where(counted, 1.0 / row_sum, 0.0).to(tl.float32), mask=live)
    slope = 1.0 + 2.0 * Z_LOSS * lse
    tl.store(out_ptr + 2, tl.where(counted, slope, 0.0).to(tl.float32), mask=live)


@triton.jit
def cross_entropy_forward_kernel(
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
    """Losses of one rank that has the full vocabulary: a program per row."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row).to(tl.int64)
    row_max = 0.0
    row_sum = 0.0
    x_target = 0.0
    sum_x = 0.0
    # The row of an ignored token is not read at all.
    if target != ignore_index:
        row_ptr = logits_ptr + row * stride_logits
        row_max, row_sum, x_target, sum_x = _row_statistics(
            row_ptr, target, 0, WIDTH, BLOCK, SMOOTHING > 0
        )
    _store_losses(
        row,
        True,
        row_max,
        row_sum.to(tl.float64),
        x_target.to(tl.float64),
        sum_x.to(tl.float64),
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
def cross_entropy_statistics_kernel(
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
    """(m, l, x_y) and, for smoothing, the sum of x, over a rank's share of the vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row).to(tl.int64)
    out_ptr = statistics_ptr + row * (4 if SUMMED else 3)
    row_max = 0.0
    row_sum = 0.0
    x_target = 0.0
    sum_x = 0.0
    if target != ignore_index:
        row_ptr = logits_ptr + row * stride_logits
        row_max, row_sum, x_target, sum_x = _row_statistics(
            row_ptr, target, first, WIDTH, BLOCK, SUMMED
        )
    # What the ranks gather: 3 or 4 numbers per token instead of V / P logits.
    tl.store(out_ptr, row_max)
    tl.store(out_ptr + 1, row_sum)
    tl.store(out_ptr + 2, x_target)
    if SUMMED:
        tl.store(out_ptr + 3, sum_x)


@triton.jit
def cross_entropy_combine_kernel(
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
    """Losses from all ranks' statistics [P, T, 3 or 4]: a program per BLOCK tokens."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = tokens < num_tokens
    columns: tl.constexpr = 4 if SMOOTHING > 0 else 3
    token_ptr = statistics_ptr + tokens * columns
    rank_stride = tl.cast(num_tokens, tl.int64) * columns
    # m = max_r m_r over the ranks r, of which every rank has all statistics
    row_max = tl.full((BLOCK,), LOWEST, tl.float32)
    for rank in tl.static_range(RANKS):
        local = tl.load(token_ptr + rank * rank_stride, mask=live, other=0.0)
        row_max = tl.maximum(row_max, local)
    row_sum = tl.zeros((BLOCK,), tl.float64)
    x_target = tl.zeros((BLOCK,), tl.float64)
    sum_x = tl.zeros((BLOCK,), tl.float64)
    for rank in tl.static_range(RANKS):
        rank_ptr = token_ptr + rank * rank_stride
        local = tl.load(rank_ptr, mask=live, other=0.0).to(tl.float64)
        share = tl.load(rank_ptr + 1, mask=live, other=1.0).to(tl.float64)
        # l = sum_r l_r * exp(m_r - m), in rank order on every rank: equal bits everywhere
        row_sum += share * tl.exp(local - row_max.to(tl.float64))
        # 0 on all ranks but the one that holds the target
        x_target += tl.load(rank_ptr + 2, mask=live, other=0.0).to(tl.float64)
        if SMOOTHING > 0:
            sum_x += tl.load(rank_ptr + 3, mask=live, other=0.0).to(tl.float64)
    _store_losses(
        tokens,
        live,
        row_max,
        row_sum,
        x_target,
        sum_x,
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
