"""What is written of a run besides checkpoints: its recipe, and what its trackers are told.

Only rank 0 writes, and nothing before its lease has begun: until then the record is another
attempt's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phi4.config import dump_toml
from phi4.engine.agreement import decided_by_writer
from phi4.errors import OwnershipError
from phi4.rundir.names import CONFIG_FILE
from phi4.rundir.roll_back import commit_roll_back, follows_roll_back, forget_roll_back
from phi4.track import Trackers, open_trackers, recipe_params
from phi4.train.hooks import RunContext


def begin_record(context: RunContext) -> Trackers:
    """The run's trackers, once this attempt begins to write.

    What is recorded of steps after the one it goes on from is cut off here.

    Collectives: a broadcast of the writer's outcome over all ranks.
    """
    recipe, state = context.recipe, context.state
    opened = [open_trackers(recipe, resume_step=state.step, is_writer=False)]

    def begin() -> None:
        context.lease.begin()
        run_dir = Path(recipe.run.dir)
        if state.step == 0:
            forget_roll_back(run_dir)
        elif follows_roll_back(state):
            # Whatever a kill left undone of it; and the state may be of a checkpoint before it.
            commit_roll_back(run_dir, state)
        config = run_dir / CONFIG_FILE
        config.write_text(dump_toml(recipe), encoding="utf-8")
        opened[:] = [open_trackers(recipe, resume_step=state.step, is_writer=True, say=context.say)]
        opened[0].start(recipe_params(recipe), [config])

    decided_by_writer(context.platform, begin)
    return opened[0]


@contextmanager
def failure_recorded(trackers: Trackers) -> Iterator[None]:
    """Tell the trackers of a run that ends with an error."""
    try:
        yield
    except OwnershipError:
        # The record and the run in MLflow are the new owner's now.
        raise
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        trackers.finish("interrupted" if stopped else "failed")
        raise
