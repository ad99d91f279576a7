"""A run from its recipe to its end: directory, engine, resumption, loop, trackers.

All inputs are checked before any file of an earlier attempt is overwritten.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from phi4.config import Recipe
from phi4.data.stream.loader import Loader
from phi4.engine.agreement import decided_by_writer, done_by_all, raise_together
from phi4.engine.checkpoint import Replicas
from phi4.engine.engine import Engine
from phi4.engine.objective import Objective
from phi4.engine.platform import Platform
from phi4.engine.qualified import qualified_evidence
from phi4.errors import REQUEUE_EXIT_CODE
from phi4.rundir import Lease
from phi4.rundir.checkpoints import checkpoints_dir, latest_checkpoint
from phi4.rundir.launched_by import NO_LAUNCHER, LaunchedBy
from phi4.rundir.replica import replica_place
from phi4.rundir.state import RunState
from phi4.track.mlflow.system_sampler import sampling_beside
from phi4.train.checkpointing import Checkpointer
from phi4.train.hooks import HookFactory, RunContext
from phi4.train.initial_weights import with_initial_weights
from phi4.train.loop import Ending, train
from phi4.train.own_hooks import OWN_HOOKS
from phi4.train.ownership import owned_run_dir
from phi4.train.reliability.phases import Phases
from phi4.train.reliability.requests import Requests
from phi4.train.reliability.same_start import require_same_start
from phi4.train.reliability.watchdog import Watchdog, watched
from phi4.train.resume import first_state, resume
from phi4.train.run_record import begin_record, failure_recorded
from phi4.train.sources import check_tokenizer, open_sources
from phi4.train.summary import already_finished, end_summary, start_summary

Say = Callable[[str], None]


def run_training(
    recipe: Recipe,
    platform: Platform,
    objective: Objective,
    *,
    allow_change: bool,
    attempt: int | None = None,
    launched_by: LaunchedBy = NO_LAUNCHER,
    hooks: Sequence[HookFactory] = (),
    requests: Requests | None = None,
) -> Ending:
    """Train a recipe, resuming from the run's newest checkpoint if there is one.

    Ends at the last step, or where a hook or a request from outside stops the run.

    Args:
        recipe: checked against the rules.
        platform: this process.
        objective: the stage's loss.
        allow_change: schedule keys may differ from the run's.
        attempt: the attempt whose lease on run.dir the launcher holds; None takes one here.
        launched_by: how and where this process was launched.
        hooks: factories of more hooks, which are called after the run's own.
        requests: requests from outside; with None only files in run.dir make requests.

    Raises:
        OwnershipError: another run owns run.dir, or took it over.
        ConfigError: the recipe does not continue the run in run.dir.
        DataError: a source or the tokenizer is missing or wrong.
        CheckpointError: no checkpoint of the run can be used.
        PlatformError: a rank does not see the files that rank 0 sees, or runs other code, packages
            or another recipe than most; names the rank.

    Collectives: those of owning run.dir, of building the engine, of loading, of every step and
    hook.
    """
    say = print_line if platform.is_writer else _silent
    run_dir = Path(recipe.run.dir)
    requests = requests or Requests()
    with (
        watched(platform, Phases(), recipe.reliability, say) as watchdog,
        owned_run_dir(run_dir, platform, attempt=attempt, job=launched_by.job, say=say) as lease,
        requests.watching(run_dir, is_writer=platform.is_writer),
    ):
        require_same_start(platform, recipe)
        start = _Start(
            recipe,
            platform,
            objective,
            allow_change,
            lease,
            say,
            requests,
            watchdog,
            launched_by,
        )
        return _run(start, hooks)


@dataclass(frozen=True)
class _Start:
    """The arguments of a run before its engine exists; see `run_training` and `RunContext`."""

    recipe: Recipe
    platform: Platform
    objective: Objective
    allow_change: bool
    lease: Lease | None
    say: Say
    requests: Requests
    watchdog: Watchdog
    launched_by: LaunchedBy


def _run(start: _Start, hooks: Sequence[HookFactory]) -> Ending:
    recipe, platform, say = start.recipe, start.platform, start.say
    phases = start.watchdog.phases
    if start.requests.agree(platform):
        return _ended_before_a_step(start.requests, say)
    tokenizer = done_by_all(platform, partial(check_tokenizer, recipe))
    replicas = _replicas(start)
    if replicas is not None:
        with phases.during("load", 0):
            replicas.restore_newer()
    state = decided_by_writer(platform, partial(_fresh_state, recipe))
    # Before anything is built: a missing or foreign source is an error at once.
    data = open_sources(recipe, tokenizer, state, platform)
    engine = _built_engine(recipe, platform, phases, is_resumed=state is None, say=say)
    for line in data.loader.notes:
        say(line)
    source_hashes = data.loader.source_hashes()
    if state is None:
        with phases.during("load", 0):
            state = resume(
                recipe,
                engine,
                allow_change=start.allow_change,
                say=say,
                source_hashes=source_hashes,
                replicas=replicas,
            )
        done_by_all(platform, partial(data.go_to, recipe, state))
    else:
        state = with_initial_weights(recipe, engine, state, say)
    context = RunContext(
        recipe=recipe,
        platform=platform,
        engine=engine,
        objective=start.objective,
        tokenizer=tokenizer,
        source_hashes=source_hashes,
        held_out=data.held_out,
        state=state,
        lease=start.lease,
        say=say,
        phases=phases,
        requests=start.requests,
    )
    return _trained(context, data.loader, hooks, start)


def _replicas(start: _Start) -> Replicas | None:
    """The replicas from which lost checkpoints are restored; None if the recipe has none.

    Collectives: a broadcast of a path over all ranks, with `checkpoint.replica_dir`.
    """
    platform, run_dir = start.platform, start.recipe.run.dir
    replica_dir = start.recipe.checkpoint.replica_dir
    if not replica_dir:
        return None
    place = decided_by_writer(platform, partial(replica_place, replica_dir, run_dir))
    tick = start.watchdog.phases.tick
    return Replicas(platform, place, Path(run_dir), start.lease, start.say, tick)


def _built_engine(
    recipe: Recipe, platform: Platform, phases: Phases, *, is_resumed: bool, say: Say
) -> Engine:
    draws_weights = not is_resumed and recipe.run.init_from is None
    with phases.during("qualify", 0):
        evidence = qualified_evidence(recipe, platform, say)
    return Engine(
        recipe, platform, draws_weights=draws_weights, tick=phases.tick, evidence=evidence
    )


def _ended_before_a_step(requests: Requests, say: Say, state: RunState | None = None) -> Ending:
    """The end of a run that was asked to stop while it started: there is nothing new to save."""
    stop = requests.stop()
    assert stop is not None
    requests.ended()
    say(
        f"stopped before the first step: {stop.reason}; there is nothing new to save, and the same "
        "command resumes from the newest checkpoint"
    )
    return Ending(state, "interrupted", stop.exit_code)


def _trained(
    context: RunContext, loader: Loader, factories: Sequence[HookFactory], start: _Start
) -> Ending:
    requests = context.requests
    if requests.agree(context.platform):
        context.engine.close()
        return _ended_before_a_step(requests, context.say, context.state)
    say, is_finished = context.say, context.state.step >= context.recipe.run.steps
    if is_finished:
        say(already_finished(context))
        context = replace(context, say=_silent)
    for line in [] if is_finished else start_summary(context):
        say(line)
    started = time.monotonic()
    hooks = [hook for make in (*OWN_HOOKS, *factories) for hook in make(context)]
    checkpointer = Checkpointer(context)
    hooks.append(checkpointer.hook)
    recorder = begin_record(context, loader.manifests, start.launched_by)
    hung = "a rank stopped or hangs"
    start.watchdog.at_end(partial(recorder.finish, "failed", reason=hung))
    recipe = context.recipe
    sampled = sampling_beside(
        Path(recipe.run.dir), start.launched_by, wanted=recipe.tracking.mlflow
    )
    with failure_recorded(recorder), sampled:
        ending = train(context, loader, hooks, checkpointer, recorder)
    assert ending.state is not None
    with context.phases.during("end", ending.state.step):
        was_noticed = ending.exit_code == REQUEUE_EXIT_CODE and context.platform.is_writer
        preempted = requests.was_preempted() if was_noticed else False
        recorder.finish(ending.status, reason=ending.reason, preempted=preempted)
        requests.ended()
        # A launcher may kill all ranks once one exits, so every rank waits for rank 0's record.
        raise_together(context.platform, None)
        context.engine.close()
    if ending.status == "finished" and not is_finished:
        for line in end_summary(context, ending, time.monotonic() - started):
            say(line)
    return ending


def _fresh_state(recipe: Recipe) -> RunState | None:
    """The first state of a new run; None if the run has a checkpoint to resume from."""
    if latest_checkpoint(checkpoints_dir(recipe.run.dir)) is not None:
        return None
    return first_state(recipe)


def print_line(text: str) -> None:
    """Print a line and flush it, so that a pipe gets it at once."""
    print(text, flush=True)


def _silent(text: str) -> None:
    pass
