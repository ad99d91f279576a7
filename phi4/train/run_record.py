"""The record of a run apart from its checkpoints: recipe, metrics, and how its attempts end.

Only rank 0 writes, and only once its lease has begun: until then the record belongs to another
attempt.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from phi4.config import dump_toml
from phi4.data.stream.sources import SourceManifest
from phi4.engine.agreement import decided_by_writer
from phi4.errors import OwnershipError, Phi4Error
from phi4.rundir import Lease
from phi4.rundir.about import write_about
from phi4.rundir.launched_by import LaunchedBy
from phi4.rundir.names import CONFIG_FILE
from phi4.rundir.roll_back import commit_roll_back, follows_roll_back, forget_roll_back
from phi4.rundir.run_record import read_run
from phi4.track import Status, Trackers, open_trackers, recipe_params
from phi4.train.about_run import about_run
from phi4.train.hooks import RunContext
from phi4.train.wall_clock import WallClock


class Recorder:
    """The record of one attempt; silent on ranks other than the writer.

    Args:
        trackers: metrics.jsonl and its views.
        lease: on the writer rank; None on the others.
        clock: on the writer rank; None on the others.
    """

    def __init__(
        self, trackers: Trackers, lease: Lease | None = None, clock: WallClock | None = None
    ) -> None:
        self._trackers, self._lease, self._clock = trackers, lease, clock

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write the line of a step."""
        if self._clock is not None:
            self._trackers.log(step, {**numbers, **self._clock.numbers()})

    def rewind(self, step: int) -> None:
        """Remove the records of the steps after this one: they are undone."""
        self._trackers.rewind(step)
        if self._clock is not None and self._lease is not None:
            self._clock.follow(read_run(self._lease.run_dir))

    def finish(self, status: Status, *, reason: str = "", preempted: bool | None = None) -> None:
        """Record how the attempt ends, then close the record."""
        if self._clock is not None and self._lease is not None:
            # If the disk cannot take this, the trackers still get the status.
            with suppress(Phi4Error):
                self._lease.conclude(
                    status, reason=reason, preempted=preempted, seconds=self._clock.taken()
                )
        self._trackers.finish(status)


def begin_record(
    context: RunContext, manifests: Mapping[str, SourceManifest], launched_by: LaunchedBy
) -> Recorder:
    """Begin this attempt's part of the run's record.

    Records of steps after the one that it resumes from are removed here.

    Args:
        context: the run's context.
        manifests: manifest of each training source, by name.
        launched_by: how this process was launched.

    Collectives: a broadcast of the writer's outcome over all ranks.
    """
    recipe, state = context.recipe, context.state
    begun = [Recorder(open_trackers(recipe, resume_step=state.step, is_writer=False))]

    def begin() -> None:
        lease = context.owned_lease
        lease.begin()
        run_dir = Path(recipe.run.dir)
        if state.step == 0:
            forget_roll_back(run_dir)
        elif follows_roll_back(state):
            # A kill may have interrupted the rollback, or the state be of an earlier checkpoint.
            commit_roll_back(run_dir, state)
        config = run_dir / CONFIG_FILE
        config.write_text(dump_toml(recipe), encoding="utf-8")
        trackers = open_trackers(recipe, resume_step=state.step, is_writer=True, say=context.say)
        clock = WallClock(context.phases, lease.number, lease.started_unix)
        clock.follow(read_run(run_dir))
        params = recipe_params(recipe)
        _tell_about(context, manifests, launched_by, params)
        trackers.start(params, [config])
        begun[:] = [Recorder(trackers, lease, clock)]

    decided_by_writer(context.platform, begin)
    return begun[0]


def _tell_about(
    context: RunContext,
    manifests: Mapping[str, SourceManifest],
    launched_by: LaunchedBy,
    params: Mapping[str, Any],
) -> None:
    """Record the facts of this attempt; a failure does not stop the run."""
    try:
        write_about(
            Path(context.recipe.run.dir), about_run(context, manifests, launched_by, params)
        )
    except (OSError, Phi4Error) as error:
        context.say(f"the facts of this attempt (commit, user, data) are not recorded: {error}")


@contextmanager
def failure_recorded(recorder: Recorder) -> Iterator[None]:
    """Record the end of a run that ends with an error."""
    try:
        yield
    except OwnershipError:
        # The record and the run in MLflow now belong to the new owner.
        raise
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        recorder.finish("interrupted" if stopped else "failed", reason=reason)
        raise
