"""The values of a step or a forward pass: limits, sums over micro-batches and ranks, results."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

from phi4.engine.agreement import Asked
from phi4.engine.layout import Layout
from phi4.engine.model.alternatives import LabelLogProbs
from phi4.engine.objective import Loss
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
    """Host values of one step, the same on every rank; only `evidence` differs."""

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
    """This rank's sums of a training step, which differ between ranks; None without gradients."""


@dataclass(frozen=True)
class RowLogProbs:
    """Log-probabilities of complete rows, on the host.

    Attributes:
        labels: [B, S] float32.
        alternative_labels: [B, S] float32, 0 where there is none; None if the batch has none.
    """

    labels: np.ndarray
    alternative_labels: np.ndarray | None

    @classmethod
    def of(cls, found: LabelLogProbs) -> "RowLogProbs":
        """Copy to the host."""
        second_BS = found.alternatives_BS
        return cls(
            found.labels_BS.cpu().numpy(), None if second_BS is None else second_BS.cpu().numpy()
        )


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

    def result(self, grad_norm: float, updated: bool) -> StepResult:
        """Return the means, the union of requests and the work of all data ranks, on the host.

        Args:
            grad_norm: global L2 norm before clipping; 0 without gradients.
            updated: whether the optimizer changed the parameters.
        """
        values = self.sums.tolist()
        sums = {n: (values[2 * i], values[2 * i + 1]) for i, n in enumerate(self.names)}
        means = {name: total / count if count else 0.0 for name, (total, count) in sums.items()}
        return StepResult(
            loss=means.pop("loss"),
            weight=sums["loss"][1],
            grad_norm=grad_norm,
            updated=updated,
            metrics=means,
            asked=Asked(*map(bool, values[self._num_sums : self._num_flags])),
            work=Work(*map(int, values[self._num_flags :])),
        )
