"""The process that sends a run's record to MLflow: `python -m phi4.track.mlflow.process`.

It receives the run on its standard input, and reports on its standard output. It ends by itself:
once MLflow has the run's final status, or some time after the training process has ended. It can be
killed with SIGKILL at any time without losing data.
"""

import importlib
import os
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from phi4.imports import without_collections
from phi4.rundir.attempts import newest_attempt
from phi4.track.mlflow.follower import Follower
from phi4.track.mlflow.messages import (
    Arrived,
    FollowRun,
    FromFollower,
    StatusSet,
    ToFollower,
    Told,
    TrainingEnded,
)
from phi4.track.mlflow.store import MlflowStore
from phi4.track.mlflow.system_sampler import SystemSampler
from phi4.track.mlflow.troubles import trouble_of
from phi4.track.mlflow.wish import TrackingWish
from phi4.track.record import Status

_BATCH_SECONDS = 1.0
"""Few large requests cost a server less than many small ones."""

_LONGEST_RETRY_SECONDS = 30.0
_ALONE_SECONDS = 60.0
"""How long it keeps trying after the training process has ended."""

_NICENESS = 10


class Parent:
    """The training process, at the other end of two pipes.

    Args:
        source: pipe of its messages.
        sink: pipe for messages to it.
    """

    def __init__(self, source: int, sink: int) -> None:
        self._source, self._sink = source, sink
        self._unread = b""
        self._pid: int | None = None
        self.is_gone = False
        self.ended: Status | None = None

    def asks(self) -> FollowRun | None:
        """Return what to follow; None if it ended before sending that."""
        while not self.is_gone and self._pid is None:
            for message in self._messages():
                assert isinstance(message, FollowRun), "the first message says what to follow"
                self._pid = message.parent
                return message
        return None

    def wait(self, seconds: float) -> None:
        """Wait until it sends a message, has ended, or the time is over."""
        deadline = time.monotonic() + seconds
        while not (self.is_gone or self.ended):
            left = max(0.0, min(deadline - time.monotonic(), _BATCH_SECONDS))
            if select.select([self._source], [], [], left)[0]:
                for message in self._messages():
                    assert isinstance(message, TrainingEnded), "the last message is the end"
                    self.ended = message.status
            elif time.monotonic() >= deadline:
                break
            # Its end of the pipe may still be open in a process that it forked.
            self.is_gone = self.is_gone or os.getppid() != self._pid
        self.is_gone = self.is_gone or os.getppid() != self._pid

    def tell(self, message: FromFollower) -> None:
        """Send it a message, unless it has ended."""
        try:
            os.write(self._sink, msgspec.json.encode(message) + b"\n")
        except OSError:
            self.is_gone = True

    def _messages(self) -> list[FollowRun | TrainingEnded]:
        """Yield what has arrived; waits for the first bytes."""
        found = os.read(self._source, 1 << 16)
        self.is_gone = self.is_gone or not found
        *lines, self._unread = (self._unread + found).split(b"\n")
        decoder = msgspec.json.Decoder(ToFollower)
        return [decoder.decode(line) for line in lines]


class LiveFollowing:
    """Follows one attempt of a run to its end.

    Args:
        parent: the training process.
        asked: the run to follow.
        open_store: opens the store of a wish.
    """

    def __init__(
        self, parent: Parent, asked: FollowRun, open_store: Callable[[TrackingWish], MlflowStore]
    ) -> None:
        self._parent, self._asked, self._open_store = parent, asked, open_store
        self._run_dir = Path(asked.wish.run_dir)
        self._follower: Follower | None = None
        self._has_begun = False
        self._told: set[str] = set()
        self._address = "MLflow"
        # The training process is rank 0, whose machine is node 0.
        self._sampler = SystemSampler(self._run_dir, 0, os.getppid())

    def run(self) -> None:
        """Follow until MLflow has the final status, or this attempt no longer owns the run."""
        wait_seconds, gone_at = 0.0, None
        while True:
            self._parent.wait(wait_seconds)
            is_over = self._parent.ended is not None or self._parent.is_gone
            if self._parent.is_gone:
                gone_at = gone_at or time.monotonic()
                if time.monotonic() - gone_at > _ALONE_SECONDS or self._is_superseded():
                    return
            try:
                follower = self._advance()
                if is_over:
                    self._end(follower)
                    return
                follower.describe()
                wait_seconds = _BATCH_SECONDS
            except Exception as error:
                self._complain(error)
                wait_seconds = min(max(2 * wait_seconds, 1.0), _LONGEST_RETRY_SECONDS)
                if is_over:
                    time.sleep(_BATCH_SECONDS)

    def _advance(self) -> Follower:
        """Send what is new in the record."""
        self._sampler.sample_if_due()
        if self._follower is None:
            store = self._open_store(self._asked.wish)
            self._address = f"MLflow at {store.uri}"
            self._follower = Follower(
                self._run_dir,
                store,
                lambda text: self._parent.tell(Told(text)),
                lambda step: self._parent.tell(Arrived(step)),
                lambda: not self._is_superseded(),
            )
        if not self._has_begun:
            self._follower.begin()
            self._has_begun = True
        self._follower.catch_up()
        self._follower.show_machines()
        return self._follower

    def _end(self, follower: Follower) -> None:
        # The process that took over the run sets its status.
        if not self._is_superseded():
            follower.conclude(self._parent.ended)
        self._parent.tell(StatusSet())
        if not self._is_superseded():
            # After the status, which must not wait for it; the parent run's status comes last.
            follower.describe(is_last=True)

    def _is_superseded(self) -> bool:
        return newest_attempt(self._run_dir) > self._asked.attempt

    def _complain(self, error: Exception) -> None:
        trouble = trouble_of(error)
        if trouble.kind not in self._told:
            self._told.add(trouble.kind)
            text = f"{self._address}: {trouble.text}; training continues, and sending is retried"
            self._parent.tell(Told(text))


def _open_store(wish: TrackingWish) -> MlflowStore:
    if "mlflow" not in sys.modules:
        with without_collections():
            importlib.import_module("mlflow")
    return MlflowStore(wish, is_training=True)


def main() -> None:
    """Follow the run that the process at the other end of standard input requests."""
    os.nice(_NICENESS)
    parent = Parent(os.dup(0), os.dup(1))
    # Output of libraries must not reach the training process.
    silence = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(silence, descriptor)
    asked = parent.asks()
    if asked is not None:
        LiveFollowing(parent, asked, _open_store).run()


if __name__ == "__main__":
    main()
    sys.exit(0)
