"""The numbers of every step; `docs/metrics.md` has all of them with unit and formula."""

import time
from collections.abc import Callable, Mapping, Sequence

import torch

from phi4.config import Recipe
from phi4.data.stream.drawn_tokens import drawn_tokens
from phi4.data.stream.ledger import parse_state
from phi4.model.shape import training_flops
from phi4.rundir.state import RunState
from phi4.train.hooks import Hook, Progress, RunContext
from phi4.train.peak import Peak, peak_of
from phi4.train.rank_memory import RankMemory
from phi4.train.time_left import TimeLeft


def meter(context: RunContext) -> Sequence[Hook]:
    """The meter of a run; a `HookFactory`."""
    device = context.platform.device
    name = torch.cuda.get_device_name(device) if context.platform.kind == "cuda" else None
    return [
        Meter(
            context.recipe,
            context.platform.world_size,
            peak_of(context.recipe, name),
            memory=RankMemory(context.engine).numbers,
            say=context.say,
        )
    ]


class Meter(Hook):
    """Measures loss, gradient norms, learning rate, speed, memory and the remaining time.

    Args:
        recipe: the run's recipe.
        world_size: number of ranks, that is of GPUs, that share the work.
        peak: peak throughput of one rank.
        memory: this rank's bytes, by metric.
        say: prints the line that names the peak.
        clock: seconds; replaced in tests.
    """

    def __init__(
        self,
        recipe: Recipe,
        world_size: int,
        peak: Peak,
        *,
        memory: Callable[[], Mapping[str, float]],
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._recipe = recipe
        self._world_size = world_size
        self._peak = peak
        self._memory = memory
        self._say = say
        self._time_left = TimeLeft(recipe, clock)

    def start(self, state: RunState) -> None:
        """Print the peak; the first step is timed from here."""
        self._say(self._peak.reason)
        self._time_left.begin()

    def rewind(self, state: RunState) -> None:
        """The time of the rollback does not count as a step's."""
        self._time_left.begin()

    def measure(self, progress: Progress) -> dict[str, float]:
        """loss, grad_norm, learning_rate, consumed_tokens, step_seconds; speed, memory, time left.

        Also skipped = 1 after a step without an update, whose loss or gradient norm was not finite
        or a spike, with the number of such steps in a row as bad_in_row; and `roll_back_numbers`.
        grad_norm/GROUP on steps that tracking.group_norms_every divides; data/SOURCE when an
        evaluation is due: it changes slowly, and there may be many sources.
        """
        is_due = progress.is_due(self._recipe.evaluation.every)
        steps_left = progress.total_steps - progress.step
        norms = progress.result.group_norms
        return {
            "loss": progress.result.loss,
            "grad_norm": progress.result.grad_norm,
            "learning_rate": progress.learning_rate,
            "consumed_tokens": progress.state.consumed_tokens,
            "step_seconds": progress.step_seconds,
            **speed_numbers(self._recipe, progress, self._world_size, self._peak),
            "eta_seconds": self._time_left.after_step(steps_left),
            **{f"grad_norm/{group}": norm for group, norm in norms.items()},
            **self._memory(),
            **(_source_shares(progress.state) if is_due else {}),
            **_skipped_numbers(progress),
            **roll_back_numbers(progress.state),
            **progress.result.metrics,
        }


def speed_numbers(
    recipe: Recipe, progress: Progress, num_gpus: int, peak: Peak
) -> dict[str, float]:
    """Tokens and model FLOPs per second of a step, and the share of the peak if that is known.

    The FLOPs are those of the documents in the step's rows; causal counts half of every document's
    attention square, full the entire square.
    """
    tokens_per_second = progress.step_tokens / progress.step_seconds
    flops = training_flops(recipe.model, progress.result.work)
    causal, full = (
        count / progress.step_seconds / num_gpus / 1e12 for count in (flops.causal, flops.full)
    )
    numbers = {
        "tokens_per_second": tokens_per_second,
        "tokens_per_second_per_gpu": tokens_per_second / num_gpus,
        "model_tflops_per_gpu": causal,
    }
    if peak.tflops is not None:
        numbers |= {"mfu_causal": causal / peak.tflops, "mfu_full": full / peak.tflops}
    return numbers


def group_norms_due(recipe: Recipe, step: int) -> bool:
    """Whether a step's gradient norms are recorded by group."""
    every = recipe.tracking.group_norms_every
    return every > 0 and step % every == 0


def _source_shares(state: RunState) -> dict[str, float]:
    """data/SOURCE: the source's fraction of all tokens consumed since the ledger began."""
    if not state.data:
        return {}
    tokens = drawn_tokens(parse_state(state.data))
    total = sum(tokens.values())
    return {f"data/{name}": count / total for name, count in tokens.items()} if total else {}


def roll_back_numbers(state: RunState) -> dict[str, int]:
    """rolled_back_from, roll_backs and skipped_rows, for the step that follows a rollback.

    Only skipped_rows if the recipe requested the skip. They are derived from the state, so that a
    run that was killed right after the rollback records them too.
    """
    skips = [skip for skip in state.skips if skip.after_step == state.step - 1]
    if not skips:
        return {}
    numbers = {"skipped_rows": sum(skip.rows for skip in skips)}
    undone = [skip.last_undone for skip in skips if skip.last_undone > skip.after_step]
    if not undone:
        return numbers
    return {"rolled_back_from": undone[-1], "roll_backs": state.roll_backs} | numbers


def _skipped_numbers(progress: Progress) -> dict[str, float]:
    if progress.result.updated:
        return {}
    return {"skipped": 1.0, "bad_in_row": float(progress.state.numerics.bad_in_row)}


class Stopwatch:
    """Seconds between laps; monotonic."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Seconds since construction or the last lap."""
        now = time.perf_counter()
        self._since, seconds = now, now - self._since
        return seconds
