"""Finds a rank that computes more slowly than the ranks that do the same work.

Ranks of one pipeline stage do the same work. Their forward times are compared, each as a median
over a window of steps, so that one slow step has no effect. The ranks of a tensor or context group
wait for each other within a forward pass: if one of them is slow, all of them measure it, and all
are named. A rank that is alone on its stage has no peers and is never named.
"""

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist

from phi4.engine.forward_timer import ForwardTimer
from phi4.engine.sign_in import hosts_of
from phi4.rundir.state import RunState
from phi4.train.hooks import Hook, Progress, RunContext


class Pace(NamedTuple):
    """What a rank reports for a window of steps."""

    stage: int
    """Ranks with the same number do the same work."""
    seconds: float
    """Median over the steps of the window; 0 if nothing was measured."""


class Straggler(NamedTuple):
    """A rank and how many times the median of its peers it takes."""

    rank: int
    factor: float


class PaceComparison:
    """Compares windows and remembers who was slow in the one before.

    Args:
        factor: how many times the median of its peers is too slow.
    """

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._slow_before: set[int] = set()
        self._named: set[int] = set()

    def of(self, paces: Sequence[Pace]) -> tuple[Straggler | None, list[Straggler]]:
        """The slowest rank of a window, and the ranks to name.

        A rank is named when it is too slow in two windows in a row, and only once until it
        recovers.

        Args:
            paces: by rank.

        Returns:
            None for the slowest if no rank has peers.
        """
        found = [Straggler(r, f) for r in range(len(paces)) if (f := _factor_of(r, paces))]
        slow = {straggler.rank for straggler in found if straggler.factor > self._factor}
        self._named &= slow
        newly = (slow & self._slow_before) - self._named
        self._named |= newly
        self._slow_before = slow
        slowest = max(found, key=lambda straggler: straggler.factor, default=None)
        return slowest, [straggler for straggler in found if straggler.rank in newly]


def _factor_of(rank: int, paces: Sequence[Pace]) -> float:
    """0 without peers."""
    own = paces[rank]
    peers = [
        pace.seconds
        for other, pace in enumerate(paces)
        if other != rank and pace.stage == own.stage and pace.seconds > 0
    ]
    return own.seconds / median(peers) if peers else 0.0


class Stragglers(Hook):
    """Compares the ranks every `reliability.straggler_every` steps and names those that are slow.

    Measures `slowest_rank` and `slowest_rank_factor` in the steps of a comparison.

    Args:
        context: the run's context.
    """

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._every = context.recipe.reliability.straggler_every
        self._comparison = PaceComparison(context.recipe.reliability.straggler_factor)
        self._timer = ForwardTimer(context.platform.device)
        self._window: list[float] = []

    def start(self, state: RunState) -> None:
        """Start to measure."""
        self._context.engine.forward_timer = self._timer

    def measure(self, progress: Progress) -> dict[str, float]:
        """Compare when it is due.

        Collectives: then one all-gather over all ranks of two fp64 numbers.
        """
        seconds = self._timer.next_step()
        if seconds is not None:
            self._window.append(seconds)
        if progress.step % self._every:
            return {}
        slowest, named = self._comparison.of(self._paces())
        for straggler in named:
            self._report(straggler, progress.step)
        if slowest is None:
            return {}
        return {"slowest_rank": float(slowest.rank), "slowest_rank_factor": slowest.factor}

    def rewind(self, state: RunState) -> None:
        """Begin a new window: the rollback may have delayed some ranks more than others."""
        self._window = []

    def close(self) -> None:
        """Stop measuring."""
        self._context.engine.forward_timer = None

    def _paces(self) -> list[Pace]:
        window, self._window = self._window, []
        own = Pace(self._context.engine.layout.pp_rank, median(window) if window else 0.0)
        platform = self._context.platform
        mine = torch.tensor(own, dtype=torch.float64, device=platform.device)
        everyone = [torch.empty_like(mine) for _ in range(platform.world_size)]
        dist.all_gather(everyone, mine)
        stages_and_seconds = torch.stack(everyone).tolist()
        return [Pace(int(stage), seconds) for stage, seconds in stages_and_seconds]

    def _report(self, straggler: Straggler, step: int) -> None:
        platform = self._context.platform
        if not platform.is_writer or platform.store is None:
            return
        host = hosts_of(platform.store, [straggler.rank])[straggler.rank]
        self._context.say(
            f"straggler: rank {straggler.rank} on {host} takes {straggler.factor:.1f} times as "
            f"long for its forward passes as its peers, at step {step} for two windows of "
            f"{self._every} steps; check clocks, temperature and other programs of its device"
        )


def stragglers(context: RunContext) -> Sequence[Hook]:
    """A `HookFactory`; no hook for a single rank, or if the recipe turns comparisons off."""
    if context.platform.world_size == 1 or not context.recipe.reliability.straggler_every:
        return []
    return [Stragglers(context)]
