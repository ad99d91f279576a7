"""The FP8 canary: compare one micro-batch with and without FP8, and select layers to disable it in.

Both passes have the same weights; in the plain one all linears use the weights' dtype. The
gradients use the buffers of training, between two steps, when they are free.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from phi4.engine.fp8_deviation import (
    Distance,
    FP8Check,
    FP8Limits,
    distance_of,
    layers_by_losses,
    lost_shares,
)
from phi4.engine.layout import Layout
from phi4.engine.model.fp8.fallback import linears_by_layer, use_fp8_in
from phi4.engine.model.fp8.lost_values import CASTS, LostValues
from phi4.engine.model.micro_batch import MicroBatches
from phi4.engine.objective import Objective
from phi4.engine.optimizer.adamw import OnePassChain
from phi4.engine.schedule import loss_function, run_schedule
from phi4.engine.step_values import Totals

LINEARS_PER_LAYER = 4
"""Queries with keys and values, attention's output, gate with up, the MLP's output."""


def check_fp8(
    chunks: list[DistributedDataParallel],
    optimizer: OnePassChain,
    batches: MicroBatches,
    objective: Objective,
    layout: Layout,
    *,
    fp8_layers: Sequence[int],
    num_layers: int,
    limits: FP8Limits,
) -> FP8Check:
    """Compare micro-batches with and without FP8; parameters and optimizer are unchanged.

    A layer whose casts lose too much should stop using FP8. If the entire pass deviates too much
    and no such layer explains it, one pass per layer, in which only that layer uses FP8, finds the
    responsible layers. If none alone exceeds a limit, the worst should stop.

    Args:
        chunks: this rank's model chunks with their gradient buffers, which are overwritten.
        optimizer: over the same parameters.
        batches: this data rank's batches.
        objective: the stage's loss.
        layout: the rank grid.
        fp8_layers: global indices of the layers that currently use FP8.
        num_layers: layers of the full model.
        limits: allowed deviations.

    Collectives: twice those of `schedule.run_schedule` with gradients, then one all-reduce over all
    ranks of 3 fp64 numbers, and 39 per layer. If a limit is exceeded the schedule once more for
    every FP8 layer, then another all-reduce of 3 numbers, and 3 per layer, for each.
    """
    passes = _Passes(chunks, optimizer, batches, objective, layout, num_layers)
    try:
        passes.run_plain()
        with _lost_values_counted(passes.bare_chunks, num_layers) as counts:
            sums = passes.run(fp8_layers)
            found = torch.cat([sums, counts()])
        dist.all_reduce(found)
        distance = distance_of(found[: sums.numel()].tolist())
        counted = found[sums.numel() :].view(-1, LINEARS_PER_LAYER, len(CASTS), 3)
        lost = lost_shares(counted, fp8_layers)
        if distance is None:
            # Without FP8 it is not finite either.
            nothing = Distance(math.nan, (math.nan,) * num_layers)
            return FP8Check(nothing, lost, {})
        fallbacks = layers_by_losses(lost, limits)
        if not fallbacks and (wrong := distance.beyond(limits)):
            fallbacks = _by_layers(passes, fp8_layers, limits, wrong)
    finally:
        use_fp8_in(passes.bare_chunks, fp8_layers)
    return FP8Check(distance, lost, fallbacks)


class _Passes:
    """Passes over the same micro-batches, each compared with the plain one."""

    def __init__(
        self,
        chunks: list[DistributedDataParallel],
        optimizer: OnePassChain,
        batches: MicroBatches,
        objective: Objective,
        layout: Layout,
        num_layers: int,
    ) -> None:
        self._chunks, self._optimizer, self._batches = chunks, optimizer, batches
        self._objective, self._layout, self._num_layers = objective, layout, num_layers
        self.bare_chunks = [chunk.module for chunk in chunks]
        self._layer_of = {
            parameter: layer.layer_number - 1
            for chunk in self.bare_chunks
            for layer in chunk.decoder.layers
            for parameter in layer.parameters()
        }

    def run_plain(self) -> None:
        """Run the pass that others are compared with, and keep its gradients.

        Takes 4 bytes per parameter of this rank's layers; with the distributed optimizer, of its
        part.
        """
        self._plain_loss, _ = self._loss_sums(())
        self._plain = [gradient.clone() for _, gradient in self._layer_gradients()]

    def run(self, fp8_layers: Collection[int]) -> torch.Tensor:
        """Return [3 + 3 * layers] fp64, to be summed over all ranks: loss, plain loss and weight;
        for every layer the product of its gradient with the plain one and the squares of both.
        """
        loss, weight = self._loss_sums(fp8_layers)
        rows = torch.zeros(self._num_layers, 3, dtype=torch.float64, device=loss.device)
        for (layer, gradient), plain in zip(self._layer_gradients(), self._plain, strict=True):
            pairs = ((gradient, plain), (gradient, gradient), (plain, plain))
            rows[layer] += torch.stack([(a * b).sum(dtype=torch.float64) for a, b in pairs])
        return torch.cat([torch.stack([loss, self._plain_loss, weight]), rows.flatten()])

    def _loss_sums(self, fp8_layers: Collection[int]) -> torch.Tensor:
        """Return [2] fp64: this rank's part of loss and weight; leaves its gradients prepared."""
        use_fp8_in(self.bare_chunks, fp8_layers)
        layout = self._layout
        totals = Totals(self._objective.metric_names, next(self._chunks[0].parameters()).device)
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        loss_of = loss_function(self._objective, totals, layout)
        run_schedule(self._chunks, self._batches, layout, loss_of, with_gradients=True)
        self._optimizer.prepare_grads()
        # Counted by all tensor ranks: the mean does not depend on it.
        return totals.sums[:2]

    def _layer_gradients(self) -> Iterator[tuple[int, torch.Tensor]]:
        # Counted by all data ranks with full gradients: a cosine does not depend on it.
        for parameter, gradient in self._optimizer.counted_gradients():
            if parameter in self._layer_of:
                yield self._layer_of[parameter], gradient


