"""Find the existing checkpoints, decided by rank 0 for all ranks.

`directory.py` answers for one process. Two ranks that list the same directory over NFS or Lustre
can get different results, take different paths, and wait for each other.
"""

from pathlib import Path

from phi4.engine.agreement import decided_by_writer
from phi4.engine.platform import Platform
from phi4.errors import DivergedError
from phi4.rundir.bad_checkpoints import TIMES, is_bad
from phi4.rundir.checkpoints import (
    complete_checkpoints,
    find_checkpoint,
    latest_checkpoint,
)


def checkpoints_newest_first(platform: Platform, root: Path) -> list[Path]:
    """Return the checkpoint in `latest`, then all other complete ones, newest first.

    Bad checkpoints are excluded, see `phi4.rundir.bad_checkpoints`.

    Raises:
        DivergedError: there are checkpoints, and all of them are bad; on every rank.

    Collectives: one broadcast of the paths over all ranks.
    """

    def decide() -> list[Path]:
        newest = latest_checkpoint(root)
        others = [p for p in reversed(complete_checkpoints(root)) if p != newest]
        found = others if newest is None else [newest, *others]
        good = [path for path in found if not is_bad(path)]
        if found and not good:
            raise DivergedError(
                f"all checkpoints in {root} are bad: training from them became NaN "
                f"{TIMES} times: {', '.join(path.name for path in found)}; change the "
                "schedule (--change tries them again), or use another run.dir"
            )
        return good

    return decided_by_writer(platform, decide)


def find_checkpoint_together(platform: Platform, place: Path) -> Path:
    """Return the result of `find_checkpoint` on rank 0.

    Raises:
        CheckpointError: there is none.

    Collectives: one broadcast of a path over all ranks.
    """
    return decided_by_writer(platform, lambda: find_checkpoint(place))
