"""Which checkpoints there are, decided by rank 0 for all ranks.

`directory.py` answers for one process. Two ranks that list the same directory over NFS or Lustre
can get two answers, take two paths, and wait for each other.
"""

from pathlib import Path

from phi4.engine.agreement import decided_by_writer
from phi4.engine.platform import Platform
from phi4.rundir.checkpoints import (
    complete_checkpoints,
    find_checkpoint,
    latest_checkpoint,
)


def checkpoints_newest_first(platform: Platform, root: Path) -> list[Path]:
    """What `latest` names, then all other complete checkpoints from the newest on.

    Collectives: one broadcast of the paths over all ranks.
    """

    def decide() -> list[Path]:
        newest = latest_checkpoint(root)
        others = [p for p in reversed(complete_checkpoints(root)) if p != newest]
        return others if newest is None else [newest, *others]

    return decided_by_writer(platform, decide)


def find_checkpoint_together(platform: Platform, place: Path) -> Path:
    """`find_checkpoint` as rank 0 sees it.

    Raises:
        CheckpointError: there is none.

    Collectives: one broadcast of a path over all ranks.
    """
    return decided_by_writer(platform, lambda: find_checkpoint(place))
