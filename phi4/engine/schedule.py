"""megatron-core's pipeline schedule over micro-batches, with a loss that is a sum."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from phi4.engine.layout import Layout
from phi4.engine.model.alternatives import LabelLogProbs
from phi4.engine.model.micro_batch import MicroBatch, MicroBatches
from phi4.engine.objective import Loss, LossInputs, Objective, make_segment_sum
from phi4.engine.step_values import Totals
from phi4.engine.without_cuda import without_rewriting


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
