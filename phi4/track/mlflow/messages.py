"""What the process that trains and the process that follows tell each other, a line each."""

import msgspec

from phi4.track.mlflow.wish import TrackingWish
from phi4.track.record import Status


class FollowRun(msgspec.Struct, frozen=True, tag=True):
    """To the follower, first: what to follow.

    Attributes:
        wish: where the run is shown.
        attempt: number of the attempt that trains.
        parent: pid of its process.
    """

    wish: TrackingWish
    attempt: int
    parent: int


class TrainingEnded(msgspec.Struct, frozen=True, tag=True):
    """To the follower, last: how the process says that training ended."""

    status: Status


class Told(msgspec.Struct, frozen=True, tag=True):
    """From the follower: a line for the user."""

    text: str


class Arrived(msgspec.Struct, frozen=True, tag=True):
    """From the follower: all points up to this step have arrived."""

    step: int


class StatusSet(msgspec.Struct, frozen=True, tag=True):
    """From the follower: everything has arrived, and MLflow knows how the run ended."""


ToFollower = FollowRun | TrainingEnded
FromFollower = Told | Arrived | StatusSet
