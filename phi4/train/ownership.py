"""A run's ownership of its directory: acquired first, checked before every write.

Rank 0 writes the records, so rank 0 checks before each record, by reading one small file. Before a
checkpoint, which all ranks write, the outcome is broadcast, so that all ranks stop together.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from phi4.engine.agreement import decided_by_writer, wait_until_visible
from phi4.engine.platform import Platform
from phi4.rundir import Lease, held_lease, inherited_lease
from phi4.train.hooks import Hook, Progress

Say = Callable[[str], None]


class Ownership(Hook):
    """Ends a run that no longer owns its directory; the first hook of a run.

    Args:
        lease: on the writer rank; None on the others.
    """

    def __init__(self, lease: Lease | None) -> None:
        self._lease = lease

    def measure(self, progress: Progress) -> dict[str, float]:
        """Add no numbers; prevent the record of the step if the directory was lost.

        Raises:
            OwnershipError: on the writer rank.
        """
        if self._lease:
            self._lease.check()
        return {}


def require_ownership(platform: Platform, lease: Lease | None) -> None:
    """Raise on every rank if the run directory was lost, before checkpoints are written.

    Args:
        platform: this process.
        lease: on the writer rank; None on the others.

    Raises:
        OwnershipError: on every rank.

    Collectives: a broadcast of the outcome over all ranks.
    """

    def check() -> None:
        assert lease is not None, "the writer rank holds it"
        lease.check()

    decided_by_writer(platform, check)


@contextmanager
def owned_run_dir(
    run_dir: Path, platform: Platform, *, attempt: int | None, job: str, say: Say
) -> Iterator[Lease | None]:
    """Own the run directory for the duration of the block; yields the lease on the writer rank.

    Args:
        run_dir: created when it does not exist.
        platform: this process.
        attempt: the attempt whose lease the launcher holds; None to take one.
        job: Slurm job id, or empty.
        say: prints a line to the console.

    Raises:
        OwnershipError: another run owns the directory.
        DiskFullError: there is no space for the lease.
        PlatformError: the directory cannot be written, or a rank does not see it; names the rank
            and its host.

    Collectives: a broadcast of the outcome, and an all-gather of which ranks see the lease, over
    all ranks.
    """
    held: list[Lease] = []
    with ExitStack() as stack:

        def take() -> Path:
            lease = (
                stack.enter_context(held_lease(run_dir, job=job, say=say))
                if attempt is None
                else inherited_lease(run_dir, attempt)
            )
            held.append(lease)
            return lease.path

        # The file is new, so no rank can mistake a cached copy of the directory for this one.
        wait_until_visible(platform, [decided_by_writer(platform, take)])
        yield held[0] if held else None
