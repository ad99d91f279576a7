"""The loop itself: batch, step, record, hooks, until the run is finished."""

from collections.abc import Callable, Sequence

import msgspec

from phi4.config import Recipe
from phi4.data.stream.loader import Loader
from phi4.engine.engine import Engine
from phi4.engine.objective import Objective
from phi4.rundir.state import RunState
from phi4.train.hooks import Hook, Progress, Stopwatch
from phi4.train.schedule import next_rate, step_tokens


def train(
    recipe: Recipe,
    engine: Engine,
    loader: Loader,
    objective: Objective,
    hooks: Sequence[Hook],
    state: RunState,
    *,
    record: Callable[[int, dict[str, float]], None],
) -> RunState:
    """Train from `state` to `run.steps`.

    Args:
        recipe: the run.
        engine: holds model and optimizer as of `state`.
        loader: stands where `state.data` says.
        objective: the stage's loss.
        hooks: called by every rank in order.
        state: completed steps.
        record: takes (step, numbers) once per step; called on every rank.

    Collectives: those of `Engine.train_step` and of the hooks.
    """
    batch = recipe.batch
    tokens = step_tokens(recipe)
    layout = engine.layout
    while state.step < recipe.run.steps:
        watch = Stopwatch()
        rate = next_rate(recipe, step=state.step, consumed_tokens=state.consumed_tokens)
        batches = loader.next_step(
            global_batch_size=batch.global_batch_size,
            micro_batch_size=batch.micro_batch_size,
            dp_rank=layout.dp_rank,
            dp_size=layout.dp_size,
        )
        result = engine.train_step(batches, objective, learning_rate=rate)
        state = msgspec.structs.replace(
            state,
            step=state.step + 1,
            consumed_tokens=state.consumed_tokens + tokens,
            data=loader.state(),
        )
        progress = Progress(
            state=state,
            total_steps=recipe.run.steps,
            step_tokens=tokens,
            step_seconds=watch.lap(),
            learning_rate=rate,
            result=result,
        )
        numbers: dict[str, float] = {}
        for hook in hooks:
            numbers |= hook.measure(progress)
        record(state.step, numbers)
        for hook in hooks:
            hook.act(progress)
    return state
