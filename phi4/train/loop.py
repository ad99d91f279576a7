"""The training loop: batch, step, record, hooks and their decisions, until the run ends."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from phi4.data.stream.loader import Loader
from phi4.rundir.state import RunState
from phi4.track import Status
from phi4.train.checkpointing import Checkpointer
from phi4.train.hooks import (
    CONTINUE,
    Decision,
    Hook,
    Progress,
    RollBack,
    RunContext,
    SaveAndStop,
    running,
    strongest,
)
from phi4.train.meter import Stopwatch, group_norms_due
from phi4.train.reliability.ladder import save_or_roll_back
from phi4.train.reliability.requests import Requests
from phi4.train.reliability.skipped_windows import behind_window
from phi4.train.reliability.spikes import SpikeDetector
from phi4.train.roll_back import roll_back
from phi4.train.run_record import Recorder
from phi4.train.schedule import next_rate, step_tokens


@dataclass(frozen=True)
class Ending:
    """How a run ended without an error: its last state and its status."""

    state: RunState | None
    """None if the run ended before its state was known."""
    status: Status
    exit_code: int = 0
    reason: str = ""
    """Why it ended before its last step."""
    loss: float | None = None
    """Loss of the last step that this attempt trained, if any."""


def train(
    context: RunContext,
    loader: Loader,
    hooks: Sequence[Hook],
    checkpointer: Checkpointer,
    recorder: Recorder,
) -> Ending:
    """Train from `context.state` to `run.steps`, or until a hook stops the run.

    Args:
        context: the run's context.
        loader: at the position of `context.state.data`.
        hooks: called by every rank in order; started and closed here.
        checkpointer: saves after the hooks' decisions.
        recorder: takes one record per step; silent on ranks other than the writer.

    Raises:
        Phi4Error: raised by the step, a hook or a save; the hooks were notified, see `Hook`.

    Collectives: those of `Engine.train_step`, of the hooks, of saves and of `roll_back`.
    """
    state, total = context.state, context.recipe.run.steps
    loss = None
    with running(hooks, state), context.phases.during("hooks", state.step):
        while state.step < total:
            progress = _step(context, loader, state)
            progress = _recorded(progress, hooks, recorder)
            decision = strongest([hook.act(progress) for hook in hooks])
            if not isinstance(decision, RollBack):
                decision = _saved(context, progress, decision, checkpointer)
            if isinstance(decision, RollBack):
                with context.phases.during("roll_back", progress.step):
                    checkpointer.settle(progress.step)
                    state = roll_back(
                        context, progress.state, decision, rewind_records=recorder.rewind
                    )
                checkpointer.rewind()
                for hook in hooks:
                    hook.rewind(state)
                continue
            state, loss = progress.state, progress.result.loss
            if isinstance(decision, SaveAndStop) and not progress.is_last:
                context.say(
                    f"stopped after step {state.step} of {total}: {decision.reason}; the step is "
                    "saved, and the same command resumes from it"
                )
                return Ending(state, decision.status, decision.exit_code, decision.reason)
    return Ending(state, "finished", loss=loss)


def _saved(
    context: RunContext, progress: Progress, decision: Decision, checkpointer: Checkpointer
) -> Decision:
    """Save the step if a decision, a request or the recipe requires it; returns how to continue.

    A stop that is requested during a blocking save needs no second one: the step is saved already.
    """
    requests, watch = context.requests, Stopwatch()
    if not isinstance(decision, SaveAndStop):
        decision = _asked_for(requests) or decision
    save, decision = save_or_roll_back(context, checkpointer, progress, decision)
    if save is not None:
        requests.saved()
    if save == "durable":
        requests.warn_of_slow_saves(progress.step_seconds, watch.lap(), context.say)
        if decision == CONTINUE and requests.agree(context.platform):
            return _asked_for(requests) or CONTINUE
    return decision


def _asked_for(requests: Requests) -> SaveAndStop | None:
    stop = requests.stop()
    return stop and SaveAndStop(stop.reason, exit_code=stop.exit_code)


def _recorded(progress: Progress, hooks: Sequence[Hook], recorder: Recorder) -> Progress:
    """Record what all hooks measure, as one record; returns the step with the state they return."""
    numbers: dict[str, float] = {}
    for hook in hooks:
        numbers |= hook.measure(progress)
    recorder.log(progress.step, numbers)
    state = progress.state
    for hook in hooks:
        state = hook.remember(state)
    return replace(progress, state=state)


def _step(context: RunContext, loader: Loader, state: RunState) -> Progress:
    """Train the step that follows a state."""
    recipe, layout = context.recipe, context.engine.layout
    watch = Stopwatch()
    with context.phases.during("data", state.step):
        state = behind_window(recipe, loader, state)
        batches = loader.next_step(
            global_batch_size=recipe.batch.global_batch_size,
            micro_batch_size=recipe.batch.micro_batch_size,
            dp_rank=layout.dp_rank,
            dp_size=layout.dp_size,
        )
    spikes = SpikeDetector(recipe.reliability.spike_deviations, recipe.reliability.spike_window)
    limits = spikes.limits(state.numerics)
    rate = next_rate(recipe, step=state.step, consumed_tokens=state.consumed_tokens)
    with context.phases.during("step", state.step):
        result = context.engine.train_step(
            batches,
            context.objective,
            learning_rate=rate,
            limits=limits,
            asked=context.requests.asked,
            by_group=group_norms_due(recipe, state.step + 1),
        )
    context.requests.learn(result)
    tokens = step_tokens(recipe)
    return Progress(
        state=msgspec.structs.replace(
            state,
            step=state.step + 1,
            consumed_tokens=state.consumed_tokens + tokens,
            data=loader.state(),
            numerics=spikes.following(state.numerics, result),
        ),
        total_steps=recipe.run.steps,
        step_tokens=tokens,
        step_seconds=watch.lap(),
        learning_rate=rate,
        result=result,
        batches=batches,
    )
