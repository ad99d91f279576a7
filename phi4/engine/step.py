"""One optimizer step and one forward pass over a global batch, in any layout.

The loss is a sum over a global weight sum, never a mean of means. Gradients are those of the sum:
their divisor is a factor on the device, which the norm and the update apply.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from phi4.engine.agreement import Asked, nothing_asked
from phi4.engine.layout import Layout
from phi4.engine.model.alternatives import LabelLogProbs
from phi4.engine.model.micro_batch import MicroBatch, MicroBatches
from phi4.engine.objective import Loss, LossInputs, Objective, make_segment_sum
from phi4.engine.optimizer.build import set_learning_rate
from phi4.engine.patches import without_rewriting
from phi4.model.shape import NO_WORK, Work


@dataclass(frozen=True)
class UpdateLimits:
    """Limits; a step whose loss or gradient norm exceeds them, or is not finite, changes
    nothing."""

    loss: float = math.inf
    grad_norm: float = math.inf


NO_LIMITS = UpdateLimits()


@dataclass(frozen=True, eq=False)
class Evidence:
    """This rank's part of a step's sums, on its device; only read if the step was bad."""

    loss_sums: torch.Tensor
    """[2 * names] fp64, as in `Totals.sums` before they are reduced."""
    square_sum: torch.Tensor
    """[] fp64, of the gradients that this rank counts, after their reduction."""


@dataclass(frozen=True)
class StepResult:
    """Host values of one step, the same on every rank."""

    loss: float
    """Loss sum over weight sum."""
    weight: float
    """Weight sum: for pretraining the number of tokens in the loss."""
    grad_norm: float
    """Global L2 norm before clipping; 0 for a pass without gradients."""
    updated: bool
    """Whether the optimizer changed the parameters."""
    metrics: dict[str, float]
    asked: Asked = field(default_factory=Asked)
    """Union of all ranks' requests before the update."""
    work: Work = NO_WORK
    """Work of the entire global batch, in one forward pass."""
    group_norms: dict[str, float] = field(default_factory=dict)
    """By parameter group, before clipping; their squares add up to grad_norm's. Empty unless
    requested."""
    evidence: Evidence | None = field(default=None, compare=False, repr=False)
    """Seconds of forward passes in a training step; not the same on every rank."""


