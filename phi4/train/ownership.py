"""A run's hold on its directory while it trains: taken first, checked before every write.

Rank 0 writes the records, so rank 0 checks, before each record, by reading one small file. Before a
checkpoint, which all ranks write, all ranks learn the outcome and stop together.
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
        """Nothing, and no record of the step where the directory was lost.

        Raises:
            OwnershipError: on the writer rank.
        """
        if self._lease:
            self._lease.check()
        return {}


def require_ownership(platform: Platform, lease: Lease | None) -> None:
    """Let no rank write checkpoints in a directory that was lost.

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
    """Own the run directory for the time of the block; gives the lease on the writer rank.

    Args:
        run_dir: created when it does not exist.
        platform: this process.
        attempt: the attempt whose lease the launcher holds; None to take one.
        job: Slurm job id, or empty.
        say: takes a line for the console.

    Raises:
        OwnershipError: another run owns the directory.
        DiskFullError: there is no space for the lease.
        PlatformError: the directory cannot be written, or a rank does not see it; names the rank
            and its host.

    Collectives: a broadcast of the outcome, and an all-gather of who sees the lease, over all
    ranks.
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

        # The file is new, so no rank can take an old copy of the directory for this one.
        wait_until_visible(platform, [decided_by_writer(platform, take)])
        yield held[0] if held else None
