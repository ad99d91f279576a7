"""Options of `phi4 launch slurm`."""

from pathlib import Path
from typing import Annotated

import typer

Nodes = Annotated[
    str, typer.Option(help="N, or MIN-MAX: with parallel.data=0 a requeued job may get fewer.")
]
Partition = Annotated[str | None, typer.Option(help="sbatch --partition.")]
Account = Annotated[str | None, typer.Option(help="sbatch --account.")]
TimeLimit = Annotated[
    str | None, typer.Option("--time", help="Limit of one attempt, as 24:00:00; then a requeue.")
]
GpusPerNode = Annotated[
    int, typer.Option(min=0, help="GPUs of a node, one rank each; 0 with --tasks-per-node: CPUs.")
]
TasksPerNode = Annotated[
    int | None, typer.Option(min=1, help="Ranks of a node; --gpus-per-node where not given.")
]
CpusPerTask = Annotated[int | None, typer.Option(min=1, help="CPU cores of a rank.")]
UseTorchrun = Annotated[
    bool, typer.Option("--torchrun/--srun", help="torchrun per node, or one Slurm task per rank.")
]
SignalSeconds = Annotated[
    int | None,
    typer.Option(
        min=0, help="Notice before the time limit; reliability.stop_seconds + 60 where not given."
    ),
]
Container = Annotated[
    str | None, typer.Option(help="Image of srun --container-image (pyxis); its `python` is used.")
]
Mounts = Annotated[str | None, typer.Option(help="srun --container-mounts; the working directory.")]
Setup = Annotated[
    list[str] | None,
    typer.Option(help="File to source, or a shell command, before the ranks start; repeatable."),
]
MaxRequeues = Annotated[
    int, typer.Option(min=0, help="Failures in a row without a newer checkpoint; then it ends.")
]
SbatchOptions = Annotated[
    list[str] | None, typer.Option("--sbatch", help='Any other option: --sbatch="--qos=high".')
]
Python = Annotated[str | None, typer.Option(help="The ranks' Python; this one where not given.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the script; submit nothing.")]
Change = Annotated[bool, typer.Option("--change", help="Let schedule keys differ from the run's.")]
RunDir = Annotated[Path, typer.Argument(help="run.dir of a submitted run.")]
