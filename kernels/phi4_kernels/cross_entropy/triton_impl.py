"""Cross-entropy in Triton: 2 bytes per bf16 logit for the loss, 4 for the gradient in its place.

One program owns a row. A thread keeps a running maximum and sum of its own for each 8 neighbouring
logits it loads, so the loop rescales once per 8 exponentials and never waits for another thread.
The kernels are in triton_losses (forward) and triton_gradient (backward); here are their launches.
"""

from functools import cache

import torch
import triton
from torch import Tensor

from phi4_kernels import launch
from phi4_kernels.cross_entropy.triton_gradient import cross_entropy_backward_kernel
from phi4_kernels.cross_entropy.triton_losses import (
    PACK,
    cross_entropy_combine_kernel,
    cross_entropy_forward_kernel,
    cross_entropy_statistics_kernel,
)
from phi4_kernels.launch import Launch

# By columns of the shard. A thread has four 16-byte loads of bf16 in flight in the last row.
FORWARD = (Launch(4096, 1024, 4), Launch(1 << 30, 8192, 8))
BACKWARD = (Launch(4096, 1024, 4), Launch(1 << 30, 8192, 8))
# Tokens of a program that combines the ranks' statistics: one per thread of 4 warps.
COMBINE_BLOCK = 128


@cache
def _block(widest: int, width: int) -> int:
    # A block no wider than the shard, and a multiple of a pack.
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
        # A program per token; that of an ignored token ends at once.
        row = launch.pick(FORWARD, width)
        cross_entropy_forward_kernel[(num_tokens,)](
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
    # Per token m, l, x_y, and the sum of x only if label smoothing needs it.
    shape = (num_tokens, 3 + with_sum)
    out = torch.empty(shape, dtype=torch.float32, device=logits.device)
    if num_tokens:
        row = launch.pick(FORWARD, width)
        cross_entropy_statistics_kernel[(num_tokens,)](
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
    # [P, T, 3 or 4], gathered: every rank computes all losses, in the same order.
    ranks, num_tokens, _ = statistics.shape
    outputs = _per_token(num_tokens, statistics.device)
    if num_tokens:
        cross_entropy_combine_kernel[(launch.ceil_div(num_tokens, COMBINE_BLOCK),)](
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
        # In place: dlogits overwrite logits, so no second [T, V / P] exists.
        row = launch.pick(BACKWARD, width)
        cross_entropy_backward_kernel[(num_tokens,)](
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
