"""Finds the cause of a bad step: the data, or a faulty machine, which it names.

The step is computed again on the same batches. Equal results rule out a hardware fault: equal bits
on the CPU, within REPEATS_WITHIN on a GPU, where the attention of other libraries may sum in any
order. A replay needs collectives and a step's time, and runs only after a bad step.
"""

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from phi4.engine.agreement import gathered
from phi4.engine.layout import Layout
from phi4.engine.platform import Platform
from phi4.engine.replay import Replay
from phi4.engine.step_values import StepResult
from phi4.errors import CorruptionError
from phi4.train.hooks import Progress, RunContext

REPEATS_WITHIN = MappingProxyType({"cpu": 0.0, "cuda": 1e-2})
"""Relative difference up to which two results of a step count as equal, by kind of platform."""


@dataclass(frozen=True)
class StepFinding:
    """What one rank observed of a bad step and of its replays."""

    rank: int
    host: str
    dp_rank: int
    pp_rank: int
    loss_is_finite: bool
    """In the rank's own micro-batches, in the step and in the replay."""
    gradient_is_finite: bool
    """In the replay, before the reduction over replicas."""
    loss_differs: bool = False
    square_differs: bool = False
    """Sum of squares of the reduced gradients that this rank counts."""
    gradient_differs: bool = False
    """Between two replays, before the reduction."""

    @property
    def place(self) -> str:
        """Rank and host, for a message."""
        return f"rank {self.rank} on {self.host}"


def attribute(context: RunContext, progress: Progress) -> str:
    """Replay a bad step; returns where non-finite numbers arose, empty if all are finite.

    Raises:
        CorruptionError: on every rank, where a second result differs; names ranks and hosts.

    Collectives: those of `Engine.replay_step`, twice where results differ; one all-gather over all
    ranks after each.
    """

    def replay() -> Replay:
        return context.engine.replay_step(progress.batches, context.objective)

    platform, first = context.platform, replay()
    finding = _finding(context.engine.layout, platform, progress.result, first)
    everyone = gathered(platform, finding)
    if any(finding.loss_differs or finding.square_differs for finding in everyone):
        raise CorruptionError(
            f"step {progress.step} computed twice on the same data gave two results: "
            f"{_accused(context, everyone, first, replay)}; take the host out, and start the run "
            "again from its newest checkpoint"
        )
    return where_not_finite(everyone)


def where_not_finite(everyone: Sequence[StepFinding]) -> str:
    """The ranks whose own losses, or else gradients, are not finite."""
    for name, found in (
        ("loss", [one.place for one in everyone if not one.loss_is_finite]),
        ("gradient", _latest_stage([one for one in everyone if not one.gradient_is_finite])),
    ):
        if found:
            return f"it arose in the {name} of {', '.join(found)}"
    return ""


def accused(everyone: Sequence[StepFinding]) -> list[str]:
    """The smallest set of ranks, by the findings, of which one computed wrongly.

    A wrong forward pass shows in the loss of the last stage, whatever stage it happened on, so an
    entire pipeline is named. A wrong backward pass shows in the gradients of its stage and of those
    before it. Gradients are compared after their reduction, which spreads them over data replicas,
    so all replicas of a stage are named, unless the fault recurs in a replay.
    """
    replicas = {one.dp_rank for one in everyone if one.loss_differs}
    if replicas:
        return [one.place for one in everyone if one.dp_rank in replicas]
    again = [one for one in everyone if one.gradient_differs]
    return _latest_stage(again or [one for one in everyone if one.square_differs])


def _latest_stage(found: Sequence[StepFinding]) -> list[str]:
    """The places on the latest pipeline stage: where a backward pass went wrong first."""
    last = max((one.pp_rank for one in found), default=0)
    return [one.place for one in found if one.pp_rank == last]


def _accused(
    context: RunContext,
    everyone: Sequence[StepFinding],
    first: Replay,
    replay: Callable[[], Replay],
) -> str:
    """The accused ranks, for a message; replays once more if that can single out a replica."""
    if not any(finding.loss_differs for finding in everyone):
        differs = bool(replay().gradient_digest != first.gradient_digest)
        flags = gathered(context.platform, differs)
        everyone = [
            StepFinding(**(vars(finding) | {"gradient_differs": flag}))
            for finding, flag in zip(everyone, flags, strict=True)
        ]
    places = accused(everyone)
    return (
        f"{places[0]} computes wrongly"
        if len(places) == 1
        else (f"one of {', '.join(places)} computes wrongly")
    )


def _finding(layout: Layout, platform: Platform, result: StepResult, replay: Replay) -> StepFinding:
    before, within = result.evidence, REPEATS_WITHIN[platform.kind]
    assert before is not None, "a step that is replayed was a training step"
    both = torch.stack([before.loss_sums, replay.loss_sums])
    return StepFinding(
        rank=platform.rank,
        host=socket.gethostname(),
        dp_rank=layout.dp_rank,
        pp_rank=layout.pp_rank,
        loss_is_finite=bool(both[:, 0].isfinite().all()),
        gradient_is_finite=bool(replay.gradient_is_finite),
        loss_differs=differ(before.loss_sums, replay.loss_sums, within),
        square_differs=differ(before.square_sum, replay.square_sum, within),
    )


def differ(one: torch.Tensor, other: torch.Tensor, within: float) -> bool:
    """Whether any two fp64 numbers differ by more than a share of the larger one.

    With a share of 0 bits are compared, except that any two NaN are equal.
    """
    same = (one.view(torch.int64) == other.view(torch.int64)) | (one.isnan() & other.isnan())
    if within:
        distance, size = (one - other).abs(), torch.maximum(one.abs(), other.abs())
        same |= distance.isfinite() & (distance <= within * size)
    return not bool(same.all())
