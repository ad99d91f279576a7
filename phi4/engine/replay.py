"""Repeat a step without its update, to detect hardware faults and locate the origin of NaN.

The engine is deterministic, so a second result that differs in one bit is a machine fault.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import get_model_config

from phi4.engine.bits import are_finite, digests
from phi4.engine.layout import Layout
from phi4.engine.model.micro_batch import MicroBatches
from phi4.engine.objective import Objective
from phi4.engine.optimizer.adamw import OnePassChain
from phi4.engine.schedule import loss_function, run_schedule
from phi4.engine.step_values import Totals


@dataclass(frozen=True, eq=False)
class Replay:
    """Results of this rank, on its device; the sums are as in `step_values.Evidence`."""

    loss_sums: torch.Tensor
    """[2 * names] fp64."""
    square_sum: torch.Tensor
    """[] fp64."""
    gradient_is_finite: torch.Tensor
    """[] bool, for this rank's gradients before any reduction over replicas."""
    gradient_digest: torch.Tensor
    """[] int64, of the same gradients."""


def replay_step(
    chunks: list[DistributedDataParallel],
    optimizer: OnePassChain,
    batches: MicroBatches,
    objective: Objective,
    layout: Layout,
) -> Replay:
    """Compute the gradients of a step again; parameters and optimizer are unchanged.

    Collectives: those of `step.train_step` without the update's and the totals'.
    """
    totals = Totals(objective.metric_names, next(chunks[0].parameters()).device)
    found: list[torch.Tensor] = []

    def before_reduction() -> None:
        gradients = [parameter.main_grad for chunk in chunks for parameter in chunk.parameters()]
        found.append(are_finite(gradients).all())
        # NaN has many bit patterns with the same meaning.
        found.append(digests(g.nan_to_num(nan=torch.finfo(g.dtype).max) for g in gradients).sum())
        for chunk in chunks:
            if chunk.ddp_config.overlap_grad_reduce:
                chunk.start_grad_sync()

    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    with _reduced_at_the_end(chunks):
        run_schedule(
            chunks,
            batches,
            layout,
            loss_function(objective, totals, layout),
            with_gradients=True,
            before_reduction=before_reduction,
        )
    optimizer.prepare_grads()
    optimizer.square_sum()
    is_finite, gradient_digest = found
    return Replay(totals.sums, optimizer.local_square_sum, is_finite, gradient_digest)


@contextmanager
def _reduced_at_the_end(chunks: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Disable reductions during the backward pass, where overlap_grad_reduce would make them."""
    config = get_model_config(chunks[0])
    switch, config.no_sync_func = config.no_sync_func, None
    try:
        with ExitStack() as stack:
            for chunk in chunks:
                stack.enter_context(chunk.no_sync())
            yield
    finally:
        config.no_sync_func = switch