@contextmanager
def _lost_values_counted(
    chunks: Sequence[torch.nn.Module], num_layers: int
) -> Iterator[Callable[[], torch.Tensor]]:
    """Yield what the casts on this rank lose during the block, flat, fp64, for a sum over ranks.

    Its shape is [layers, LINEARS_PER_LAYER, casts, 3]; see `LostValues.counts`.
    """
    by_layer = list(linears_by_layer(chunks))
    device = next(chunks[0].parameters()).device
    lost: list[tuple[int, list[LostValues]]] = []
    for layer, linears in by_layer:
        lost.append((layer, [LostValues(device) for _ in linears]))
        for linear, counter in zip(linears, lost[-1][1], strict=True):
            linear.lost = counter

    def counts() -> torch.Tensor:
        shape = (num_layers, LINEARS_PER_LAYER, len(CASTS), 3)
        # Integers, and exact: fp64 represents them up to 9e15.
        table = torch.zeros(shape, dtype=torch.float64, device=device)
        for layer, counters in lost:
            table[layer] = torch.stack([counter.counts for counter in counters]).double()
        return table.flatten()

    try:
        yield counts
    finally:
        for _, linears in by_layer:
            for linear in linears:
                linear.lost = None


def _by_layers(
    passes: _Passes, fp8_layers: Sequence[int], limits: FP8Limits, wrong: str
) -> dict[int, str]:
    """Return layers that exceed a limit alone, else the worst one.

    Collectives: see `check_fp8`.
    """
    found = torch.stack([passes.run((layer,)) for layer in fp8_layers])
    dist.all_reduce(found)
    distances = [distance_of(row) for row in found.tolist()]
    alone = {layer: one for layer, one in zip(fp8_layers, distances, strict=True) if one}
    guilty = {layer: text for layer, one in alone.items() if (text := one.beyond(limits))}
    if guilty:
        return {layer: f"with FP8 in this layer alone: {text}" for layer, text in guilty.items()}
    worst = max(alone, key=lambda layer: alone[layer].excess(limits))
    return {worst: f"{wrong}; no layer exceeds the limit alone; this one deviates most"}