class Totals:
    """Running (sum, count) pairs of a step on the ranks that compute the loss.

    Their reduction also carries each rank's requests and each data rank's work, so that all ranks
    get them in the same step without an additional collective.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = ("loss", *names)
        self._num_sums = 2 * len(self.names)
        self._num_flags = self._num_sums + len(Asked._fields)
        num_numbers = self._num_flags + len(Work._fields)
        self.sums = torch.zeros(num_numbers, dtype=torch.float64, device=device)

    def add(self, loss: Loss) -> None:
        """Add one micro-batch."""
        pairs = [(loss.loss_sum, loss.weight_sum)]
        pairs += [loss.metrics[name] for name in self.names[1:]]
        values = [value.detach().double() for pair in pairs for value in pair]
        self.sums[: self._num_sums] += torch.stack(values)

    def reduce(self, layout: Layout, asked: Asked, work: Work) -> None:
        """Reduce the sums, the counts and the requests over all ranks; does not synchronise with
        the device.

        Args:
            layout: the rank grid.
            asked: requests of this rank.
            work: work of this data rank.

        Collectives: one all-reduce over all ranks of two fp64 numbers per name, and those of
        `asked` and `work`.
        """
        # Tensor ranks hold copies; only the last stage's first tensor rank contributes.
        if not (layout.is_last_stage and layout.tp_rank == 0):
            self.sums.zero_()
        for index, flag in enumerate(asked):
            if flag:
                # A constant of a kernel: a tensor made on the host would be a copy that waits.
                self.sums[self._num_sums + index].fill_(1.0)
        if layout.is_last_stage and layout.tp_rank == 0 and layout.cp_rank == 0:
            # Integers, and exact: fp64 represents them up to 9e15.
            for index, count in enumerate(work):
                self.sums[self._num_flags + index].fill_(float(count))
        dist.all_reduce(self.sums)

    def loss_within(self, limit: float) -> torch.Tensor:
        """Return [] bool on the device, after the reduction: the mean loss is finite and at most
        this."""
        total, count = self.sums[0], self.sums[1]
        return total.isfinite() & (total <= min(limit, sys.float_info.max) * count)

    def gradient_scale(self) -> torch.Tensor:
        """Return [] fp64 on the device, after the reduction: factor from gradients of the sum to
        those of the mean."""
        weight = self.sums[1]
        return torch.where(weight > 0, weight.reciprocal(), 1.0)

    def read(self) -> tuple[dict[str, tuple[float, float]], Asked, Work]:
        """Return (sum, count) of every name, the union of requests and the work of all data ranks,
        on the host.
        """
        values = self.sums.tolist()
        sums = {n: (values[2 * i], values[2 * i + 1]) for i, n in enumerate(self.names)}
        asked = Asked(*map(bool, values[self._num_sums : self._num_flags]))
        return sums, asked, Work(*map(int, values[self._num_flags :]))


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
    result = _result(totals, grad_norm, updated)
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
    return _result(totals, 0.0, False)


@torch.no_grad()
def logits(
    chunks: list[torch.nn.Module], batches: MicroBatches, layout: Layout
) -> list[torch.Tensor]:
    """Return logits [B, S, V / tp] of each micro-batch on the last stage; elsewhere an empty list.

    Collectives: those of the forward schedule.
    """
    outputs = run_schedule(chunks, batches, layout, None, labelled=False)
    return [output for output in outputs if isinstance(output, torch.Tensor)]


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


def run_schedule(
    chunks: list[torch.nn.Module],
    batches: MicroBatches,
    layout: Layout,
    loss_of: Callable[[LabelLogProbs, MicroBatch], Loss] | None,
    *,
    with_gradients: bool = False,
    labelled: bool = True,
    before_reduction: Callable[[], None] | None = None,
) -> list[LabelLogProbs] | list[torch.Tensor]:
    """Run megatron-core's pipeline schedule over the micro-batches.

    Args:
        chunks: this rank's model chunks.
        batches: micro-batches in order.
        layout: the rank grid.
        loss_of: loss from the last chunk's log-probabilities; None collects its outputs instead.
        with_gradients: compute gradients of the loss sum, reduced; else forward only.
        labelled: whether the last chunk's outputs are log-probabilities; else they are logits.
        before_reduction: called once this rank has all of its gradients.

    Collectives: point-to-point over pp; those of the layers over tp and cp; with gradients those of
    megatron-core's finalize_model_grads.
    """

    def forward(iterator: Iterator[MicroBatch], chunk: torch.nn.Module):
        batch = next(iterator)
        with without_rewriting(), batches.measured():
            model = getattr(chunk, "module", chunk)
            output = model.run(batch, labelled=labelled)  # type: ignore[operator]  # nn.Module's
        return output, partial(finish, batch)

    def finish(
        batch: MicroBatch, output: LabelLogProbs | torch.Tensor, non_loss_data: bool = False
    ):
        if loss_of is None:
            return output
        assert isinstance(output, LabelLogProbs), "a loss is of log-probabilities"
        # megatron-core adds up an integer count, for its own division; ours may not be an integer.
        return loss_of(output, batch).loss_sum, torch.ones((), dtype=torch.int), {}

    def finalize(model, _num_tokens, **options) -> None:
        if before_reduction:
            before_reduction()
        # Given a count, it would read it on the host and rewrite the gradients.
        finalize_model_grads(model, None, **options)

    rows, length = batches.row_shape
    get_model_config(chunks[0]).finalize_model_grads_func = finalize if with_gradients else None
    iterators = [iter(batches) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=rows,
        forward_only=not with_gradients,
        collect_non_loss_data=loss_of is None,
    )


def _device(chunks: Sequence[torch.nn.Module]) -> torch.device:
    return next(chunks[0].parameters()).device


def loss_function(
    objective: Objective, totals: Totals, layout: Layout
) -> Callable[[LabelLogProbs, MicroBatch], Loss]:
    """Return the function that computes a micro-batch's loss on the last stage and adds it to the
    totals."""
    # Every context rank has all sums of segments: one of them counts.
    segment_share = float(layout.cp_rank == 0)

    def loss_of(log_probs: LabelLogProbs, batch: MicroBatch) -> Loss:
        inputs = LossInputs(
            log_probs_BS=log_probs.labels_BS,
            loss_mask_BS=batch.loss_mask_BS,
            segment_ids_BS=batch.segment_ids_BS,
            num_segments=batch.num_segments,
            alternative_log_probs_BS=log_probs.alternatives_BS,
            alternative_mask_BS=None if batch.alternatives is None else batch.alternatives.mask_BS,
            token_extras=batch.token_extras,
            segment_extras=batch.segment_extras,
            segment_share=segment_share,
        )
        segment_sum = make_segment_sum(batch.segment_ids_BS, batch.num_segments, layout.groups.cp)
        loss = objective(inputs, segment_sum)
        totals.add(loss)
        return loss

    return loss_of


def _result(totals: Totals, grad_norm: float, updated: bool) -> StepResult:
    sums, asked, work = totals.read()
    means = {name: total / count if count else 0.0 for name, (total, count) in sums.items()}
    return StepResult(
        loss=means.pop("loss"),
        weight=sums["loss"][1],
        grad_norm=grad_norm,
        updated=updated,
        metrics=means,
        asked=asked,
        work=work,
    )
