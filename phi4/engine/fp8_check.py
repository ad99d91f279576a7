"""The FP8 canary: compare one micro-batch with and without FP8, and select layers to disable it in.

Both passes have the same weights; in the plain one all linears use the weights' dtype. The
gradients use the buffers of training, between two steps, when they are free.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import starmap
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from phi4.engine import step as steps
from phi4.engine.layout import Layout
from phi4.engine.model.fp8.fallback import linears_by_layer, use_fp8_in
from phi4.engine.model.fp8.lost_values import CASTS, Cast, LostValues
from phi4.engine.model.micro_batch import MicroBatches
from phi4.engine.objective import Objective
from phi4.engine.optimizer.adamw import OnePassChain

LINEARS_PER_LAYER = 4
"""Queries with keys and values, attention's output, gate with up, the MLP's output."""


@dataclass(frozen=True)
class FP8Limits:
    """Limits of the deviation from a pass without FP8.

    Attributes:
        loss_gap: largest |loss - plain loss|, per weight of the objective: nats per token.
        gradient_cosine: minimum cosine of a layer's gradient to its plain one.
        underflow: largest fraction of a linear's non-zero inputs or weights that become zero. Not
            for gradients: those of confidently predicted tokens are that small.
        saturation: largest fraction of numbers of any kind beyond the largest FP8 number.
    """

    loss_gap: float
    gradient_cosine: float
    underflow: float
    saturation: float


class LostShares(NamedTuple):
    """Fractions of the non-zero numbers of one kind in the worst linear of a layer."""

    underflow: float
    saturation: float


@dataclass(frozen=True)
class Distance:
    """Deviation of a pass from the plain one.

    Attributes:
        loss_gap: loss - plain loss; absolute, because a relative gap would grow where the loss is
            nearly 0.
        gradient_cosines: by global layer index.
    """

    loss_gap: float
    gradient_cosines: tuple[float, ...]

    def excess(self, limits: FP8Limits) -> float:
        """Return the largest deviation relative to its limit; NaN counts as infinite."""
        far = (
            abs(self.loss_gap) / limits.loss_gap,
            (1 - self.least_cosine) / (1 - limits.gradient_cosine),
        )
        return math.inf if any(map(math.isnan, far)) else max(far)

    def beyond(self, limits: FP8Limits) -> str:
        """Describe exceeded limits in words; empty if there are none. NaN exceeds."""
        if not abs(self.loss_gap) <= limits.loss_gap:
            return f"loss gap {self.loss_gap:.2g}, at most {limits.loss_gap:g} allowed"
        if not self.least_cosine >= limits.gradient_cosine:
            return (
                f"gradient cosine {self.least_cosine:.3f}, at least {limits.gradient_cosine:g} "
                f"required"
            )
        return ""

    @property
    def least_cosine(self) -> float:
        """Cosine of the worst layer; NaN if any is."""
        cosines = self.gradient_cosines
        return math.nan if any(map(math.isnan, cosines)) else min(cosines)


@dataclass(frozen=True)
class FP8Check:
    """Result of a check, the same on every rank.

    Attributes:
        distance: deviation of the pass with FP8.
        lost: by FP8 layer and by what was cast.
        fallbacks: layers that should stop using FP8, each with the reason.
    """

    distance: Distance
    lost: Mapping[int, Mapping[Cast, LostShares]]
    fallbacks: Mapping[int, str]


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

    Collectives: twice those of `step.run_schedule` with gradients, then one all-reduce over all
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
        distance = _distance(found[: sums.numel()].tolist())
        lost = _shares(found[sums.numel() :].view(-1, LINEARS_PER_LAYER, len(CASTS), 3), fp8_layers)
        if distance is None:
            # Without FP8 it is not finite either.
            nothing = Distance(math.nan, (math.nan,) * num_layers)
            return FP8Check(nothing, lost, {})
        fallbacks = _by_losses(lost, limits)
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
        totals = steps.Totals(
            self._objective.metric_names, next(self._chunks[0].parameters()).device
        )
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        loss_of = steps.loss_function(self._objective, totals, layout)
        steps.run_schedule(self._chunks, self._batches, layout, loss_of, with_gradients=True)
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


def _distance(sums: Sequence[float]) -> Distance | None:
    """Return the deviation from summed results of `_Passes.run`; None if the plain pass is not
    finite."""
    loss, plain_loss, weight, *others = sums
    rows = list(zip(others[::3], others[1::3], others[2::3], strict=True))
    if not all(map(math.isfinite, (plain_loss, *(plain for _, _, plain in rows)))):
        return None
    gap = (loss - plain_loss) / (weight or 1.0)
    return Distance(gap, tuple(starmap(_cosine, rows)))


def _cosine(product: float, square: float, plain_square: float) -> float:
    """Return 1 if both gradients are zero, and 0 if one is."""
    if square == plain_square == 0:
        return 1.0
    norms = math.sqrt(square) * math.sqrt(plain_square)
    return product / norms if norms else 0.0


def _shares(counts: torch.Tensor, fp8_layers: Sequence[int]) -> dict[int, dict[Cast, LostShares]]:
    """Return, from counts [layers, linears, casts, 3], those of each layer's worst linear."""
    shares = counts[..., 1:] / counts[..., :1].clamp(min=1)
    worst = shares.amax(dim=1).tolist()
    return {
        layer: {what: LostShares(*worst[layer][index]) for index, what in enumerate(CASTS)}
        for layer in fp8_layers
    }


def _by_losses(lost: Mapping[int, Mapping[Cast, LostShares]], limits: FP8Limits) -> dict[int, str]:
    """Return layers whose casts lose too much."""
    fallbacks = {}
    for layer, by_cast in lost.items():
        for what, shares in by_cast.items():
            underflow = limits.underflow if what != "gradient" else math.inf
            for kind, share, limit in (
                ("underflow", shares.underflow, underflow),
                ("saturation", shares.saturation, limits.saturation),
            ):
                if share > limit:
                    fallbacks[layer] = f"{kind} of {what} {share:.3f}, at most {limit:g} allowed"
    return fallbacks


def _by_layers(
    passes: _Passes, fp8_layers: Sequence[int], limits: FP8Limits, wrong: str
) -> dict[int, str]:
    """Return layers that exceed a limit alone, else the worst one.

    Collectives: see `check_fp8`.
    """
    found = torch.stack([passes.run((layer,)) for layer in fp8_layers])
    dist.all_reduce(found)
    distances = [_distance(row) for row in found.tolist()]
    alone = {layer: one for layer, one in zip(fp8_layers, distances, strict=True) if one}
    guilty = {layer: text for layer, one in alone.items() if (text := one.beyond(limits))}
    if guilty:
        return {layer: f"with FP8 in this layer alone: {text}" for layer, text in guilty.items()}
    worst = max(alone, key=lambda layer: alone[layer].excess(limits))
    return {worst: f"{wrong}; no layer exceeds the limit alone; this one deviates most"}
