"""The loop itself: batch, step, record, hooks and what they decide, until the run ends."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from phi4.data.stream.loader import Loader
from phi4.rundir.state import RunState
from phi4.track import Status, Trackers
from phi4.train.checkpointing import Checkpointer
from phi4.train.hooks import (
    Decision,
    Hook,
    Progress,
    RollBack,
    RunContext,
    SaveAndStop,
    running,
    strongest,
)
from phi4.train.meter import Stopwatch
from phi4.train.reliability.requests import Requests
from phi4.train.roll_back import roll_back
from phi4.train.schedule import next_rate, step_tokens


@dataclass(frozen=True)
class Ending:
    """Where a run ended without an error, and as what."""

    state: RunState | None
    """None where the run ended before it knew."""
    status: Status
    exit_code: int = 0


def train(
    context: RunContext,
    loader: Loader,
    hooks: Sequence[Hook],
    checkpointer: Checkpointer,
    trackers: Trackers,
) -> Ending:
    """Train from `context.state` to `run.steps`, or until a hook stops the run.

    Args:
        context: the run.
        loader: stands where `context.state.data` says.
        hooks: called by every rank in order; started and closed here.
        checkpointer: saves after the hooks' decisions.
        trackers: take one record per step; silent on ranks other than the writer.

    Raises:
        Phi4Error: of the step, a hook or a save; the hooks were told, see `Hook`.

    Collectives: those of `Engine.train_step`, of the hooks, of saves and of `roll_back`.
    """
    state, total = context.state, context.recipe.run.steps
    with running(hooks, state), context.phases.during("hooks", state.step):
        while state.step < total:
            with context.phases.during("step", state.step):
                progress = _step(context, loader, state)
            _record(progress, hooks, trackers)
            decision = strongest([hook.act(progress) for hook in hooks])
            if isinstance(decision, RollBack):
                state = roll_back(context, progress.state, decision, rewind_records=trackers.rewind)
                checkpointer.rewind()
                for hook in hooks:
                    hook.rewind(state)
                continue
            state = progress.state
            stop = _saved(context, progress, decision, checkpointer)
            if stop is not None:
                context.say(
                    f"stopped after step {state.step} of {total}: {stop.reason}; the step is "
                    "saved, and the same command goes on from it"
                )
                return Ending(state, stop.status, stop.exit_code)
    return Ending(state, "finished")


def _saved(
    context: RunContext, progress: Progress, decision: Decision, checkpointer: Checkpointer
) -> SaveAndStop | None:
    """Save the step where a decision, a request or the recipe asks for it; gives what ends the run.

    Who is told to stop while a save is going on has that save: one is not followed by another.
    """
    requests, watch = context.requests, Stopwatch()
    stop = decision if isinstance(decision, SaveAndStop) else _asked_for(requests)
    with context.phases.during("save", progress.step):
        is_saved = checkpointer.save_when_due(
            progress,
            is_last=progress.is_last or stop is not None,
            is_asked=requests.agreed.save,
        )
    if is_saved:
        requests.warn_of_slow_saves(progress.step_seconds, watch.lap(), context.say)
        requests.saved()
        if stop is None and requests.agree(context.platform):
            stop = _asked_for(requests)
    return None if progress.is_last else stop


def _asked_for(requests: Requests) -> SaveAndStop | None:
    stop = requests.stop()
    return stop and SaveAndStop(stop.reason, exit_code=stop.exit_code)


def _record(progress: Progress, hooks: Sequence[Hook], trackers: Trackers) -> None:
    """What all hooks measure, as the step's one record."""
    numbers: dict[str, float] = {}
    for hook in hooks:
        numbers |= hook.measure(progress)
    trackers.log(progress.step, numbers)


def _step(context: RunContext, loader: Loader, state: RunState) -> Progress:
    """The step that follows a state."""
    recipe, layout = context.recipe, context.engine.layout
    watch = Stopwatch()
    rate = next_rate(recipe, step=state.step, consumed_tokens=state.consumed_tokens)
    batches = loader.next_step(
        global_batch_size=recipe.batch.global_batch_size,
        micro_batch_size=recipe.batch.micro_batch_size,
        dp_rank=layout.dp_rank,
        dp_size=layout.dp_size,
    )
    result = context.engine.train_step(
        batches, context.objective, learning_rate=rate, asked=context.requests.asked
    )
    context.requests.learn(result)
    tokens = step_tokens(recipe)
    return Progress(
        state=msgspec.structs.replace(
            state,
            step=state.step + 1,
            consumed_tokens=state.consumed_tokens + tokens,
            data=loader.state(),
        ),
        total_steps=recipe.run.steps,
        step_tokens=tokens,
        step_seconds=watch.lap(),
        learning_rate=rate,
        result=result,
    )
