"""The user's request for a Slurm job, as plain values."""

import re
from dataclasses import dataclass
from typing import Literal

from phi4.errors import ConfigError

RankStarter = Literal["srun", "torchrun"]


@dataclass(frozen=True)
class NodeRange:
    """Number of nodes of a job; Slurm picks any count in the range at every start."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str) -> "NodeRange":
        """Parse `4` or `2-4`.

        Raises:
            ConfigError: it is neither, or the range is empty.
        """
        match = re.fullmatch(r"([1-9]\d*)(?:-([1-9]\d*))?", text)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ConfigError(f"--nodes={text} is not a count; give 4, or MIN-MAX such as 2-4")
        return cls(int(match[1]), int(match[2] or match[1]))

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least}-{self.most}"

    @property
    def counts(self) -> range:
        """Return every count that Slurm may pick."""
        return range(self.least, self.most + 1)


def limit_seconds(text: str) -> int:
    """Parse Slurm's time limit: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:...].

    Raises:
        ConfigError: it is none of these.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        raise ConfigError(f"--time={text} is not a time limit; give 24:00:00, 90 (minutes) or 2-00")
    days, *rest = match.groups()
    numbers = [int(part) for part in rest if part is not None]
    if days is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


@dataclass(frozen=True)
class Setting:
    """An environment variable of the ranks; a value set by the user has precedence."""

    name: str
    value: str
    reason: str
    """One line, used as the comment above it in the script."""


@dataclass(frozen=True)
class ArrayTask:
    """One run of a job array."""

    run_dir: str
    last_step: int


@dataclass(frozen=True)
class SlurmRequest:
    """A job request: program, resources, and retry limit.

    Attributes:
        written_by: the command line that produced it, shown in the script.
        run_dir: from the recipe, relative to the directory of submission if it is relative there;
            for an array the directory of its script.
        last_step: run.steps; the job is finished when the newest checkpoint is of this step.
        command: what every rank runs, as a shell command. The tasks of an array append the recipe
            of their run.
        nodes: number of machines.
        tasks_per_node: ranks per machine, one per GPU if there are GPUs.
        gpus_per_node: GPUs per machine; 0 requests none.
        starter: srun: one Slurm task per rank. torchrun: one task per node, which starts them.
        signal_seconds: time between the notice (before the time limit, or at a preemption) and the
            kill.
        max_retries: consecutive failures without a newer checkpoint after which the job is not
            requeued.
        setup: shell lines run on the first node before the ranks start, for example `module load`.
        settings: environment variables of the ranks.
        container: image for `srun --container-image` (pyxis).
        container_mounts: for `srun --container-mounts`.
        cpus_per_task: None leaves it to the cluster.
        sbatch: further options of sbatch, each a single word such as `--qos=high`.
        tasks: runs of a job array, one task each; empty for a job of one run.
        parallel_tasks: tasks that may run at a time; None sets no limit.
    """

    written_by: str
    run_dir: str
    last_step: int
    command: tuple[str, ...]
    nodes: NodeRange
    tasks_per_node: int
    gpus_per_node: int = 0
    starter: RankStarter = "srun"
    name: str = "phi4"
    partition: str | None = None
    account: str | None = None
    time_limit: str | None = None
    signal_seconds: int = 300
    max_retries: int = 3
    setup: str = ""
    settings: tuple[Setting, ...] = ()
    container: str | None = None
    container_mounts: str | None = None
    cpus_per_task: int | None = None
    sbatch: tuple[str, ...] = ()
    tasks: tuple[ArrayTask, ...] = ()
    parallel_tasks: int | None = None
