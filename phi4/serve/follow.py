"""Reload a server's weights while the run that produces them continues.

A thread polls for another checkpoint and verifies it while requests continue. The weights then
change between requests: open ones finish with the old weights, and new ones wait meanwhile. A
reload delays each waiting client by the longest open answer and the time of reading the weights.
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
    """The weights of a server, and the functions that replace them.

    Attributes:
        served: their checkpoint.
        check: raises a Phi4Error if a checkpoint cannot replace them; on any thread.
        load: loads those of a checkpoint, on the model's thread. A CheckpointError leaves the old
            ones.
    """

    served: Path
    check: Callable[[Path], None]
    load: Callable[[Path], None]


class _Seen(NamedTuple):
    """A checkpoint; one that is rewritten after a rollback is a different one."""

    path: Path
    manifest_sha256: str

    @classmethod
    def of(cls, path: Path) -> "_Seen":
        return cls(path, manifest_hash(path))


class CheckpointFollower:
    """Notifies a server of a run's checkpoints.

    Args:
        run_dir: run directory of the run.
        traffic: traffic of the server.
        weights: weights of the server.
        say: prints a line for the operator; called from two threads.
    """

    def __init__(
        self, run_dir: Path, traffic: Traffic, weights: Weights, say: Callable[[str], None]
    ) -> None:
        self._root, self._traffic = checkpoints_dir(run_dir), traffic
        self._weights, self._say = weights, say
        self._seen = _Seen.of(weights.served)

    def look(self) -> None:
        """Request a change if the run has another checkpoint, and it is complete.

        An error of a checkpoint is reported once; it is not tried again.
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
    """Follow a run during the block.

    Args:
        run_dir: run directory of the run.
        traffic: traffic of the server. Its weights are named after the checkpoint's directory from
            then on.
        weights: weights of the server.
        say: see `CheckpointFollower`.
        poll_seconds: polling interval.
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
