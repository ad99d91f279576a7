"""Where a launcher placed a process. Imported by every process that a launcher starts."""

import msgspec


class LaunchedBy(msgspec.Struct, frozen=True):
    """Where the launcher placed a process.

    Attributes:
        slurm: Slurm's variables that name the job, without their prefix: job_id, partition, ...
        node: index of this machine among those of the run.
        local_rank: rank among the processes of this machine.
    """

    slurm: dict[str, str] = {}
    node: int = 0
    local_rank: int = 0

    @property
    def job(self) -> str:
        """Slurm job id; empty outside Slurm."""
        return self.slurm.get("job_id", "")


NO_LAUNCHER = LaunchedBy()
"""A process that its user started directly."""
