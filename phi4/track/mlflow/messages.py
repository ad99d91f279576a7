"""Messages between the training process and the follower process, one per line."""

import msgspec

from phi4.track.mlflow.wish import TrackingWish
from phi4.track.record import Status


class FollowRun(msgspec.Struct, frozen=True, tag=True):
    """To the follower, first: the run to follow.

    Attributes:
        wish: where the run is tracked.
        attempt: number of the training attempt.
        parent: pid of the training process.
    """

    wish: TrackingWish
    attempt: int
    parent: int


class TrainingEnded(msgspec.Struct, frozen=True, tag=True):
    """To the follower, last: how training ended."""

    status: Status


class Told(msgspec.Struct, frozen=True, tag=True):
    """From the follower: a line for the user."""

    text: str


class Arrived(msgspec.Struct, frozen=True, tag=True):
    """From the follower: all points up to this step have arrived."""

    step: int


class StatusSet(msgspec.Struct, frozen=True, tag=True):
    """From the follower: everything has arrived, including the run's final status."""


ToFollower = FollowRun | TrainingEnded
FromFollower = Told | Arrived | StatusSet
