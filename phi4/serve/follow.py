"""New weights for a server while the run that makes them goes on.

A thread looks for another checkpoint now and then and checks all of it while requests go on. Then
the weights change between two requests: those that are open end with the old ones first, and new
ones wait meanwhile. So a reload costs each waiting client what the longest open answer still takes,
and the time of reading the weights.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from phi4.errors import CheckpointError, Phi4Error
from phi4.rundir.bad_checkpoints import is_bad
from phi4.rundir.checkpoints import checkpoints_dir, latest_checkpoint
from phi4.rundir.manifest import manifest_hash
from phi4.serve.traffic import ModelChange, Traffic

POLL_SECONDS = 5.0


class Weights(NamedTuple):
    """The weights of a server, and what is known of a checkpoint that may replace them.

    Attributes:
        served: the checkpoint that they are of.
        check: raises a Phi4Error where a checkpoint cannot replace them; on any thread.
        load: takes those of a checkpoint, on the model's thread. A CheckpointError leaves the old
            ones.
    """

    served: Path
    check: Callable[[Path], None]
    load: Callable[[Path], None]


class _Seen(NamedTuple):
    """A checkpoint; one that is written again after a roll back is another."""

    path: Path
    manifest_sha256: str

    @classmethod
    def of(cls, path: Path) -> "_Seen":
        return cls(path, manifest_hash(path))


class CheckpointFollower:
    """Tells a server of the checkpoints of a run.

    Args:
        run_dir: of the run.
        traffic: of the server.
        weights: of the server.
        say: prints a line for the operator; called from two threads.
    """

    def __init__(
        self, run_dir: Path, traffic: Traffic, weights: Weights, say: Callable[[str], None]
    ) -> None:
        self._root, self._traffic = checkpoints_dir(run_dir), traffic
        self._weights, self._say = weights, say
        self._seen = _Seen.of(weights.served)

    def look(self) -> None:
        """Ask for a change where the run has another checkpoint, and that one is whole.

        What is wrong with one is said once; it is not tried again.
        """
        try:
            found = latest_checkpoint(self._root)
            if found is None or (seen := _Seen.of(found)) == self._seen:
                return
            if not seen.manifest_sha256 or is_bad(found):
                return
            self._seen = seen
            self._weights.check(found)
        except (Phi4Error, OSError) as error:
            self._report(error)
            return
        self._traffic.change(ModelChange(lambda: self._apply(found)))

    def _apply(self, found: Path) -> str | None:
        try:
            self._weights.load(found)
        except CheckpointError as error:
            self._report(error)
            return None
        self._say(f"serving {found} from now on")
        return found.name

    def _report(self, error: Exception) -> None:
        # The run removes old checkpoints; there is, or will be, a newer one.
        if self._seen.path.is_dir():
            self._say(f"still serving {self._traffic.weights}: {error}")


@contextmanager
def follow(
    run_dir: Path,
    traffic: Traffic,
    weights: Weights,
    say: Callable[[str], None],
    poll_seconds: float = POLL_SECONDS,
) -> Iterator[None]:
    """Follow a run while the block runs.

    Args:
        run_dir: of the run.
        traffic: of the server. Its weights are named as the checkpoint's directory from then on.
        weights: of the server.
        say: see `CheckpointFollower`.
        poll_seconds: between two looks.
    """
    follower = CheckpointFollower(run_dir, traffic, weights, say)
    has_ended = threading.Event()

    def run() -> None:
        while not has_ended.wait(poll_seconds):
            follower.look()

    thread = threading.Thread(target=run, name="follow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        has_ended.set()
        thread.join()
