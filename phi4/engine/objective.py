"""What a stage is to the engine: a loss over per-token log-probabilities.

Stages know nothing of parallelism. The engine hands an objective this rank's slice of the tokens
and `segment_sum`, which adds over tokens that context parallelism may have split.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist

SegmentSum = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""(x [B, S], segment_ids [B, S] int64 in [0, n), n) -> sums [n] over all context ranks."""


@dataclass(frozen=True)
class Loss:
    """A micro-batch's part of the loss: the step minimises sum(loss_sum) / sum(weight_sum).

    The sums run over all micro-batches, data ranks and context ranks. A loss made of segment sums
    is the same on every context rank; its weight is counted as often, so the quotient is right.
    """

    loss_sum: torch.Tensor
    weight_sum: torch.Tensor
    metrics: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """name -> (sum, count); reported as sum / count over the step."""


class Objective(Protocol):
    """A stage's loss."""

    metric_names: tuple[str, ...]
    """Names of `Loss.metrics`; fixed, so that every rank reduces the same numbers."""

    def __call__(
        self,
        log_probs_BS: torch.Tensor,
        loss_mask_BS: torch.Tensor,
        segment_sum: SegmentSum,
    ) -> Loss:
        """Loss of one micro-batch from log-probabilities of its labels (fp32, context slice)."""
        ...


class _SumOverRanks(torch.autograd.Function):
    """All-reduce in both directions: every rank's loss depends on every rank's summands."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def make_segment_sum(context_group: dist.ProcessGroup) -> SegmentSum:
    """`segment_sum` for these context ranks.

    Collectives (of the returned function): all-reduce of n numbers over the context group, forward
    and backward.
    """

    def segment_sum(x: torch.Tensor, segment_ids: torch.Tensor, num_segments: int) -> torch.Tensor:
        sums = x.new_zeros(num_segments).index_add(0, segment_ids.flatten(), x.flatten())
        return sums if context_group.size() == 1 else _SumOverRanks.apply(sums, context_group)

    return segment_sum
