"""What the hosts hold of the replicas of checkpoints: every rank's view of its own host."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phi4.engine.agreement import gathered
from phi4.engine.platform import Platform
from phi4.rundir import this_process
from phi4.rundir.replica import Held, ReplicaId, held_replicas


@dataclass(frozen=True)
class HostView:
    """One rank's view of its host.

    Attributes:
        host: host name.
        kernel: distinguishes it from another host of that name.
        held: replicas on the host.
        problem: why none of them can be read; empty if they can.
    """

    host: str
    kernel: str
    held: tuple[Held, ...] = ()
    problem: str = ""

    def shares_disk_with(self, other: "HostView") -> bool:
        """Return whether both are on the same host."""
        return (self.host, self.kernel) == (other.host, other.kernel)


def views_of_replicas(platform: Platform, place: Path) -> list[HostView]:
    """Return every rank's view of its host, by rank.

    Collectives: one all-gather of file names over all ranks.
    """
    process, problem = this_process(), ""
    held: tuple[Held, ...] = ()
    try:
        held = tuple(held_replicas(place))
    except OSError as error:
        problem = f"the replicas on {process.host} cannot be read: {error}"
    return gathered(platform, HostView(process.host, process.kernel, held, problem))


def newest_complete(views: Sequence[HostView]) -> ReplicaId | None:
    """Return the newest checkpoint of which all hosts together have every file."""
    present: dict[ReplicaId, set[str]] = {}
    num_files: dict[ReplicaId, int] = {}
    for held in (held for view in views for held in view.held):
        present.setdefault(held.of, set()).update(held.present)
        num_files[held.of] = held.num_files
    complete = [of for of, names in present.items() if len(names) == num_files[of]]
    return max(complete, key=lambda of: of.step, default=None)


def first_holder(of: ReplicaId, views: Sequence[HostView]) -> int:
    """Return the lowest rank whose host has the manifest."""
    return next(r for r, view in enumerate(views) if any(held.of == of for held in view.held))


def present_files(view: HostView, of: ReplicaId) -> tuple[str, ...]:
    """Return the names of the files of a replica on a host."""
    return next((held.present for held in view.held if held.of == of), ())
