"""One optimizer step and one forward pass over a global batch, in any layout.

The loss is a sum over a global weight sum, never a mean of means. Gradients are those of the sum:
their divisor is a factor on the device, which the norm and the update apply.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer

from phi4.engine.agreement import Asked, nothing_asked
from phi4.engine.layout import Layout
from phi4.engine.model.alternatives import LabelLogProbs
from phi4.engine.model.micro_batch import MicroBatches
from phi4.engine.objective import Objective
from phi4.engine.optimizer.build import set_learning_rate
from phi4.engine.schedule import loss_function, run_schedule
from phi4.engine.step_values import NO_LIMITS, Evidence, StepResult, Totals, UpdateLimits


def train_step(
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    batches: MicroBatches,
    objective: Objective,
    layout: Layout,
    *,
    learning_rate: float,
    weight_decay: float,
    asked: Callable[[], Asked] = nothing_asked,
    limits: UpdateLimits = NO_LIMITS,
    by_group: bool = False,
) -> StepResult:
    """Compute gradients of the global batch, clip, and run one AdamW update.

    If loss or gradient of any rank is not finite, or exceeds the limits, no rank updates: both are
    reduced over the ranks before the update, which reads the decision on the device.

    Args:
        chunks: this rank's model chunks with their gradient buffers.
        optimizer: over the same parameters.
        batches: this data rank's micro-batches.
        objective: the stage's loss.
        layout: the rank grid.
        learning_rate: learning rate of this step.
        weight_decay: weight decay of this step.
        asked: returns this rank's requests; called before the update.
        limits: limits above which nothing is updated.
        by_group: whether to also compute the norm of each parameter group.

    Collectives: those of the schedule, the gradient reduction over data and context ranks, the norm
    over model ranks, one all-reduce of the totals over all ranks; with `by_group` one of five
    numbers over model ranks.
    """
    totals = Totals(objective.metric_names, _device(chunks))
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    set_learning_rate(optimizer, learning_rate, weight_decay)
    loss_of = loss_function(objective, totals, layout)
    run_schedule(chunks, batches, layout, loss_of, with_gradients=True)
    local_sums = totals.sums.clone()
    totals.reduce(layout, asked(), batches.work)
    updated, grad_norm, _ = optimizer.step(
        totals.gradient_scale(), totals.loss_within(limits.loss), limits.grad_norm, by_group
    )
    result = totals.result(grad_norm, updated)
    evidence = Evidence(local_sums, optimizer.local_square_sum)
    group_norms = optimizer.group_norms() if by_group else {}
    return replace(result, evidence=evidence, group_norms=group_norms)


@torch.no_grad()
def evaluate(
    chunks: list[torch.nn.Module],
    batches: MicroBatches,
    objective: Objective,
    layout: Layout,
    *,
    asked: Callable[[], Asked] = nothing_asked,
) -> StepResult:
    """Evaluate the objective over a global batch without gradients.

    Collectives: those of the forward schedule, one all-reduce of the totals over all ranks.
    """
    totals = Totals(objective.metric_names, _device(chunks))
    run_schedule(chunks, batches, layout, loss_function(objective, totals, layout))
    totals.reduce(layout, asked(), batches.work)
    return totals.result(0.0, False)


@torch.no_grad()
def logits(
    chunks: list[torch.nn.Module], batches: MicroBatches, layout: Layout
) -> list[torch.Tensor]:
    """Return logits [B, S, V] of each micro-batch on the last stage; elsewhere an empty list.

    Collectives: those of the forward schedule; all-gather over tp and over cp on the last stage.
    """
    outputs = run_schedule(chunks, batches, layout, None, labelled=False)
    return [_whole_logits(one, layout) for one in outputs if isinstance(one, torch.Tensor)]


def _whole_logits(local_BSV: torch.Tensor, layout: Layout) -> torch.Tensor:
    if layout.tp_size > 1:
        pieces = [torch.empty_like(local_BSV) for _ in range(layout.tp_size)]
        dist.all_gather(pieces, local_BSV.contiguous(), group=layout.groups.tp)
        local_BSV = torch.cat(pieces, dim=-1)
    return layout.context_gather(local_BSV)


@torch.no_grad()
def log_probs(
    chunks: list[torch.nn.Module], batches: MicroBatches, layout: Layout
) -> list[LabelLogProbs]:
    """Return log-probabilities of complete rows of each micro-batch, on every rank of a data
    replica.

    Collectives: those of the forward schedule; per micro-batch on the last stage one all-gather
    over cp, then one broadcast over pp, of 4 bytes per token; both again where the micro-batch has
    alternative labels.
    """
    outputs = run_schedule(chunks, batches, layout, None)
    local: Sequence[LabelLogProbs | None] = [None] * len(batches)
    if layout.is_last_stage:
        local = [output for output in outputs if isinstance(output, LabelLogProbs)]
    shape, device = batches.row_shape, _device(chunks)

    def whole(local_BS: torch.Tensor | None) -> torch.Tensor:
        rows_BS = torch.empty(shape, device=device)
        if local_BS is not None:
            rows_BS = layout.context_gather(local_BS).contiguous()
        if layout.pp_size > 1:
            dist.broadcast(rows_BS, group=layout.groups.pp, group_src=layout.pp_size - 1)
        return rows_BS

    found = []
    for output, has_alternatives in zip(local, batches.have_alternatives, strict=True):
        first_BS, second_BS = (None, None) if output is None else output
        found.append(LabelLogProbs(whole(first_BS), whole(second_BS) if has_alternatives else None))
    return found


def _device(chunks: Sequence[torch.nn.Module]) -> torch.device:
    return next(chunks[0].parameters()).device
