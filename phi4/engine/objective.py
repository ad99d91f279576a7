"""The interface of a stage's loss: an objective over per-token log-probabilities.

Stages are independent of parallelism. The engine passes an objective this rank's columns of the
rows (all of them without context parallelism), and `segment_sum` for sums over tokens that context
parallelism may have split.

How to write one. Everything that enters `Loss`, metrics included, is a sum, never a mean, and comes
from one of two methods of `LossInputs`: `token_total` of a value per token, `segment_total` of a
value per segment (or per pair of segments), made from `segment_sum`. Other reductions count twice
or miss tokens when context ranks share a row. Direct preference optimisation, segment 2i chosen
over segment 2i + 1, is:

    class Preference:
        metric_names = ("rewards/margins",)
        gradient = "any"

It may be called with a micro-batch without tokens in the loss, or without segments; its sums are
then 0, and must still be part of autograd's graph.

It may be called with a micro-batch that has no token that counts, or no segment; its sums are then
0, and still part of autograd's graph.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist

from phi4.config.gradient_form import GradientForm
from phi4.errors import ConfigError

# Shape legend: B rows, S columns of a context rank, N segments of the micro-batch, P any number of
# values that are the same on every context rank.

SegmentSum = Callable[[torch.Tensor], torch.Tensor]
"""values [B, S] -> their sum in each segment [N], fp64, over all context ranks and with the
gradient of all; tokens without a segment (id -1) are ignored."""


@dataclass(frozen=True)
class LossInputs:
    """One micro-batch as seen by an objective; a context rank has its columns of the rows.

    Attributes:
        log_probs_BS: fp32, of the labels.
        loss_mask_BS: fp32, weight of each label.
        segment_ids_BS: int64 in [0, num_segments), -1 for no segment; None when the batch has none.
        num_segments: number of segments N.
        alternative_log_probs_BS: fp32, log-probabilities of the alternative labels, 0 where there
            is none; None when the batch has none.
        alternative_mask_BS: bool, where there is an alternative label; None when the batch has
            none.
        token_extras: the batch's, fp32 [B, S].
        segment_extras: the batch's, [N, ...], the same on every context rank.
        segment_share: 1 on the context rank that counts segments, 0 on the others.
    """

    log_probs_BS: torch.Tensor
    loss_mask_BS: torch.Tensor
    segment_ids_BS: torch.Tensor | None = None
    num_segments: int = 0
    alternative_log_probs_BS: torch.Tensor | None = None
    alternative_mask_BS: torch.Tensor | None = None
    token_extras: Mapping[str, torch.Tensor] = field(default_factory=dict)
    segment_extras: Mapping[str, torch.Tensor] = field(default_factory=dict)
    segment_share: float = 1.0

    def token_total(self, values_BS: torch.Tensor) -> torch.Tensor:
        """Return the sum of a value per token, fp64: this context rank's part.

        Raises:
            ConfigError: values are not [B, S].
        """
        if values_BS.shape != self.log_probs_BS.shape:
            raise ConfigError(
                f"token_total got values of shape {tuple(values_BS.shape)}; expected one per token "
                f"{tuple(self.log_probs_BS.shape)}; use segment_total for sums of segments"
            )
        return values_BS.sum(dtype=torch.float64)

    def segment_total(self, values_P: torch.Tensor) -> torch.Tensor:
        """Return the sum of a value per segment, or per group of segments, fp64, counted on one
        context rank.

        Raises:
            ConfigError: values are not one-dimensional.
        """
        if values_P.dim() != 1:
            raise ConfigError(
                f"segment_total got values of shape {tuple(values_P.shape)}; expected [segments]; "
                "use token_total for values per token"
            )
        return values_P.sum(dtype=torch.float64) * self.segment_share


@dataclass(frozen=True)
class Loss:
    """A micro-batch's part of the loss: the step minimises sum(loss_sum) / sum(weight_sum).

    The sums run over all micro-batches, data ranks and context ranks, so each is this rank's part:
    see `LossInputs.token_total` and `LossInputs.segment_total`.
    """

    loss_sum: torch.Tensor
    weight_sum: torch.Tensor
    metrics: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """name -> (sum, count); reported as sum / count over the step."""


class Objective(Protocol):
    """A stage's loss."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of `Loss.metrics`; fixed, so that every rank reduces the same numbers."""
        ...

    @property
    def gradient(self) -> GradientForm:
        """How the loss sum depends on the log-probabilities; `loss_head.form` must support it.

        See `phi4.config.gradient_form.check_gradient_form`.
        """
        ...

    def __call__(self, inputs: LossInputs, segment_sum: SegmentSum) -> Loss:
        """Return the loss of one micro-batch.

        Every context rank calls `segment_sum` equally often and in the same order.
        """
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


def make_segment_sum(
    segment_ids_BS: torch.Tensor | None, num_segments: int, context_group: dist.ProcessGroup
) -> SegmentSum:
    """Return `segment_sum` for one micro-batch.

    Args:
        segment_ids_BS: see `LossInputs`; None means that no token is in a segment.
        num_segments: N.
        context_group: ranks that share the rows.

    Collectives (of the returned function): all-reduce of N fp64 numbers over the context group,
    forward and backward; none without segments.
    """

    def segment_sum(values_BS: torch.Tensor) -> torch.Tensor:
        ids_BS = segment_ids_BS
        if ids_BS is None:
            ids_BS = torch.full(values_BS.shape, -1, device=values_BS.device)
        # One more element: the id -1 indexes the last one. Unlike index_add this adds in a fixed
        # order on a GPU too. fp64, because differences are taken of sums over hundreds of tokens.
        places = values_BS.new_zeros(num_segments + 1, dtype=torch.float64)
        values_T = values_BS.flatten().double()
        sums_N = places.index_put((ids_BS.flatten(),), values_T, accumulate=True)[:-1]
        if context_group.size() == 1 or num_segments == 0:
            return sums_N
        return _SumOverRanks.apply(sums_N, context_group)

    return segment_sum
